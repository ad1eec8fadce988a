"""Spatial-reduction attention with LayerNorm and residual: `sr_attention`."""

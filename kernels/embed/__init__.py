"""Overlapping patch embedding with LayerNorm: `patch_embed`."""

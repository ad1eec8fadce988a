"""Mix-FFN with LayerNorm and residual: `mix_ffn`."""

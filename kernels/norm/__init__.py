"""LayerNorm over channels: `layer_norm`."""

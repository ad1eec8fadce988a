"""Label maps from logits: `upsample_argmax`."""

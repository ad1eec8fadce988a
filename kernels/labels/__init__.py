"""Label maps from logits, `upsample_argmax`, and their scores, `upsample_scores`."""

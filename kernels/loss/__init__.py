"""Losses of logits that are smaller than the labels."""

"""Blocks that several ops share: products, activations, resizing, device functions."""

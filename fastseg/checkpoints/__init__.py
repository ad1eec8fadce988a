"""Checkpoints on disk and on the hub: reading, matching names and shapes, saving."""

"""Pictures and their label maps on disk, for evaluation and training."""

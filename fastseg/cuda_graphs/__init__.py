"""CUDA graphs of whole forwards: what `fastseg.graphed` does."""

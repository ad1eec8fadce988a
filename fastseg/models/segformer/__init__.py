"""SegFormer (Xie et al., arXiv:2105.15203): MiT encoders and the all-MLP decode head."""

"""The SegGPT family: what is shown in one picture and its mask is painted in others."""

"""Prefixes in the module tree of fastseg's SegFormers, which is that of transformers 4."""

BASE = "segformer."
ENCODER = BASE + "encoder."

"""Registration of the ops in torch.library, as `torch.ops.fastseg.*`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .optional_triton import interpreting

# The launchers and the eager twins by op, for tools: launches recorded, configurations tuned.
FUSED: dict[str, Callable[..., Any]] = {}
EAGER: dict[str, Callable[..., Any]] = {}

# Registered by dispatch key and not by `custom_op`: a third of its cost at each call (measured:
# 2.7 us against 7.8 us).
_LIBRARY = torch.library.Library("fastseg", "FRAGMENT")


def register(
    schema: str,
    fused: Callable[..., Any],
    eager: Callable[..., Any],
    fake: Callable[..., Any],
) -> None:
    """Define an op: kernels on CUDA, the eager twin (or the interpreter) on a CPU.

    Args:
        schema: with the op's name, in torch.library's language.
        fake: gives empty tensors of the right shape, dtype and strides.
    """
    if not __name__.startswith("fastseg."):
        # At the top of a checkout kernels/ is also found by a library that looks for Hugging Face's
        # `kernels`: transformers imports it once more under that name. Ops exist once.
        return
    name = schema.split("(", 1)[0]
    FUSED[name], EAGER[name] = fused, eager
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, fused, "CUDA")
    _LIBRARY.impl(name, fused if interpreting() else eager, "CPU")
    torch.library.register_fake(f"fastseg::{name}", fake, lib=_LIBRARY)

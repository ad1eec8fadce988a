"""Activation checkpointing: layers that are computed once more in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Checkpointing:
    """Which layers an encoder recomputes, and how.

    Args:
        arguments: of `torch.utils.checkpoint.checkpoint`.
        every_n_layers: recompute each n-th layer, counted through all stages.
        offload: keep what is needed for that in the host's memory.

    Raises:
        ValueError: `every_n_layers` is less than 1.
    """

    arguments: Mapping[str, Any]
    every_n_layers: int = 1
    offload: bool = False

    def __post_init__(self) -> None:
        if self.every_n_layers < 1:
            raise ValueError(
                f"every_n_layers: expected an integer of at least 1, got {self.every_n_layers!r}"
            )

    def run(self, number: int, layer: Callable[..., Any], *inputs: Any) -> Any:
        """Output of `layer`, the encoder's `number`-th."""
        if number % self.every_n_layers:
            return layer(*inputs)
        with save_on_cpu(pin_memory=True) if self.offload else contextlib.nullcontext():
            return checkpoint(layer, *inputs, **self.arguments)

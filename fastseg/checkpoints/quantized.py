"""Checkpoints that bitsandbytes has quantised: 8-bit weights as floats, and what is not read."""

from __future__ import annotations

from pathlib import Path

import torch

from fastseg.folding.quantized import scaled_rows

from .files import Tensors
from .report import CheckpointError

_FOUR_BITS = ".quant_state.bitsandbytes__"


def dequantized(tensors: Tensors, path: Path | str) -> Tensors:
    """The tensors of a checkpoint with 8-bit weights of bitsandbytes as float32.

    Beside `LAYER.weight` in int8 such a checkpoint has `LAYER.SCB`, a scale for each row, and
    `LAYER.weight_format`, which is 0 but in files of old versions.

    Raises:
        CheckpointError: the weights have 4 bits, or are in the order of tiles of a GPU.
    """
    if any(_FOUR_BITS in name for name in tensors):
        raise CheckpointError(
            f"{path}: expected floats or 8-bit weights, got 4-bit weights of bitsandbytes: load "
            "it with transformers, call model.dequantize(), and save that"
        )
    found = dict(tensors)
    for name in tensors:
        layer, _, kind = name.rpartition(".")
        codes = tensors.get(f"{layer}.weight")
        if kind != "SCB" or codes is None or codes.dtype != torch.int8:
            continue
        order = found.pop(f"{layer}.weight_format", None)
        if order is not None and int(order) != 0:
            raise CheckpointError(
                f"{path}: expected rows, got {layer}.weight in the order of a GPU's tiles, as old "
                "versions of bitsandbytes wrote it: load it with such a one, and save floats"
            )
        found[f"{layer}.weight"] = scaled_rows(codes, found.pop(name))
    return found

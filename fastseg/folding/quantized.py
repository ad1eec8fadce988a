"""Weights that other libraries store in 8 or 4 bits, as floats.

They are told by what they hold, and no library is imported for them:

- bitsandbytes, 8 bits: codes in int8 and a scale `SCB` for each row, W = codes SCB / 127. Its
  layers take the scale off the weight, to their `state`, in their first forward.
- bitsandbytes, 4 bits: packed codes and a `quant_state`, which the module that defines it unpacks.
- torchao and its like: tensors of a class with a `dequantize` of its own.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import nn


def quantized_as(layer: nn.Module) -> str | None:
    """What a linear layer has for weights, in words; None where these are no quantised ones."""
    weight = layer._parameters.get("weight")
    if weight is None or not isinstance(layer, nn.Linear):
        return None
    if hasattr(weight, "SCB"):
        return "8-bit weights (bitsandbytes)"
    if hasattr(weight, "quant_state"):
        return "4-bit weights (bitsandbytes)"
    if type(weight).dequantize is not torch.Tensor.dequantize:
        return f"quantised weights ({type(weight).__module__.partition('.')[0]})"
    return None


def quantized_problem(layer: nn.Module) -> str | None:
    """Reason why a layer cannot be folded, and what to do; None where it is not quantised."""
    kind = quantized_as(layer)
    if kind is None:
        return None
    if "forward" in layer.__dict__:
        return f"{kind} and a forward of its own"
    advice = "pass dequantize=True"
    if "bitsandbytes" in kind:  # transformers' method knows no other library
        advice += ", or call model.dequantize() first"
    return f"{kind}: {advice}"


def float_weight(layer: Any) -> torch.Tensor:
    """The weight (out, in) of a layer that `quantized_as` knows, in float32 or as it was stored."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    with torch.no_grad():
        if state is not None:
            return _unpacked(weight.data, state)
        if weight.dtype == torch.int8:
            scale = layer.state.SCB if weight.SCB is None else weight.SCB
            return scaled_rows(weight.data, scale)
        if hasattr(weight, "SCB") or hasattr(weight, "quant_state"):  # not quantised so far
            return weight.data.as_subclass(torch.Tensor)
        return weight.dequantize()


def scaled_rows(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """8-bit weights of bitsandbytes in float32: codes (out, in) in int8, scale (out,)."""
    return (codes.double() * scale.double()[:, None] / 127).float()


def _unpacked(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """4-bit weights of bitsandbytes."""
    library: Any = sys.modules[type(state).__module__]
    if getattr(state, "packing_format_for_cpu", False):
        # Where a CPU has AVX512-BF16 a forward packs them anew. What undoes that leaves the scales
        # of blocks as they are, (blocks of a row, rows), or quantises them a second time.
        state = copy.copy(state)
        scales = state.absmax.t().reshape(-1).float()
        state.original_nested = False
        codes, state = library._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = scales
    return library.dequantize_4bit(codes, state)

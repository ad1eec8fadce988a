"""The least time a call of an op could take: its least bytes and its FLOPs over what a device can.

Bytes: each input, weight and output passes once between memory and chip. What a fused op need not
write does not count: hidden tensors, keys and values, projections of coarse maps. FLOPs: of matrix
products and convolutions, two for a multiply-add, as the eager twin takes them. A kernel may do
more of either; none can do with less, but for inputs that were left in a cache.

Not in it: instructions that are no matrix product (softmax, activation, interpolation, comparison),
which bound some of the ops before bytes and FLOPs do.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fastseg.op_calls import OpCall

from .op_cases import tensors

# The tensors that an op cannot do without. Others, the sums of weights say, follow from these.
NEEDED = {
    "patch_embed": (
        *("feature_map", "weight", "bias", "norm_weight", "norm_bias"),
        *("pixel_scale", "pixel_offset"),
    ),
    "sr_attention": (
        *("x", "key_value_weight", "output_bias", "query_weight", "query_bias", "output_weight"),
        *("key_offset_weight", "sr_weight", "sr_bias"),
    ),
    "mix_ffn": (
        *("x", "fc1_weight", "fc1_bias", "dwconv_weight", "dwconv_bias", "fc2_weight", "fc2_bias"),
        *("norm_weight", "norm_bias"),
    ),
    "layer_norm": ("x", "weight", "bias"),
    "decode_head": ("feature_maps", "weights", "bias", "classifier_weight", "classifier_bias"),
    "upsample_argmax": ("logits",),
}


class Work(NamedTuple):
    """What a call has to do at least."""

    bytes: int
    flops: int


class Ceilings(NamedTuple):
    """What a device can do at best, and where that is known from."""

    bytes_per_second: float
    flops_per_second: float
    source: str

    def floor_microseconds(self, work: Work) -> float:
        """The least time of `work`: the larger of that of its bytes and that of its FLOPs."""
        seconds = max(work.bytes / self.bytes_per_second, work.flops / self.flops_per_second)
        return 1e6 * seconds


def work(call: OpCall, output: torch.Tensor) -> Work:
    """The least work of `call`, whose result looks like `output`."""
    inputs = [tensor for name in NEEDED[call.op] for tensor in tensors(call.arguments[name])]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in [*inputs, output])
    return Work(moved, 2 * _MULTIPLY_ADDS[call.op](call.arguments, output))


def _patch_embed(arguments: Mapping[str, Any], output: torch.Tensor) -> int:
    batch, tokens, _ = output.shape
    return batch * tokens * arguments["weight"].numel()


def _sr_attention(arguments: Mapping[str, Any], output: torch.Tensor) -> int:
    batch, tokens, channels = output.shape
    ratio, heads = arguments["sr_ratio"], arguments["num_heads"]
    keys = (arguments["height"] // ratio) * (arguments["width"] // ratio)
    reduction = keys * arguments["sr_weight"].numel() if ratio > 1 else 0
    key_value = keys * arguments["key_value_weight"].numel()
    # The weights of one head hold the query and output projections; a score offset is left.
    projections = keys * channels if heads == 1 else 2 * tokens * channels * channels
    products = 2 * tokens * keys * channels
    return batch * (reduction + key_value + projections + products)


def _mix_ffn(arguments: Mapping[str, Any], output: torch.Tensor) -> int:
    batch, tokens, _ = output.shape
    weights = ("fc1_weight", "dwconv_weight", "fc2_weight")
    return batch * tokens * sum(arguments[name].numel() for name in weights)


def _decode_head(arguments: Mapping[str, Any], output: torch.Tensor) -> int:
    batch, _, height, width = output.shape
    projections = sum(
        batch * feature_map.shape[2] * feature_map.shape[3] * weight.numel()
        for feature_map, weight in zip(arguments["feature_maps"], arguments["weights"], strict=True)
    )
    return projections + batch * height * width * arguments["classifier_weight"].numel()


_MULTIPLY_ADDS: dict[str, Callable[[Mapping[str, Any], torch.Tensor], int]] = {
    "patch_embed": _patch_embed,
    "sr_attention": _sr_attention,
    "mix_ffn": _mix_ffn,
    "layer_norm": lambda arguments, output: 0,
    "decode_head": _decode_head,
    "upsample_argmax": lambda arguments, output: 0,
}

_SECONDS = 0.5  # that a ceiling is measured for
# What matrix products and copies reach on a chip, both measured with warm clocks.
_KNOWN_BYTES = {"H200": 4.3e12}
_KNOWN_FLOPS = {
    ("H200", torch.bfloat16): 790e12,
    ("H200", torch.float16): 790e12,
}


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Those of a known chip, else what a large copy and a large matrix product reach here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    chip = next((chip for chip in _KNOWN_BYTES if chip in name), "")
    bandwidth, product = _KNOWN_BYTES.get(chip), _KNOWN_FLOPS.get((chip, dtype))
    sources = [
        f"{'measured' if known is None else 'known'} {what}"
        for what, known in (("bandwidth", bandwidth), (f"{dtype} product", product))
    ]
    return Ceilings(
        bandwidth or _copy_bytes_per_second(device),
        product or _product_flops_per_second(device, dtype),
        ", ".join(sources),
    )


def _copy_bytes_per_second(device: torch.device) -> float:
    size = 1 << (30 if device.type == "cuda" else 28)  # beyond any cache
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _product_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    # A short product escapes what else runs on a CPU, a long one fills all its cores.
    best = 0.0
    for side in (8192,) if device.type == "cuda" else (512, 2048):
        left = torch.randn(side, side, device=device).to(dtype)
        right = torch.randn(side, side, device=device).to(dtype)
        best = max(
            best, 2 * side**3 / _best_seconds(functools.partial(torch.mm, left, right), device)
        )
    return best


def _best_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The shortest of many runs, for a ceiling: what else runs on the machine only adds to one."""
    best = math.inf
    stop = time.perf_counter() + _SECONDS
    while time.perf_counter() < stop:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

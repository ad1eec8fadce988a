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
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from fastseg.kernels.tune.calls import OpCall

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
    """What a device can do at best, and how that was found."""

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

# What chips are known to reach, to compare a measured ceiling with; no floor is taken from these.
KNOWN = {
    "H200": Ceilings(4.3e12, 790e12, "an H200: 4.3 TB/s, 790 TFLOP/s"),
    "H100 80GB HBM3": Ceilings(
        3.35e12, 989e12, "the data sheet of an H100 SXM: 3.35 TB/s, 989 TFLOP/s in half precision"
    ),
}

_SECONDS = 0.5  # that a ceiling is measured for, after as long a warm-up
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # beyond any cache
_PIECE_BYTES = 1 << 22
# Short products and copies of short pieces escape what else runs on a CPU; long products fill its
# cores.
_SIDES = {"cuda": (8192,), "cpu": (256, 512, 2048)}


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What a large copy and a large matrix product reach on `device`, with the threads set.

    Args:
        device: a CPU or a CUDA device.
    """
    return Ceilings(
        _copy_bytes_per_second(device),
        _product_flops_per_second(device, dtype),
        f"measured copy, measured {dtype} product",
    )


def known_ceilings(device_name: str) -> Ceilings | None:
    """What the chip of that name is known to reach in half precision; None of others."""
    return next((known for chip, known in KNOWN.items() if chip in device_name), None)


def _copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and bytes written, both counted."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = source.clone()  # in memory, before any time is taken
    if device.type == "cuda":
        return 2 * source.numel() / _least_seconds(lambda: target.copy_(source), device)
    # Piece after piece: each has left the caches before its turn comes again.
    pieces = itertools.cycle(
        zip(target.split(_PIECE_BYTES), source.split(_PIECE_BYTES), strict=True)
    )

    def copy_next() -> None:
        to, piece = next(pieces)
        to.copy_(piece)

    return 2 * _PIECE_BYTES / _least_seconds(copy_next, device)


def _product_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    best = 0.0
    for side in _SIDES[device.type]:
        if best and 2 * side**3 / best > _SECONDS:
            break  # a CPU has no fast product of this dtype
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = _least_seconds(functools.partial(torch.mm, left, right), device)
        best = max(best, 2 * side**3 / seconds)
    return best


def _least_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Of many runs, with warm clocks: on a CPU the fastest, on a GPU the median of the best tenth.

    What else runs on a CPU only adds to a run: under load the tenth read up to a sixth less than
    the fastest, which stayed. A ceiling still follows the machine, whose clock and neighbours may
    change between it and what it is compared with.
    """
    on_gpu = device.type == "cuda"
    seconds = _event_seconds if on_gpu else _wall_seconds
    _for_a_while(lambda: seconds(function))
    taken = sorted(_for_a_while(lambda: seconds(function)))
    return statistics.median(taken[: max(len(taken) // 10, 1)]) if on_gpu else taken[0]


def _for_a_while(measure: Callable[[], float]) -> list[float]:
    stop = time.perf_counter() + _SECONDS
    taken = [measure()]
    while time.perf_counter() < stop:
        taken.append(measure())
    return taken


def _wall_seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _event_seconds(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000

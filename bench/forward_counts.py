"""Launches, least bytes and FLOPs of whole forwards, counted on meta tensors: nothing runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import fastseg
from fastseg.kernels import library
from fastseg.kernels.launch import record_launches
from fastseg.op_calls import OpCall, OpRecorder

from .floors import Ceilings, Work, work
from .launches import pretend_gpu

# Of an H200 in half precision.
_H200 = Ceilings(4.3e12, 790e12, "an H200: 4.3 TB/s, 790 TFLOP/s")


def count_forward(
    variant: str, size: tuple[int, int], batch: int, dtype: torch.dtype, family: str
) -> tuple[int, Work, float]:
    """Launches, the sum of the ops' least work, and the sum of their floors in microseconds.

    Args:
        variant: "b0" to "b5", with 150 classes; from pixels to the label map.
    """
    with torch.device("meta"):
        model = fastseg.from_preset(f"segformer_{variant}", num_classes=150).eval().to(dtype)
    calls: list[OpCall] = []
    with (
        pretend_gpu(family),
        record_launches(dry=True) as launches,
        OpRecorder(calls.append, run=library.FUSED),
    ):
        pixels = torch.empty(batch, 3, *size, device="meta", dtype=dtype)
        fastseg.kernels.upsample_argmax(model(pixels).logits, size)
    works = [work(call, call.bind(getattr(torch.ops.fastseg, call.op))()) for call in calls]
    total = Work(sum(one.bytes for one in works), sum(one.flops for one in works))
    return len(launches), total, sum(_H200.floor_microseconds(one) for one in works)


def table(
    variants: Sequence[str], size: tuple[int, int], batches: Sequence[int], family: str
) -> str:
    """A markdown section in bfloat16."""
    lines = [
        f"## Whole forwards, {family}",
        "",
        f"bfloat16, {size[0]}x{size[1]}, pixels to label map. Bytes: each input, weight and output",
        "of an op once. Floor: the larger of the times of bytes and FLOPs of each op, at ceilings",
        f"of {_H200.source}, summed;",
        "launches and what is no matrix product are not in it.",
        "",
        "| variant | batch | launches | MB | GFLOP | floor, us |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for batch in batches:
        for variant in variants:
            launches, total, floor = count_forward(variant, size, batch, torch.bfloat16, family)
            lines.append(
                f"| {variant.upper()} | {batch} | {launches} | {total.bytes / 1e6:.1f} "
                f"| {total.flops / 1e9:.1f} | {floor:.0f} |"
            )
    return "\n".join(lines)

"""Launches, least bytes and FLOPs of whole forwards, counted on meta tensors: nothing runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

import fastseg
from fastseg.kernels.core import registry
from fastseg.kernels.core.launch import record_launches
from fastseg.kernels.tune.calls import OpCall, OpRecorder

from .floors import KNOWN, NEEDED, Work, work
from .launches import pretend_gpu
from .op_cases import BATCHED, CLASSES, tensors

_H200 = KNOWN["H200"]


class ForwardWork(NamedTuple):
    """The least that a forward, pixels to logits, has to do.

    Attributes:
        ops: of each call of an op, in order: its input and its result pass between memory and chip.
        network_bytes: of pixels, weights and logits, once each: all that has to pass if every
            result between ops stayed on the chip.
    """

    ops: tuple[Work, ...]
    network_bytes: int

    @property
    def sum(self) -> Work:
        """Bytes and FLOPs of all ops."""
        return _sum(self.ops)


@functools.cache
def forward_work(
    variant: str,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    classes: int = CLASSES,
) -> ForwardWork:
    """The least work of a forward of `variant` ("b0" to "b5") on images of `size` (H, W).

    It needs neither a GPU nor Triton.
    """
    works: list[Work] = []
    network_bytes = 0

    def note(call: OpCall) -> None:
        nonlocal network_bytes
        works.append(work(call, call.bind(getattr(torch.ops.fastseg, call.op))()))
        weights = [name for name in NEEDED[call.op] if name not in BATCHED]
        network_bytes += sum(_bytes(t) for n in weights for t in tensors(call.arguments[n]))

    # Outside of inference mode, in which edits of weights are not counted, nor folds kept.
    with torch.inference_mode(False), pretend_gpu("default"), fastseg.backend("auto"):
        model, pixels = _meta_model(variant, size, batch, dtype, classes)
        with OpRecorder(note):
            logits = model(pixels).logits
    return ForwardWork(tuple(works), network_bytes + _bytes(pixels) + _bytes(logits))


def count_forward(
    variant: str, size: tuple[int, int], batch: int, dtype: torch.dtype, family: str
) -> tuple[int, Work, float]:
    """Launches, the sum of the ops' least work, and the sum of their floors in microseconds.

    Args:
        variant: "b0" to "b5", with 150 classes; from pixels to the label map.
    """
    calls: list[OpCall] = []
    with (
        pretend_gpu(family),
        record_launches(dry=True) as launches,
        OpRecorder(calls.append, run=registry.FUSED),
    ):
        model, pixels = _meta_model(variant, size, batch, dtype, CLASSES)
        fastseg.kernels.upsample_argmax(model(pixels).logits, size)
    works = [work(call, call.bind(getattr(torch.ops.fastseg, call.op))()) for call in calls]
    return len(launches), _sum(works), sum(_H200.floor_microseconds(one) for one in works)


def _meta_model(
    variant: str, size: tuple[int, int], batch: int, dtype: torch.dtype, classes: int
) -> tuple[torch.nn.Module, torch.Tensor]:
    with torch.device("meta"):
        model = fastseg.from_preset(f"segformer_{variant}", num_classes=classes).eval().to(dtype)
    return model, torch.empty(batch, 3, *size, device="meta", dtype=dtype)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sum(works: Sequence[Work]) -> Work:
    return Work(sum(one.bytes for one in works), sum(one.flops for one in works))


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

"""The calls of ops that a forward makes, with their real arguments: who runs them, and the gate.

A model is run once by the eager twins, whatever the device, so that a wrong kernel does not spoil
the inputs of the calls after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only

import fastseg
from fastseg.kernels.core import dispatch, registry
from fastseg.kernels.tune.calls import OpCall, OpRecorder

from ..gates import GPU_FLOAT32_BOUND, HALF_BOUND, Gate, labels_gate, relative_error
from ..options import OPS

_AFTER_STAGES = {"decode_head": "head", "upsample_argmax": "labels"}


@dataclass(frozen=True)
class CountedCall(OpCall):
    """A call of an op, and how a forward makes it."""

    part: str  # of the forward, as "mix_ffn 4"; a second kind of call there is "mix_ffn 4, 2"
    count: int  # how often a forward makes such a call


def record(model: torch.nn.Module, pixels: torch.Tensor) -> list[CountedCall]:
    """The calls of a forward of `model` to the label map of `pixels`, in order of first sight.

    What an op's `supports` declines runs without the op, and is no call: `missing` tells.
    """
    calls: dict[tuple[str, str], CountedCall] = {}
    stage = 0

    def note(call: OpCall) -> None:
        nonlocal stage
        stage += call.op == "patch_embed"
        where = f"{call.op} {_AFTER_STAGES.get(call.op, str(stage))}"
        seen = calls.get((where, call.key()))
        if seen is None:
            others = sum(place == where for place, _ in calls)
            part = f"{where}, {others + 1}" if others else where
            seen = CountedCall(call.op, call.arguments, part, count=0)
        calls[where, call.key()] = replace(seen, count=seen.count + 1)

    with torch.no_grad():
        model(pixels)  # folds the weights
        # On a CPU the ops would call their twins past torch's dispatcher.
        with (
            mock.patch.object(dispatch, "_device_reason", return_value=None),
            fastseg.backend("auto"),
            OpRecorder(note, run=registry.eager_twin),
        ):
            fastseg.kernels.upsample_argmax(model(pixels).logits, pixels.shape[2:])
    return list(calls.values())


def missing(calls: list[CountedCall]) -> dict[str, str]:
    """Why an op in OPS is not among `calls`: a reason by op."""
    declined = dict(fastseg.kernels.fallbacks().keys())
    absent = [op for op in OPS if all(call.op != op for call in calls)]
    return {op: declined.get(op, "the model does not call it") for op in absent}


def provider(name: str, call: CountedCall) -> Callable[..., torch.Tensor]:
    """What computes `call`: "eager", "compiled", or on a GPU "kernels"."""
    if name == "eager":
        return registry.eager_twin(call.op)
    if name == "kernels":
        return registry.launcher(call.op)
    # One graph for these very shapes; beyond a few in a process, dynamo runs eagerly.
    torch._dynamo.reset()
    return torch.compile(registry.eager_twin(call.op), dynamic=False)


def gate(call: CountedCall, eager: torch.Tensor) -> Gate:
    """What a result of `call` must pass; `eager` is that of the eager twin.

    The reference is the twin in float64, on the inputs as they are rounded. In half precision a
    result may be 1.25 times as wrong as the twin's.
    """
    if call.op == "upsample_argmax":  # logits of any dtype are blended in float32
        return labels_gate(call.arguments["logits"].float(), (eager.shape[1], eager.shape[2]))
    wide = tree_map_only(torch.Tensor, torch.Tensor.double, call.arguments)
    reference = OpCall(call.op, wide).bind(registry.eager_twin(call.op))()

    def error(result: torch.Tensor) -> float:
        return relative_error(result, reference) if result.dtype == eager.dtype else math.inf

    measure = "relative RMS error against the eager twin in float64"
    bound = GPU_FLOAT32_BOUND if eager.dtype == torch.float32 else HALF_BOUND * error(eager)
    return Gate(measure, bound, error)

"""The calls of ops that a forward makes, with their real arguments: what runs them, and the gate.

A model is run once by the eager twins, whatever the device, so that a wrong kernel does not spoil
the inputs of the calls after it.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import fastseg
from fastseg.kernels.core import dispatch, registry
from fastseg.kernels.tune.calls import OpCall, OpRecorder

from .context import SkippedCase
from .gates import Gate, labels_gate
from .pairs import draw_pixels, draw_weights

CLASSES = 150
# How wrong a result may be: in float32 by itself, in half precision beside the eager twin's.
FLOAT32_BOUND = 5e-6
HALF_BOUND = 1.25
# What a model calls, in the order of a forward.
OPS = ("patch_embed", "sr_attention", "mix_ffn", "layer_norm", "decode_head", "upsample_argmax")
# The arguments with a batch dimension, by name; all others are weights and numbers.
BATCHED = ("x", "feature_map", "feature_maps", "logits")
# An op begins a stage, or comes after the last.
_STAGE_BEGINS = "patch_embed"
_AFTER_STAGES = {"decode_head": "head", "upsample_argmax": "labels"}


@dataclass(frozen=True)
class CountedCall(OpCall):
    """A call of an op, and how a forward makes it."""

    stage: str  # "1", "2", ... of the encoder, "head" or "labels"
    count: int  # how often a forward makes such a call

    def reference(self) -> Iterator[torch.Tensor]:
        """The eager twin's result in float64, image by image: scores of a batch are large."""
        for image in self.images():
            yield image.wide().bind(registry.EAGER[self.op])()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CountedCall:
        """The call with `change` applied to each tensor."""
        return self._replace({n: _map(v, change) for n, v in self.arguments.items()})

    def wide(self) -> CountedCall:
        """The call in float64."""
        return self.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def images(self) -> Iterator[CountedCall]:
        """The call on each image of the batch alone."""
        for index in range(self.batch):
            image = slice(index, index + 1)
            yield self._replace(
                {
                    name: _map(value, operator.itemgetter(image)) if name in BATCHED else value
                    for name, value in self.arguments.items()
                }
            )

    @property
    def device(self) -> torch.device:
        return self._data.device

    @property
    def batch(self) -> int:
        return self._data.shape[0]

    @property
    def _data(self) -> torch.Tensor:
        return tensors(next(self.arguments[name] for name in BATCHED if name in self.arguments))[0]

    def _replace(self, arguments: dict[str, Any]) -> CountedCall:
        return dataclasses.replace(self, arguments=arguments)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in an argument: itself, what a list holds, or none."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for item in value if isinstance(item, torch.Tensor)] if _is_list(value) else []


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _map(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return [_map(item, change) for item in value] if _is_list(value) else value


class _Counter:
    """Counts the calls of a forward by stage and kind."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, str], CountedCall] = {}
        self._stage = 0

    def note(self, call: OpCall) -> None:
        self._stage += call.op == _STAGE_BEGINS
        stage = _AFTER_STAGES.get(call.op, str(self._stage))
        seen = self.calls.get((stage, call.key()))
        if seen is None:
            seen = CountedCall(call.op, call.arguments, stage, count=0)
        self.calls[stage, call.key()] = dataclasses.replace(seen, count=seen.count + 1)


def record(model: torch.nn.Module, pixels: torch.Tensor) -> list[CountedCall]:
    """The calls of a forward of `model` to the label map of `pixels`, in order of first sight.

    What an op's `supports` declines runs without the op, and is no call: `missing` tells.
    """
    with torch.no_grad():
        model(pixels)  # folds the weights
        counter = _Counter()
        # On a CPU the ops would call their twins past torch's dispatcher.
        with (
            mock.patch.object(dispatch, "_device_reason", return_value=None),
            fastseg.backend("auto"),
            OpRecorder(counter.note, run=registry.EAGER),
        ):
            fastseg.kernels.upsample_argmax(model(pixels).logits, pixels.shape[2:])
    return list(counter.calls.values())


def missing(calls: list[CountedCall]) -> dict[str, str]:
    """Why an op in OPS is not among `calls`: a reason by op."""
    reasons = {}
    for op in OPS:
        if op not in registry.FUSED:
            reasons[op] = "it is no op of torch.ops.fastseg"
        elif all(call.op != op for call in calls):
            declined = [why for name, why in fastseg.kernels.fallbacks() if name == op]
            reasons[op] = "; ".join(declined) or "the model does not call it"
    return reasons


def build_model(variant: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """`variant` ("b0" to "b5") with 150 classes and weights that keep activations of order one."""
    model = fastseg.from_preset(f"segformer_{variant}", num_classes=CLASSES).eval()
    draw_weights(model)
    return model.to(device, dtype)


def build_pixels(
    size: tuple[int, int], batch: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Noise (batch, 3, H, W)."""
    return draw_pixels(size, batch).to(device, dtype)


def provider(name: str, call: CountedCall) -> Callable[..., torch.Tensor]:
    """What computes `call`: "eager", "compiled" or "kernels".

    Raises:
        SkippedCase: there is no such thing for this device.
    """
    if name == "eager":
        return registry.EAGER[call.op]
    if name == "compiled":
        # One graph for these very shapes; beyond a few in a process, dynamo runs eagerly.
        torch._dynamo.reset()
        return torch.compile(registry.EAGER[call.op], dynamic=False)
    if call.device.type != "cuda":
        raise SkippedCase("kernels run on a GPU")
    return registry.FUSED[call.op]


def gate(call: CountedCall, eager: torch.Tensor) -> Gate:
    """What a result of `call` must pass; `eager` is that of the eager twin.

    The reference is the twin in float64, on the inputs as they are rounded. In half precision a
    result may be 1.25 times as wrong as the twin's.
    """
    if call.op == "upsample_argmax":
        return _label_map_gate(call)
    reference = list(call.reference())
    power = sum(image.square().sum().item() for image in reference)

    def error(result: torch.Tensor) -> float:
        if result.shape != eager.shape or result.dtype != eager.dtype:
            return math.inf
        parts = zip(result.split(1), reference, strict=True)
        return math.sqrt(sum((a.double() - b).square().sum().item() for a, b in parts) / power)

    measure = "relative RMS error against the eager twin in float64"
    if eager.dtype == torch.float32:
        return Gate(measure, FLOAT32_BOUND, error)
    return Gate(measure, HALF_BOUND * error(eager), error)


def _label_map_gate(call: CountedCall) -> Gate:
    """`gates.labels_gate`, image by image; logits of any dtype are blended in float32."""
    size = (call.arguments["height"], call.arguments["width"])
    logits = call.arguments["logits"].split(1)
    first = labels_gate(logits[0].float(), size)

    def error(labels: torch.Tensor) -> float:
        if labels.shape != (len(logits), *size) or labels.dtype != call.arguments["dtype"]:
            return math.inf
        parts = zip(logits, labels.long().split(1), strict=True)
        return max(labels_gate(image.float(), size).error(part) for image, part in parts)

    return Gate(first.measure, first.bound, error)

"""A folded model as a `torch.export` program: plain PyTorch operators, readable without fastseg."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseg import kernels
from fastseg.kernels.blocks.tokens import tokens_to_map
from fastseg.kernels.core.weights import Weights

from .folded import FoldedModel, FoldedStage

TWO_TOKENS = 2  # a traced grid of one token a side would be bound to it


class FoldedProgram(nn.Module):
    """Module that runs a model of stages; its folded tensors are buffers.

    Args:
        folded: a `FoldedStages`.
        labels, label_dtype: as of `fastseg.export`.
    """

    def __init__(
        self, folded: Any, labels: bool | tuple[int, int], label_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_Stage(stage) for stage in folded.stages)
        self.head = None if folded.head is None else _Weights(folded.head)
        self.classifier = None if folded.classifier is None else _copy(folded.classifier)
        self.upsamples_probabilities = folded.upsamples_probabilities
        self.labels = labels
        self.label_dtype = label_dtype

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Pixels (B, C, H, W) to logits, to labels, or to the maps of all stages."""
        feature_map = pixel_values
        maps = []
        for stage in self.stages:
            feature_map = stage(feature_map)
            maps.append(feature_map)
        if self.classifier is not None:
            logits: torch.Tensor = self.classifier(maps[-1].mean(dim=(2, 3)))
            return logits
        if self.head is None:
            return tuple(maps)
        logits = kernels.decode_head(maps, self.head())
        if self.labels is False:
            return logits.contiguous()
        size = pixel_values.shape[2:] if self.labels is True else self.labels
        if logits.shape[1] > 1:
            if self.upsamples_probabilities:
                logits = logits.softmax(1)
            return kernels.upsample_argmax(logits, size, self.label_dtype)
        resized = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return (resized[:, 0] > 0).to(self.label_dtype)


class _Stage(nn.Module):
    def __init__(self, stage: FoldedStage) -> None:
        super().__init__()
        self.embed = _Weights(stage.embed)
        self.attentions = nn.ModuleList(_Weights(layer.attention) for layer in stage.layers)
        self.ffns = nn.ModuleList(_Weights(layer.mix_ffn) for layer in stage.layers)
        self.norm = _copy(stage.norm)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        tokens, height, width = kernels.patch_embed(feature_map, self.embed())
        for attention, ffn in zip(self.attentions, self.ffns, strict=True):
            tokens = kernels.sr_attention(tokens, height, width, attention())
            tokens = kernels.mix_ffn(tokens, height, width, ffn())
        return tokens_to_map(self.norm(tokens), height, width)


def _copy(layer: nn.Module) -> nn.Module:
    """`layer` on the CPU, of its own and frozen."""
    return copy.deepcopy(layer).cpu().requires_grad_(False)


class _Weights(nn.Module):
    """Weights of an op: tensors as buffers, the rest as they are."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        arguments = weights.arguments()
        for name in weights.derived:  # for kernels in half precision
            del arguments[name]
        self._weights = weights.of(**arguments)
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                self._add(name, value)
            elif isinstance(value, tuple):
                for index, tensor in enumerate(value):
                    self._add(f"{name}_{index}", tensor)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        # A copy: tensors of the model that are taken as they are must not be shared with it. And
        # contiguous, lest torch.export warns that it has only a part of a tensor.
        own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        self.register_buffer(name, own)

    def forward(self) -> Any:
        # In the order of the weights' tensors.
        buffers: Iterator[Any] = iter(self._buffers.values())
        return self._weights.map(lambda _: next(buffers))


def trace(
    folded: FoldedModel,
    *,
    batch: int | None,
    height: int | None,
    width: int | None,
    labels: bool | tuple[int, int],
    label_dtype: torch.dtype,
) -> torch.export.ExportedProgram:
    """The program; arguments as those of `fastseg.export`."""
    smallest = folded.smallest_side(reduced=TWO_TOKENS)
    examples = (2, 2 * smallest, 3 * smallest)
    dynamic: dict[int, Any] = {}
    if batch is None:
        dynamic[0] = torch.export.Dim("batch", min=1)  # one for all inputs
    for axis, size in ((2, height), (3, width)):
        if size is None:
            dynamic[axis] = torch.export.Dim.DYNAMIC(min=smallest)
    rows, *sides = (
        example if size is None else size
        for size, example in zip((batch, height, width), examples, strict=True)
    )
    inputs = {name: torch.zeros(rows, folded.num_channels, *sides) for name in folded.inputs}
    module = folded.program(labels, label_dtype).eval()
    with torch.no_grad(), kernels.backend("eager"):
        return torch.export.export(
            module, tuple(inputs.values()), dynamic_shapes=dict.fromkeys(inputs, dynamic)
        )

"""What exporters ask of a model and of its plans.

They read nothing but these, so whatever has them can be exported: a model that runs on fastseg's
ops by the folded arguments of these (`stages.py`), any other by writing itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastseg.folding.state import Plan
from fastseg.kernels import (
    DecodeHeadWeights,
    MixFfnWeights,
    PatchEmbedWeights,
    SrAttentionWeights,
)

from .onnx_graph import OnnxGraph, Size, Values


class FoldedModel(ABC):
    """A model that exporters can write.

    Attributes:
        inputs: names of the inputs, each float32 (B, num_channels, H, W).
        output: the name of the result in what the model returns.
        side_multiple: 0, or what the sides of images are multiples of, which then are squares of
            one size, as the model is another function at each.
    """

    inputs: Sequence[str] = ("pixel_values",)
    output = "logits"
    side_multiple: int = 0

    @property
    @abstractmethod
    def num_channels(self) -> int:
        """Channels of the inputs."""

    @property
    @abstractmethod
    def like(self) -> torch.Tensor:
        """A weight, of whose dtype and on whose device all are."""

    @property
    def num_classes(self) -> int:
        """Classes of its logits, of which label maps can be made; 0 where there are none."""
        return 0

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the inputs; None where any will do."""
        return None

    @property
    def properties(self) -> dict[str, str]:
        """Strings that go along with an ONNX file, by name."""
        return {}

    def smallest_side(self, reduced: int = 1) -> int:
        """The fewest pixels along a side that give every reduced grid `reduced` tokens there."""
        return 1

    def results(
        self, model: Any, inputs: Sequence[torch.Tensor], for_labels: bool = False
    ) -> list[torch.Tensor]:
        """What `model`, which this was folded from, gives for `inputs`, as the file should.

        `for_labels` what is resized to label maps.
        """
        output = model(*inputs)
        if isinstance(output, tuple):
            output = output[0]
        return [getattr(output, self.output, output)]

    @abstractmethod
    def program(self, labels: bool | tuple[int, int], label_dtype: torch.dtype) -> nn.Module:
        """A module that takes the inputs, of plain operators, with tensors of its own on the CPU.

        Args:
            labels, label_dtype: as of `fastseg.export`.
        """

    @abstractmethod
    def write(
        self,
        graph: OnnxGraph,
        shape: Sequence[Size],
        labels: bool | tuple[int, int],
        label_dtype: torch.dtype,
    ) -> Values:
        """Append its nodes to `graph`, and return the outputs.

        Args:
            shape: of the inputs.
            labels, label_dtype: as of `fastseg.export`.
        """


@dataclass(frozen=True)
class FoldedLayer:
    """Weights of `kernels.sr_attention` and `kernels.mix_ffn`."""

    attention: SrAttentionWeights
    mix_ffn: MixFfnWeights


@dataclass(frozen=True)
class FoldedStage:
    """Weights of `kernels.patch_embed`, the layers, and the LayerNorm after them."""

    embed: PatchEmbedWeights
    layers: tuple[FoldedLayer, ...]
    norm: nn.LayerNorm

    @property
    def channels(self) -> int:
        return self.embed.weight.shape[0]

    @property
    def sr_ratio(self) -> int:
        """The largest spatial reduction of its layers."""
        return max((layer.attention.sr_ratio for layer in self.layers), default=1)


class ExportedPlan(Plan):
    """Base of the plan of a part that exporters can write."""

    def folded_model(self, model: nn.Module) -> FoldedModel | None:
        """The whole `model`, where a part's plan knows it whole; else it is stages and a head."""
        return None

    def folded_stages(self) -> tuple[FoldedStage, ...]:
        """The stages, where the part is an encoder; none of others."""
        return ()

    def folded_head(self) -> DecodeHeadWeights | None:
        """Weights of its decode head, where its logits are the result; of others None."""
        return None

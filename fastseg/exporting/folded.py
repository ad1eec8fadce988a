"""What of a model goes into an exported graph: the arguments of its ops, folded.

Exporters read nothing but these, so whatever runs on fastseg's ops can be exported: a model needs a
way to its `FoldedModel`, and no class of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastseg.folding.cache import Packed
from fastseg.folding.conditions import structure_reason
from fastseg.kernels.embed.op import output_size
from fastseg.models.segformer.modeling import (
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)


@dataclass(frozen=True)
class FoldedLayer:
    """Keyword arguments of `kernels.sr_attention` and `kernels.mix_ffn`."""

    attention: Packed
    mix_ffn: Packed


@dataclass(frozen=True)
class FoldedStage:
    """Keyword arguments of `kernels.patch_embed`, the layers, and the LayerNorm after them."""

    embed: Packed
    layers: tuple[FoldedLayer, ...]
    norm: Packed  # weight, bias, eps

    @property
    def channels(self) -> int:
        return int(self.embed["weight"].shape[0])

    @property
    def sr_ratio(self) -> int:
        """The largest spatial reduction of its layers."""
        return max((layer.attention["sr_ratio"] for layer in self.layers), default=1)

    def grid_side(self, side: int) -> int:
        """Tokens along a side of a map that has `side` positions there."""
        kernel = self.embed["weight"].shape[2]
        return output_size(side, kernel, self.embed["stride"], self.embed["padding"])


@dataclass(frozen=True)
class FoldedModel:
    """A model of four stages, or of any number, and what comes after them.

    Args:
        head: arguments of `kernels.decode_head` but for the maps: the result is logits.
        classifier: weight (K, C) and bias (K,) on the mean of the last stage's tokens.
            Without both, the result is the maps of all stages.
        id2label: names of the classes.
    """

    stages: tuple[FoldedStage, ...]
    head: Packed | None = None
    classifier: Packed | None = None
    id2label: Mapping[int, str] = field(default_factory=dict)

    @property
    def num_channels(self) -> int:
        """Of the input."""
        return int(self.stages[0].embed["weight"].shape[1])

    @property
    def num_labels(self) -> int:
        """Classes of the logits; 0 where the result is maps."""
        if self.head is not None:
            return int(self.head["classifier_weight"].shape[0])
        return 0 if self.classifier is None else int(self.classifier["weight"].shape[0])

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.stages[0].embed["weight"].dtype
        return dtype

    def grid_sides(self, side: int) -> list[int]:
        """Tokens along a side of an input of `side` pixels, by stage."""
        sides = []
        for stage in self.stages:
            side = stage.grid_side(side)
            sides.append(side)
        return sides

    def smallest_side(self, reduced: int = 1) -> int:
        """The fewest pixels along a side that give every reduced grid `reduced` tokens there."""
        return next(
            side
            for side in itertools.count(1)
            if all(
                grid >= reduced * stage.sr_ratio
                for grid, stage in zip(self.grid_sides(side), self.stages, strict=True)
            )
        )


def fold_model(model: nn.Module) -> FoldedModel:
    """The folded arguments of all ops of `model`, in eval mode.

    Raises:
        TypeError: not a model of this library.
        ValueError: it has parts that folding would leave out: hooks, replaced layers.
    """
    kinds = (SegformerForSemanticSegmentation, SegformerForImageClassification, SegformerModel)
    if not isinstance(model, kinds):
        raise TypeError(
            "model: expected a model of fastseg, or one that fastseg.accelerate has taken, got a "
            f"{type(model).__module__}.{type(model).__name__}; call fastseg.accelerate(model) first"
        )
    reason = structure_reason(model)
    if reason is not None:
        raise ValueError(f"model: expected parts that can be folded, but {reason}")
    own: Any = model
    encoder: Any = model._encoder
    with torch.no_grad():
        stages = tuple(
            FoldedStage(
                embed.packed(),
                tuple(
                    FoldedLayer(
                        layer.packed()["attention"],
                        {"activation": layer.mlp.hidden_act, **layer.packed()["mix_ffn"]},
                    )
                    for layer in layers
                ),
                {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps},
            )
            for embed, layers, norm in zip(
                encoder.patch_embeddings, encoder.block, encoder.layer_norm, strict=True
            )
        )
        names = dict(own.config.id2label)
        if isinstance(model, SegformerForSemanticSegmentation):
            return FoldedModel(stages, head=own.decode_head.packed(), id2label=names)
        if isinstance(model, SegformerForImageClassification):
            classifier = {"weight": own.classifier.weight, "bias": own.classifier.bias}
            return FoldedModel(stages, classifier=classifier, id2label=names)
    return FoldedModel(stages)

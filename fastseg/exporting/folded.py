"""The part of a model that goes into an exported graph: the folded arguments of its ops.

Exporters read nothing but these, so whatever runs on fastseg's ops can be exported. They come from
the plans of its encoder and decode head; a model of a family of fastseg adds what else it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from fastseg.folding.state import Plan
from fastseg.folding.swap import Accelerated
from fastseg.kernels import (
    DecodeHeadWeights,
    MixFfnWeights,
    PatchEmbedWeights,
    SrAttentionWeights,
)


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


@dataclass(frozen=True)
class FoldedModel:
    """A model of four stages, or of any number, and what comes after them.

    Args:
        head: of `kernels.decode_head`: the result is logits.
        classifier: of the mean of the last stage's tokens.
            Without both, the result is the maps of all stages.
        id2label: names of the classes.
        upsamples_probabilities: label maps are of upsampled probabilities and not of logits.
        side_multiple: 0, or what the sides of images are multiples of, which then are squares of
            one size, as the model is another function at each.
    """

    stages: tuple[FoldedStage, ...]
    head: DecodeHeadWeights | None = None
    classifier: nn.Linear | None = None
    id2label: Mapping[int, str] = field(default_factory=dict)
    upsamples_probabilities: bool = False
    side_multiple: int = 0

    @property
    def num_channels(self) -> int:
        """Channels of the input."""
        return int(self.stages[0].embed.weight.shape[1])

    @property
    def num_labels(self) -> int:
        """Classes of the logits; 0 where the result is maps."""
        if self.head is not None:
            assert self.head.classifier_weight is not None
            return self.head.classifier_weight.shape[0]
        return 0 if self.classifier is None else self.classifier.out_features

    @property
    def gives_maps(self) -> bool:
        """Return whether it is an encoder, whose result is the maps of all stages."""
        return self.head is None and self.classifier is None

    @property
    def dtype(self) -> torch.dtype:
        return self.stages[0].embed.weight.dtype

    def grid_sides(self, side: int) -> list[int]:
        """Tokens along a side of an input of `side` pixels, by stage."""
        sides = []
        for stage in self.stages:
            side = stage.embed.output_size(side)
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


class ExportedPlan(Plan):
    """Base of the plan of a part that exporters can write."""

    def folded_stages(self) -> tuple[FoldedStage, ...]:
        """The stages, where the part is an encoder; none of others."""
        return ()

    def folded_head(self) -> DecodeHeadWeights | None:
        """Weights of its decode head, where its logits are the result; of others None."""
        return None


@torch.no_grad()
def fold_accelerated(
    model: nn.Module, without_head: Mapping[str, Any] | None = None
) -> FoldedModel | None:
    """The folded arguments of an encoder and decode head with plans; None where there is none.

    What the model does around them is not in it.

    Args:
        without_head: fields of `FoldedModel` beside the stages of a model without a decode head;
            None where that is an error.

    Raises:
        ValueError: parts of it run on the host's own code, or it has no head that can be exported.
    """
    parts = {n: m for n, m in model.named_modules() if isinstance(m, Accelerated)}
    if not parts:
        return None
    stages: list[FoldedStage] = []
    heads: list[DecodeHeadWeights | None] = []
    names: list[str] = []
    for name, part in parts.items():
        whole = part.fastseg_reason()
        plan = cast(ExportedPlan, part.fastseg_state().plan())
        reasons = [f"{inner}: {reason}" for inner, reason in plan.reasons()]
        for reason in [whole] if whole is not None else reasons:
            raise ValueError(f"model: expected all of {name or 'it'} folded, but {reason}")
        of_part = plan.folded_stages()
        stages += of_part
        if not of_part:
            heads.append(plan.folded_head())
            names.append(part._fastseg_host.name)
    if not heads and without_head is not None:
        return FoldedModel(tuple(stages), **without_head)
    head = heads[0] if len(heads) == 1 else None
    if head is None or not stages:
        raise ValueError(
            "model: expected an encoder and one decode head whose logits are the result, as of "
            f"transformers or NVlabs, got the heads: {', '.join(names) or 'none'}"
        )
    id2label: Any = getattr(getattr(model, "config", None), "id2label", None)
    return FoldedModel(tuple(stages), head=head, id2label=dict(id2label or {}))

"""Accelerated models of other libraries as a `FoldedModel`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastseg.folding.swap import Accelerated
from fastseg.models.segformer.encoder_plan import EncoderPlan, StagePlan
from fastseg.models.segformer.head_plan import HeadPlan

from .folded import FoldedLayer, FoldedModel, FoldedStage

# Of these models the head's logits are the result. Those of smp are upsampled, and mmseg's head has
# a ReLU before upsampling, which no exporter writes.
_HEADS = ("transformers", "NVlabs")


def fold_accelerated(model: nn.Module) -> FoldedModel | None:
    """The folded arguments of an accelerated encoder and decode head; None where there is none.

    What the model does around them is not in it.

    Raises:
        ValueError: parts of it run on the host's own code, or it has no head that can be exported.
    """
    parts = {n: m for n, m in model.named_modules() if isinstance(m, Accelerated)}
    if not parts:
        return None
    stages: list[StagePlan] = []
    heads: list[HeadPlan] = []
    with torch.no_grad():
        for name, part in parts.items():
            whole = part.fastseg_reason()
            plan = part.fastseg_plan()
            reasons = [f"{inner}: {reason}" for inner, reason in plan.reasons()]
            for reason in [whole] if whole is not None else reasons:
                raise ValueError(f"model: expected all of {name or 'it'} folded, but {reason}")
            if isinstance(plan, EncoderPlan):
                stages += plan.stages
            else:
                heads.append(plan)
        if len(heads) != 1 or heads[0].host.name not in _HEADS or not stages:
            found = ", ".join(head.host.name for head in heads) or "none"
            raise ValueError(
                f"model: expected an encoder and a decode head of {' or '.join(_HEADS)}, "
                f"got the heads: {found}"
            )
        (head,) = heads
        names: Any = getattr(getattr(model, "config", None), "id2label", None)
        return FoldedModel(
            tuple(_stage(stage) for stage in stages),
            head={**head.neck.packed(), **head.classifier.packed()},
            id2label=dict(names or {}),
        )


def _stage(plan: StagePlan) -> FoldedStage:
    norm: Any = plan.stage.norm
    return FoldedStage(
        plan.embed.packed(),
        tuple(FoldedLayer(layer.attention.packed(), layer.ffn.packed()) for layer in plan.layers),
        {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps},
    )

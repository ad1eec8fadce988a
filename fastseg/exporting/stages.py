"""A model of stages as exporters see it: the folded arguments of its ops.

They come from the plans of its encoder and decode head; a model of a family of fastseg adds what
else it has.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from fastseg.folding.swap import Accelerated
from fastseg.kernels import DecodeHeadWeights

from .folded import ExportedPlan, FoldedModel, FoldedStage
from .onnx_graph import OnnxGraph, Size, Values
from .onnx_stages import OnnxStages
from .torch_program import FoldedProgram


@dataclass(frozen=True)
class FoldedStages(FoldedModel):
    """A model of four stages, or of any number, and what comes after them.

    Args:
        head: of `kernels.decode_head`: the result is logits.
        classifier: of the mean of the last stage's tokens.
            Without both, the result is the maps of all stages.
        id2label: names of the classes.
        upsamples_probabilities: label maps are of upsampled probabilities and not of logits.
        side_multiple: as of `FoldedModel`.
    """

    stages: tuple[FoldedStage, ...]
    head: DecodeHeadWeights | None = None
    classifier: nn.Linear | None = None
    id2label: Mapping[int, str] = field(default_factory=dict)
    upsamples_probabilities: bool = False
    side_multiple: int = 0

    @property
    def num_channels(self) -> int:
        return int(self.stages[0].embed.weight.shape[1])

    @property
    def like(self) -> torch.Tensor:
        return self.stages[0].embed.weight

    @property
    def num_classes(self) -> int:
        if self.head is None:
            return 0
        assert self.head.classifier_weight is not None
        return self.head.classifier_weight.shape[0]

    @property
    def properties(self) -> dict[str, str]:
        names = {int(number): name for number, name in self.id2label.items()}
        return {"id2label": json.dumps(names)} if names else {}

    def grid_sides(self, side: int) -> list[int]:
        """Tokens along a side of an input of `side` pixels, by stage."""
        sides = []
        for stage in self.stages:
            side = stage.embed.output_size(side)
            sides.append(side)
        return sides

    def smallest_side(self, reduced: int = 1) -> int:
        return next(
            side
            for side in itertools.count(1)
            if all(
                grid >= reduced * stage.sr_ratio
                for grid, stage in zip(self.grid_sides(side), self.stages, strict=True)
            )
        )

    def results(
        self, model: Any, inputs: Sequence[torch.Tensor], for_labels: bool = False
    ) -> list[torch.Tensor]:
        if self.head is None and self.classifier is None:
            return list(model.encoder(*inputs)[0])
        if for_labels and self.upsamples_probabilities and self.num_classes > 1:
            return [super().results(model, inputs)[0].softmax(dim=1)]
        return super().results(model, inputs)

    def program(self, labels: bool | tuple[int, int], label_dtype: torch.dtype) -> FoldedProgram:
        return FoldedProgram(self, labels, label_dtype)

    def write(
        self,
        graph: OnnxGraph,
        shape: Sequence[Size],
        labels: bool | tuple[int, int],
        label_dtype: torch.dtype,
    ) -> Values:
        batch, _, height, width = shape
        image = self.inputs[0]
        network = OnnxStages(graph, image)
        maps = network.encode(self.stages)
        if self.classifier is not None:
            graph.output(network.classify(self.classifier), "logits")
            return {"logits": (np.float32, (batch, self.classifier.out_features))}
        grids = list(zip(self._grid(height), self._grid(width), strict=True))
        if self.head is None:
            outputs = {}
            for index, stage in enumerate(self.stages):
                name = f"feature_map_{index + 1}"
                graph.output(graph.op("Identity", maps[index]), name)
                outputs[name] = (np.float32, (batch, stage.channels, *grids[index]))
            return outputs
        logits = network.decode(maps, self.head)
        if labels is False:
            graph.output(logits, "logits")
            return {"logits": (np.float32, (batch, self.num_classes, *grids[0]))}
        size = None if labels is True else labels
        scores = graph.widened(logits)
        if self.upsamples_probabilities and self.num_classes > 1:
            scores = network.probabilities(scores)
        network.labels(scores, size, label_dtype, self.num_classes)
        kind = np.uint8 if label_dtype == torch.uint8 else np.int64
        return {"labels": (kind, (batch, *(size or (height, width))))}

    def _grid(self, side: Size) -> list[Size]:
        """Tokens along a side, by stage: numbers, or names where the side has any size."""
        if isinstance(side, str):
            return [f"{side}_{index + 1}" for index in range(len(self.stages))]
        return list(self.grid_sides(side))


@torch.no_grad()
def fold_accelerated(
    model: nn.Module, without_head: Mapping[str, Any] | None = None
) -> FoldedModel | None:
    """What to export of a model whose parts have plans; None where there is none.

    What the model does around them is not in it.

    Args:
        without_head: fields of `FoldedStages` beside the stages of a model without a decode head;
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
    plans: list[ExportedPlan] = []
    for name, part in parts.items():
        whole = part.fastseg_reason()
        plan = cast(ExportedPlan, part.fastseg_state().plan())
        reasons = [f"{inner}: {reason}" for inner, reason in plan.reasons()]
        for reason in [whole] if whole is not None else reasons:
            raise ValueError(f"model: expected all of {name or 'it'} folded, but {reason}")
        plans.append(plan)
        of_part = plan.folded_stages()
        stages += of_part
        if not of_part:
            heads.append(plan.folded_head())
            names.append(part._fastseg_host.name)
    for plan in plans:
        if (found := plan.folded_model(model)) is not None:
            return found
    if not heads and without_head is not None:
        return FoldedStages(tuple(stages), **without_head)
    head = heads[0] if len(heads) == 1 else None
    if head is None or not stages:
        raise ValueError(
            "model: expected an encoder and one decode head whose logits are the result, as of "
            f"transformers or NVlabs, got the heads: {', '.join(names) or 'none'}"
        )
    id2label: Any = getattr(getattr(model, "config", None), "id2label", None)
    return FoldedStages(tuple(stages), head=head, id2label=dict(id2label or {}))

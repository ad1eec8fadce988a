"""What the tables of all formats give: a file's tensors under the names of fastseg's modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

BASE = "segformer."
ENCODER = BASE + "encoder."
# The top-level modules that a class of the family may have besides the encoder.
HEADS = frozenset(("decode_head", "classifier"))
# Heads that other libraries train beside the real one; no class of ours has them.
TRAINING_HEADS = frozenset(("auxiliary_head", "classification_head"))
# A prefix in a file -> prefixes in the model, among which the tensor is split evenly along its
# first dimension. No prefixes: a tensor that its own network does not use.
Table = Mapping[str, Sequence[str]]


@dataclass
class Translation:
    """A checkpoint in fastseg's terms.

    tensors: by the names in the file; a tensor that holds several of ours is several entries.
    names: from those names to those in a model with a head. What no table knows keeps its name.
    fields: of the configuration, as far as the format says them.
    foreign_head: why no model of fastseg can hold the decode head in the file; None where one can.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    foreign_head: str | None = None

    def add(self, name: str, tensor: torch.Tensor, targets: Sequence[str]) -> None:
        """Take `tensor`, called `name` in the file, as the tensors `targets` of a model."""
        if not targets:
            return
        if len(targets) == 1:
            self.tensors[name] = tensor
            self.names[name] = targets[0]
            return
        for target, part in zip(targets, tensor.tensor_split(len(targets)), strict=True):
            label = f"{name} ({target.rpartition('.')[0].rpartition('.')[2]})"
            self.tensors[label] = part
            self.names[label] = target

    @property
    def class_name(self) -> str:
        """The model class that the file was saved from."""
        parts = {name.partition(".")[0] for name in self.names.values()}
        if "decode_head" in parts:
            return "SegformerForSemanticSegmentation"
        if "classifier" in parts:
            return "SegformerForImageClassification"
        return "SegformerModel"


def look_up(table: Table, name: str) -> list[str] | None:
    """The names that `table` gives for `name`; None where it has no prefix of it."""
    for prefix, targets in table.items():
        if name.startswith(prefix):
            return [target + name.removeprefix(prefix) for target in targets]
    return None

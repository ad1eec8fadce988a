"""A file's tensors under the names of a family's modules, and what a family tells for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .layouts import Layout
from .report import CheckpointError

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
    left_out: names in the file that are outside of the model, such as a loss's.
    notes: remarks for the user.
    averaged: whether what was taken has the name of an average of the weights.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    foreign_head: str | None = None
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    averaged: bool = False

    def add(self, name: str, tensor: torch.Tensor, targets: Sequence[str]) -> None:
        """Take `tensor`, called `name` in the file, as the tensors `targets` of a model."""
        if not targets:
            return
        if len(targets) > 1 and (tensor.ndim == 0 or tensor.shape[0] % len(targets)):
            targets = [name]  # a counter of a profiler, or something else that is not the layer's
        if len(targets) == 1:
            self.tensors[name] = tensor
            self.names[name] = targets[0]
            return
        for target, part in zip(targets, tensor.tensor_split(len(targets)), strict=True):
            label = f"{name} ({target.rpartition('.')[0].rpartition('.')[2]})"
            self.tensors[label] = part
            self.names[label] = target


def as_it_is(
    tensors: Mapping[str, torch.Tensor], depths: Sequence[int] | None, average: bool
) -> Translation:
    """Tensors that have the names of the model."""
    return Translation(dict(tensors), {name: name for name in tensors})


def unknown(*arguments: Any) -> Any:
    """Raise: such files tell nothing of this family."""
    raise CheckpointError("expected a config.json with a model_type beside it")


@dataclass(frozen=True)
class CheckpointNames:
    """Names that checkpoints of a family may have: a model class has it as `checkpoint_names`.

    base: the prefix of the encoder's tensors in models with a head.
    heads: the top-level modules that a class of the family may have besides the encoder.
    training_heads: heads that other libraries train beside the real one; no class of ours has them.
    segmentation_head: the module that a file's `foreign_head` would stand for.
    classifiers: the layers that have a row for each class.
    translate: (a file's tensors, blocks in each stage or None, whether an average of the weights
        is wanted where there is one) -> these in the family's terms.
    class_name: names in the model -> the model class that the file was saved from.
    infer_fields: (tensors by their names in the model, known fields) -> fields of the configuration
        that shapes tell.
    read_preset: (config.json, task.json or None) of KerasHub -> fields of the configuration.
    read_converter: image_converter.json of KerasHub -> options of the family's image processor.
    read_smp: config.json of segmentation_models_pytorch -> fields of the configuration.
    fit: (names in the model by those in the file, the file's tensors, the configuration) ->
        remarks, after it has resized tensors in place where the configuration asks for that.
    read_groups: (names of tensors, names of groups, the library that the caller says it is of or
        None, fields that a configuration with it has told) of an HDF5 file -> fields of the
        configuration that these names tell.
    other_model_types: what the configuration has as `other_model_types`.
    layouts: how other libraries store its models, by short names of these.

    Those that read a file raise CheckpointError where it is of no model of the family. Defaults are
    those of a family whose files have its own names and a config.json.
    """

    base: str = ""
    heads: frozenset[str] = frozenset()
    training_heads: frozenset[str] = frozenset()
    segmentation_head: str = ""
    classifiers: frozenset[str] = frozenset()
    translate: Callable[[Mapping[str, torch.Tensor], Sequence[int] | None, bool], Translation] = (
        as_it_is
    )
    class_name: Callable[[Iterable[str]], str] = lambda names: ""
    infer_fields: Callable[[Mapping[str, torch.Tensor], Mapping[str, Any]], dict[str, Any]] = (
        unknown
    )
    read_preset: Callable[[Mapping[str, Any], Mapping[str, Any] | None], dict[str, Any]] = unknown
    read_converter: Callable[[Mapping[str, Any]], dict[str, Any]] = unknown
    read_smp: Callable[[Mapping[str, Any]], dict[str, Any]] = unknown
    fit: Callable[[Mapping[str, str], dict[str, torch.Tensor], Any], tuple[str, ...]] = (
        lambda names, tensors, config: ()
    )
    read_groups: Callable[
        [Iterable[str], Iterable[str], str | None, Mapping[str, Any]], dict[str, Any]
    ] = lambda names, groups, source, fields: {}
    other_model_types: tuple[str, ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)


def translate_name(table: Table, name: str) -> list[str] | None:
    """The names that `table` gives for `name`; None where it has no prefix of it."""
    for prefix, targets in table.items():
        if name.startswith(prefix):
            return [target + name.removeprefix(prefix) for target in targets]
    return None


def original_name(table: Table, name: str) -> tuple[str, int] | None:
    """What `table` gives `name` for: the name in a file, and its place among the names for that.

    None where no prefix in the model is of `name`.
    """
    for prefix, targets in table.items():
        for place, target in enumerate(targets):
            if name.startswith(target):
                return prefix + name.removeprefix(target), place
    return None

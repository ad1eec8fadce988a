"""Matching a file's tensors to a model's, all of it compared before anything is copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .files import Tensors
from .report import LoadReport, Mismatch, section
from .translation import CheckpointNames

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Assignment:
    """Origin of each tensor of a model: a file's tensor, or new values."""

    copied: dict[str, str] = field(default_factory=dict)  # name in the model -> name in the file
    new: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)
    report: LoadReport = field(default_factory=LoadReport)
    errors: list[str] = field(default_factory=list)


def match_tensors(
    model: nn.Module,
    names: Mapping[str, str],
    tensors: Tensors,
    family: CheckpointNames,
    *,
    new_classifier: bool,
    new_mismatched: bool,
    strict: bool,
) -> Assignment:
    """Compare a file with a model on the meta device.

    Args:
        names: from names in the file to names in the model.
        new_classifier: a classifier that is missing or of another shape is initialised.
        new_mismatched: so is every tensor of another shape.
        strict: what the model does not have, or the file, is an error; else the one is left out and
            the other initialised.
    """

    def is_classifier(name: str) -> bool:
        return name.rpartition(".")[0] in family.classifiers

    expected = model.state_dict()
    parts = {name.partition(".")[0] for name in names.values()}
    other_heads = family.heads - {name.partition(".")[0] for name, _ in model.named_children()}
    absent_heads = family.heads - parts
    assignment = Assignment()
    missing, unexpected, twice, unused, mismatched, misfits = [], [], [], [], [], []

    for file_name, name in names.items():
        if name in expected:
            if name in assignment.copied:
                twice.append(f"{file_name}: the same tensor as {assignment.copied[name]}")
            assignment.copied[name] = file_name
        elif not strict or name.partition(".")[0] in other_heads | family.training_heads:
            unused.append(file_name)
        else:
            unexpected.append(f"{file_name}: got {_describe(tensors[file_name])}")

    for name, target in expected.items():
        if name not in assignment.copied:
            if name.endswith(".num_batches_tracked"):  # absent in files of old PyTorch versions
                assignment.counters.append(name)
            elif (
                not strict
                or name.partition(".")[0] in absent_heads
                or (new_classifier and is_classifier(name))
            ):
                assignment.new.append(name)
            else:
                missing.append(f"{name}: expected {_describe(target)}")
            continue
        tensor = tensors[assignment.copied[name]]
        # An int8 or fp8 tensor holds codes of its numbers, not the numbers.
        same_kind = tensor.dtype in FLOATS or not target.is_floating_point()
        if tensor.shape == target.shape and same_kind:
            continue
        mismatch = Mismatch(name, _describe(target), _describe(tensor))
        if same_kind and (new_mismatched or (new_classifier and is_classifier(name))):
            mismatched.append(mismatch)
            assignment.new.append(name)
            del assignment.copied[name]
        else:
            misfits.append(mismatch)

    if not strict and not assignment.copied:
        missing.append(f"all {len(expected)} tensors: none of the file's is the model's")
    assignment.errors = [
        *section("missing", missing),
        *section("unexpected (strict=False leaves them out)", unexpected),
        *section("there twice", twice),
        *section("of another shape (ignore_mismatched_sizes=True initialises them anew)", misfits),
    ]
    assignment.report = LoadReport(
        missing=tuple(name for name in assignment.new if name not in {m.name for m in mismatched}),
        unexpected=tuple(unused),
        mismatched=tuple(mismatched),
        reinitialized=tuple(assignment.new),
    )
    return assignment


def _describe(tensor: torch.Tensor) -> str:
    kind = "" if tensor.dtype in FLOATS else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def fill(model: Any, assignment: Assignment, tensors: Tensors) -> None:
    """Put the file's tensors into `model`, emptying `tensors`, and initialise the new ones."""
    # Whole layers are initialised, as the model's constructor does it; what the file has of them
    # is copied over that.
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in assignment.new):
        module = model.get_submodule(layer)
        module.reset_parameters()
        model._init_weights(module)
    state = model.state_dict()
    for name in assignment.counters:
        state[name].zero_()
    for name, file_name in assignment.copied.items():
        state[name].copy_(tensors.pop(file_name))

"""What tests of folded weights share: runs on them, runs without, and a count of folds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastseg
from fastseg.folding.fold import Part
from fastseg.folding.swap import Accelerated


def folded(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of a forward that may fold."""
    with torch.no_grad():
        return model(pixels).logits


def plain(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What a copy gives that has folded nothing."""
    with torch.no_grad(), fastseg.plain_path():
        return copy.deepcopy(model)(pixels).logits


def parts_of(model: torch.nn.Module) -> list[Part]:
    """All ops of the encoder and the decode head in `model`."""
    modules = [module for module in model.modules() if isinstance(module, Accelerated)]
    return [part for module in modules for part in module.fastseg_state().plan().parts()]


def is_folded(part: Part) -> bool:
    return part._folded is not None


def count_folds(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """A list that grows by one for each op whose weights are folded."""
    folds: list[Part] = []
    original: Any = Part._checked_fold
    monkeypatch.setattr(Part, "_checked_fold", lambda self: folds.append(self) or original(self))
    return folds


def every_parameter(edit: Callable[[torch.Tensor], Any]) -> Callable[[torch.nn.Module], None]:
    """A change of a model: `edit` of each of its parameters."""

    def change(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            edit(parameter)

    return change

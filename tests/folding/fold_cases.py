"""What tests of folded weights share: runs on them, runs without, and a count of folds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastseg
from fastseg.folding.modules import FoldedModule
from tests.model_cases import tiny_model


def folded(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of a forward that may fold."""
    with torch.no_grad():
        return model(pixels).logits


def plain(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What a copy gives that has folded nothing."""
    with torch.no_grad(), fastseg.plain_path():
        return copy.deepcopy(model)(pixels).logits


def folded_modules(model: torch.nn.Module) -> list[FoldedModule]:
    return [module for module in model.modules() if isinstance(module, FoldedModule)]


def count_folds(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """A list that grows by one for each module folded."""
    folds: list[type] = []
    for module_class in {type(module) for module in folded_modules(tiny_model())}:
        original: Any = module_class.fold
        monkeypatch.setattr(
            module_class,
            "fold",
            lambda self, original=original: folds.append(type(self)) or original(self),
        )
    return folds


def every_parameter(edit: Callable[[torch.Tensor], Any]) -> Callable[[torch.nn.Module], None]:
    """A change of a model: `edit` of each of its parameters."""

    def change(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            edit(parameter)

    return change

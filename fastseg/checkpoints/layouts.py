"""Weights for other libraries: how each stores the models of a family."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .report import CheckpointWarning


@dataclass(frozen=True)
class Layout:
    """How a library stores the models of a family.

    title: the library, as people write it.
    fields: of the configuration: what it computes with, whatever the model's configuration says.
    refusal: a model -> why the library has no such network, or None.
    tensors: a model's weights -> these by the library's names.
    config: a model -> its config.json, beside model.safetensors, where the library has one; None
        for a single file of torch.save.
    content: (model, its tensors) -> what is in such a file.
    keeps_names: whether the files have a place for the names of classes.
    """

    title: str
    fields: Mapping[str, Any]
    refusal: Callable[[Any], str | None]
    tensors: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    config: Callable[[Any], dict[str, Any] | None] = lambda model: None
    content: Callable[[Any, dict[str, torch.Tensor]], dict[str, Any]] = lambda model, tensors: (
        tensors
    )
    keeps_names: bool = False

    def differences(self, config: Any) -> dict[str, tuple[Any, Any]]:
        """Fields that the library has other values of: (the model's, the library's) by name."""
        pairs = {name: (getattr(config, name), value) for name, value in self.fields.items()}
        return {name: (own, value) for name, (own, value) in pairs.items() if own != value}


def layout_for(model: Any, library: str) -> Layout:
    """The layout of `library` for a model.

    Raises:
        ValueError: there is none, or the library has no such network.
    """
    layouts = model.checkpoint_names.layouts
    if library not in layouts:
        expected = " or ".join(map(repr, layouts)) or "none for this family"
        raise ValueError(f"library: expected {expected}, got {library!r}")
    layout: Layout = layouts[library]
    if (reason := layout.refusal(model)) is not None:
        raise ValueError(f"{layout.title} has no such {type(model).__name__}: {reason}")
    return layout


def told(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences of fields in a sentence's words."""
    parts = [f"{name}={theirs!r} (not {own!r})" for name, (own, theirs) in differences.items()]
    return ", ".join(parts)


def state_dict_for(model: Any, library: str) -> dict[str, torch.Tensor]:
    """See `PreTrainedModel.state_dict_for`."""
    layout = layout_for(model, library)
    if others := layout.differences(model.config):
        warnings.warn(
            f"{layout.title} computes with {told(others)}: its results will differ a little",
            CheckpointWarning,
            stacklevel=3,  # the caller of the method
        )
    return layout.tensors(model.state_dict())

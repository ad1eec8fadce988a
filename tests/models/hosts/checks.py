"""Comparisons with the plain host, which is the reference of all these tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import fastseg
from tests.model_cases import relative_error

from .host_models import Host

FP32_BOUND = 2e-6


def errors(results: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> list[float]:
    assert [tuple(t.shape) for t in results] == [tuple(t.shape) for t in references]
    # smp's second feature map has no channels.
    pairs = zip(results, references, strict=True)
    return [relative_error(ours, theirs) for ours, theirs in pairs if theirs.numel()]


@torch.no_grad()
def run(host: Host, model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    return host.call(model, pixels)


def reference(host: Host, plain: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What `plain`, a model that was never accelerated, computes in float64."""
    with fastseg.plain_path():  # for fastseg's own models
        return run(host, copy.deepcopy(plain).double(), pixels.double())


def fresh(host: Host, model: nn.Module, **config: Any) -> nn.Module:
    """A plain model, built anew, with the weights that `model` has now."""
    new = host.build(**config)
    new.load_state_dict(model.state_dict())
    return new


def assert_parity(
    host: Host, model: Any, plain: nn.Module, pixels: torch.Tensor, bound: float = FP32_BOUND
) -> None:
    """`model` computes what `plain` does in float64."""
    for error in errors(run(host, model, pixels), reference(host, plain, pixels)):
        assert error <= bound


def same_bits(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """`state_dict` with values of its own."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The same names in the same order, with the same bits."""
    now = model.state_dict()
    assert list(now) == list(state)
    assert same_bits(list(now.values()), list(state.values()))

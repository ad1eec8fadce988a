"""Fixtures of the tests of `fastseg.graphed`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastseg.cuda_graphs.default import CAPTURERS
from tests.cuda_graphs.graph_cases import FakeCapturer, runner_of
from tests.model_cases import tiny_model


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Recordings on a CPU for tests of graphs by default."""
    callspec = getattr(request.node, "callspec", None)
    make = callspec.params.get("make") if callspec else None
    if getattr(make, "__name__", "") == "default_of" or "test_default" in request.node.nodeid:
        monkeypatch.setitem(CAPTURERS, "cpu", FakeCapturer)


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def runner(model: nn.Module) -> Any:
    return runner_of(model)

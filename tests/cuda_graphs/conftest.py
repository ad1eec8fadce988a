"""Fixtures of the tests of `fastseg.graphed`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.cuda_graphs.graph_cases import runner_of
from tests.model_cases import tiny_model


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def runner(model: nn.Module) -> Any:
    return runner_of(model)

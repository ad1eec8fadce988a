"""Tests of kernels want to see them launched, where a GPU would replay graphs by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastseg


@pytest.fixture(autouse=True)
def no_graphs_by_default() -> Iterator[None]:
    with fastseg.graphs(False):
        yield

"""Forwards, and the way from uint8 images to label maps, of every variant by every provider."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.cases import Built
from bench.context import Context, Setting

from . import checked


@pytest.fixture(scope="module")
def built(setting_context: Context, provider: str) -> Iterator[Built]:
    with torch.no_grad():
        yield checked.build(setting_context, provider)
    torch.compiler.reset()  # dynamo keeps few graphs of a function


def test_forward(
    built: Built, setting: Setting, setting_context: Context, timed: Callable[..., None]
) -> None:
    pixel_values = setting_context.pixel_values
    timed(f"forward {setting}", lambda: built.forward(pixel_values), built.error)


def test_end_to_end(
    built: Built,
    setting: Setting,
    setting_context: Context,
    provider: str,
    timed: Callable[..., None],
) -> None:
    pipelines = checked.pipeline(setting_context, provider, built)
    steps = pipelines.steps[provider].values()

    def run() -> Any:
        value: Any = pipelines.images
        for step in steps:
            value = step(value)
        return value

    timed(f"end to end {setting}", run, pipelines.errors[provider])

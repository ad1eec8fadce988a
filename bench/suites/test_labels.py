"""From logits to label maps: fastseg's upsampling and argmax in one, and what it replaces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.context import SkippedCase
from bench.label_cases import labels_case


@pytest.mark.parametrize(
    "labels_provider",
    ["interpolate + argmax", "interpolate + argmax, channels-last", "fastseg"],
)
def test_labels(
    logits: str,
    labels_provider: str,
    device: torch.device,
    timed: Callable[..., None],
    request: pytest.FixtureRequest,
) -> None:
    size = request.config.option.size
    try:
        case = labels_case(logits, size, device)
    except SkippedCase as reason:
        pytest.skip(str(reason))
    function = case.providers[labels_provider]
    error = case.gate.check(labels_provider, function())
    timed(f"labels, {logits}, {size[0]}x{size[1]}", function, error)

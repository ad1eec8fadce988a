"""Each op of B0: all calls that a forward makes of it, so that the figures add up to a forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench import op_cases
from bench.context import DTYPES, SkippedCase
from bench.op_cases import CountedCall

_VARIANT = "b0"


@pytest.fixture(scope="module")
def calls(device: torch.device, request: pytest.FixtureRequest) -> list[CountedCall]:
    option = request.config.option
    dtype = DTYPES[option.dtype]
    model = op_cases.build_model(_VARIANT, device, dtype)
    pixels = op_cases.build_pixels(option.size, option.batch, device, dtype)
    return op_cases.record(model, pixels)


def test_op(
    op: str, op_provider: str, calls: list[CountedCall], timed: Callable[..., None]
) -> None:
    if op in (reasons := op_cases.missing(calls)):
        pytest.skip(f"{op}: {reasons[op]}")
    chosen = [call for call in calls if call.op == op]
    try:
        functions = [op_cases.provider(op_provider, call) for call in chosen]
    except SkippedCase as reason:
        pytest.skip(f"{op_provider}: {reason}")
    bound = [call.bind(function) for call, function in zip(chosen, functions, strict=True)]
    errors = []
    for call, run in zip(chosen, bound, strict=True):
        eager = call.bind(op_cases.provider("eager", call))()
        errors.append(op_cases.gate(call, eager).check(op_provider, run()))

    def run_all() -> None:
        for call, run in zip(chosen, bound, strict=True):
            for _ in range(call.count):
                run()

    timed(f"{_VARIANT} {op}", run_all, max(errors))

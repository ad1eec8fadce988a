"""The benchmarks' cases under pytest-benchmark. FASTSEG_BENCH holds options of `python -m bench`:

    pytest bench/suites --benchmark-only
    FASTSEG_BENCH="--variants b0,b2 --providers fastseg-eager" pytest bench/suites --benchmark-only

All is checked before it is timed. pytest-benchmark's options save and compare runs. It runs each
benchmark by itself; rows for the tables come from `python -m bench`, which takes turns.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.machine import machine, pinned_threads
from bench.measure import calls, models
from bench.measure.labels import LABEL_CASES, labels_case
from bench.measure.run import Checked
from bench.options import OP_PROVIDERS, OPS, parse
from bench.providers import PROVIDERS
from bench.setting import DTYPES, Context, SkippedCase, build_model, context, draw_pixels

OPTIONS = parse(shlex.split(os.environ.get("FASTSEG_BENCH", "")))
DEVICE = OPTIONS.device


@pytest.fixture(scope="module", params=OPTIONS.settings, ids=str)
def where(request: pytest.FixtureRequest) -> Iterator[Context]:
    torch.backends.cudnn.allow_tf32 = False  # float32 is IEEE on all sides
    made = context(request.param, DEVICE, OPTIONS.threads)
    with pinned_threads(OPTIONS.threads, DEVICE), torch.no_grad(), made as where:
        yield where


@pytest.fixture
def timed(benchmark: Any, where: Context) -> Callable[..., None]:
    """`timed(group, function, parity_error)`: time a function whose result is right."""

    def run(group: str, function: Callable[[], object], parity_error: float) -> None:
        def call() -> None:
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize(DEVICE)

        benchmark.group = f"{group}, {where.setting}"
        benchmark.extra_info.update(machine(DEVICE), commit=OPTIONS.commit, error=parity_error)
        with torch.inference_mode():
            call()
            benchmark(call)

    return run


def build(provider: str, where: Context) -> Checked:
    torch.compiler.reset()  # dynamo keeps few graphs of a function
    try:
        return models.build(provider, where, models.logits_gates(where))
    except SkippedCase as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("provider", OPTIONS.providers)
def test_forward(where: Context, provider: str, timed: Callable) -> None:
    built = build(provider, where)
    timed("forward", lambda: built.function(where.pixel_values), built.error)


@pytest.mark.parametrize("provider", [n for n in OPTIONS.providers if PROVIDERS[n].end_to_end])
def test_end_to_end(where: Context, provider: str, timed: Callable) -> None:
    built = build(provider, where)
    images = models.draw_images(where.setting.size, where.setting.batch)
    steps = models.pipeline(PROVIDERS[provider].ours, built.function, where)
    with torch.inference_mode():
        gate = models.pipelines_gate(where, images)
        error = gate.check(provider, models.through(steps, images))
    timed("end to end", lambda: models.through(steps, images), error)


@pytest.mark.parametrize("logits", LABEL_CASES)
@pytest.mark.parametrize("index", range(3), ids=["plain", "channels-last", "fastseg"])
def test_labels(where: Context, logits: str, index: int, timed: Callable) -> None:
    functions, gate, _ = labels_case(logits, where.setting.size, DEVICE)
    name, function = list(functions.items())[index]
    timed(f"labels, {logits}", function, gate.check(name, function()))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "name", [n for n in OP_PROVIDERS if n != "kernels" or DEVICE.type != "cpu"]
)
def test_op(where: Context, op: str, name: str, timed: Callable) -> None:
    """All calls that a forward makes, so that figures add up to a forward."""
    variant, size, batch, dtype = where.setting
    model = build_model(variant, DEVICE, DTYPES[dtype])
    pixels = draw_pixels(size, batch).to(DEVICE, DTYPES[dtype])
    found = [call for call in calls.record(model, pixels) if call.op == op]
    if not found:
        pytest.skip("a forward does not call it")
    bound = [(call, call.bind(calls.provider(name, call))) for call in found]
    gates = [calls.gate(call, call.bind(calls.provider("eager", call))()) for call in found]
    errors = [gate.check(name, run()) for gate, (_, run) in zip(gates, bound, strict=True)]
    timed(op, lambda: [run() for call, run in bound for _ in range(call.count)], max(errors))

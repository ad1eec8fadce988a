"""Whole forwards in each way to run them: what `python -m bench gpu` asks first of a GPU.

Without a GPU the eager twins run, one after another: that tries this file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastseg
from bench import gates
from bench.gpu.forwards import FORWARDS, QUICK, build, label_map
from bench.measure import calls
from fastseg.kernels.core import optional_triton, registry

if optional_triton.interpreting():
    pytest.skip("on a GPU, or by the eager twins", allow_module_level=True)

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [pytest.mark.gpu] * HAS_GPU
REPEATS = 20 if HAS_GPU else 3


SETTINGS = [  # each in one process, which builds it once
    pytest.param(setting, id=str(setting), marks=pytest.mark.xdist_group(str(setting)))
    for setting in (FORWARDS if HAS_GPU else QUICK)
]


@pytest.fixture(scope="module", params=SETTINGS)
def forward(request):
    """Setting, model and pixels."""
    with torch.no_grad():
        return request.param, *build(request.param, DEVICE)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def red_ops(
    model: torch.nn.Module, pixels: torch.Tensor, forms: Callable[[str], Callable[..., Any]]
) -> list[str]:
    """Kinds of calls that are wrong by themselves, on the inputs that the eager twins give."""
    red = []
    for call in calls.record(model, gates.ends(pixels)):
        gate = calls.gate(call, call.bind(registry.eager_twin(call.op))())
        try:
            gate.check(call.part, call.bind(forms(call.op))())
        except gates.RedGate as error:
            red.append(str(error))
    return red


def check_logits(setting, model, pixels):
    """Of the first and the last image; half precision is measured by the plain path's error."""
    logits = gates.ends(model(pixels).logits)
    with fastseg.plain_path():
        reference = copy.deepcopy(model).double()(gates.ends(pixels).double()).logits
        plain = model(gates.ends(pixels)).logits
    bound = gates.GPU_FLOAT32_BOUND
    if setting.dtype != "float32":
        bound = gates.HALF_BOUND * gates.relative_error(plain, reference)
    try:
        gates.logits_gate(reference, bound).check("logits", logits)
    except gates.RedGate as error:
        red = red_ops(model, pixels, registry.launcher if HAS_GPU else registry.eager_twin)
        pytest.fail(f"{error}; by themselves: {red or 'all right'}")


def test_logits(forward):
    check_logits(*forward)


def test_label_map(forward):
    setting, model, pixels = forward
    logits = gates.ends(model(pixels).logits.float())
    gates.of_ends(gates.labels_gate(logits, setting.size)).check("labels", label_map(model, pixels))


def test_repeats_are_the_same_to_the_bit(forward):
    _, model, pixels = forward
    first = model(pixels).logits
    assert all(torch.equal(model(pixels).logits, first) for _ in range(REPEATS))


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_two_streams(forward):
    _, model, pixels = forward
    first, results = model(pixels).logits, []
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(REPEATS):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(torch.equal(model(pixels).logits, first))
    assert all(results)


def test_graph_replays(forward):
    """With other pixels in between, so that what is read anew is seen."""
    _, model, pixels = forward
    runner = fastseg.graphed(model)
    first = model(pixels).logits
    for _ in range(3):
        runner(pixels.flip(3))
        assert torch.equal(runner(pixels).logits, first)
    assert not HAS_GPU or " 0 replays" not in runner.report(), runner.report()


@pytest.mark.skipif(HAS_GPU, reason="about the twins that stand in for kernels")
def test_a_wrong_op_is_named(forward):
    setting, model, pixels = forward

    def wrong_mix_ffn(name):
        twin = registry.eager_twin(name)
        return (lambda *a, **k: 1.01 * twin(*a, **k)) if name == "mix_ffn" else twin

    red = red_ops(model, pixels, wrong_mix_ffn)
    assert len(red) >= 4
    assert all(one.startswith("mix_ffn ") for one in red)

    def wrong(module, inputs, output):
        output.logits += 1e-3 * (output.logits.dtype == torch.float32)

    handle = model.register_forward_hook(wrong)
    try:
        with pytest.raises(pytest.fail.Exception, match="float64 .*; by themselves: all right"):
            check_logits(setting, model, pixels)
    finally:
        handle.remove()

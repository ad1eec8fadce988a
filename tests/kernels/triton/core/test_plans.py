"""Launch plans, run by the interpreter: Triton's compiled kernels have a stand-in here.

Like them it is bound to a grid, and gets addresses and numbers, and no tensors.
"""

from __future__ import annotations

import copy
import ctypes
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

import fastseg
from fastseg.kernels.core import launch, optional_triton, plans
from fastseg.kernels.core.registry import OPS, Op
from tests.kernels.triton.kernel_cases import DTYPES
from tests.model_cases import tiny_model

if not optional_triton.interpreting():
    pytest.skip("plans are tested by the interpreter", allow_module_level=True)


class Compiled:
    """A kernel for one signature."""

    def __init__(self, one: launch.Launch) -> None:
        self._kernel = one.kernel
        # Of each pointer, what the memory behind it is.
        self._memory: dict[int, tuple[torch.dtype, int]] = {}
        for index, value in enumerate(one.bound()):
            if isinstance(value, torch.Tensor):
                self._memory[index] = value.dtype, _length(value)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*bound: Any, stream: int) -> None:
            arguments = [
                _tensor_at(value, *self._memory[index]) if index in self._memory else value
                for index, value in enumerate(bound)
            ]
            assert not any(isinstance(value, torch.Tensor) for value in bound)
            self._kernel[grid](*arguments)

        return run


def _length(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()


def _tensor_at(address: int, dtype: torch.dtype, length: int) -> torch.Tensor:
    memory = (ctypes.c_byte * (length * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Any:
    """NaN in new memory, by torch itself: no operator that a recorder would see."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> Any:
    """Compiled kernels; the launches that do not come from a plan."""
    seen = []

    def run(one: launch.Launch) -> Compiled:
        seen.append(one)
        with _disable_current_modes():  # the interpreter's own operators are no launcher's
            one.kernel[one.grid](*one.arguments, **one.options)
        return Compiled(one)

    monkeypatch.setattr(launch, "_run", run)
    monkeypatch.setattr(plans, "interpreting", lambda: False)
    monkeypatch.setattr(plans, "select_backend", lambda device: ("triton", ""))
    monkeypatch.setattr(plans, "current_stream", lambda device: 0)
    return seen


@pytest.fixture(params=OPS.values(), ids=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return request.param


def example_of(op: Op, dtype: torch.dtype) -> list[Any]:
    """The op's example with weights as folds make them: with sums, and taps channels-last."""
    *inputs, last = op.example(torch.device("cpu"), dtype)
    if op.weights is None:
        return [*inputs, last]
    fields = last.arguments()
    for name in fields:
        weight = fields.get(name.removesuffix("_sum"))
        if name.endswith("_sum") and weight is not None:
            taps = weight.view(len(weight), -1, last.channels)
            fields[name] = taps.sum(2 if name != "sr_weight_sum" else 0, dtype=torch.float32)
            fields[name] = fields[name] if name == "sr_weight_sum" else fields[name][:, 0]
    if op.name == "patch_embed":
        fields["weight"] = fields["weight"].to(memory_format=torch.channels_last)
    return [*inputs, type(last)(**fields)]


def other(value: Any) -> Any:
    """Another input of the same shape, at another address."""
    if isinstance(value, list | tuple):
        return [other(item) for item in value]
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.flip(0) * -1.5 + 0.25
    return value


class Planned:
    """An op with weights, by plans: what a model's encoder does with many."""

    def __init__(self, op: Op, example: Any) -> None:
        self.op = op
        self.weights = [] if op.weights is None else list(example[-1:])
        held = self.weights[0].tensors() if self.weights else []
        self.plans = plans.LaunchPlans(lambda: held)

    def __call__(self, *inputs: Any) -> torch.Tensor:
        (output,) = self.plans.call(self._run, *inputs)
        return output

    def _run(self, *inputs: Any) -> list[torch.Tensor]:
        return [self.op(torch.device("cpu"), *inputs, *self.weights)]


def expected(op: Op, arguments: Any) -> torch.Tensor:
    """The twin in float64."""

    def double(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [double(item) for item in value]
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        return value.map(double) if hasattr(value, "map") else value

    return op.eager(*map(double, arguments))


def check(op: Op, output: torch.Tensor, arguments: Any, dtype: torch.dtype) -> None:
    truth = expected(op, arguments)
    if not output.is_floating_point():
        assert (output == truth).float().mean() > 0.99
        return
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(output.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_third_call_is_run_by_a_plan(op, dtype, launches):
    """With new inputs at new addresses, and NaN in all memory that is not written."""
    example = example_of(op, dtype)
    planned = Planned(op, example)
    inputs = example[: len(example) - len(planned.weights)]
    held = []
    for number in range(5):
        launches.clear()
        output = planned(*inputs)
        assert bool(launches) == (number < 2)
        check(op, output, [*inputs, *planned.weights], dtype)
        held.append((output, output.clone(), inputs))  # inputs too: new addresses for others
        inputs = list(map(other, inputs))
    for output, kept, _ in held:  # every call's own
        assert torch.equal(output, kept)


@pytest.fixture
def ffn() -> Planned:
    return Planned(OPS["mix_ffn"], example_of(OPS["mix_ffn"], torch.float32))


@pytest.fixture
def inputs() -> Any:
    return example_of(OPS["mix_ffn"], torch.float32)[:-1]


def test_an_input_that_is_not_aligned_has_a_plan_of_its_own(ffn, inputs, launches):
    """Triton compiles wide loads for addresses that are multiples of 16."""
    x, *others = inputs
    for _ in range(3):
        aligned = ffn(x, *others)
    memory = torch.empty(x.numel() + 4)
    start = next(i for i in range(4) if memory[i:].data_ptr() % 16 == 4)
    shifted = memory[start : start + x.numel()].view(x.shape).copy_(x)
    for number in range(4):
        launches.clear()
        assert torch.equal(ffn(shifted, *others), aligned)
        assert bool(launches) == (number < 2)


def test_an_input_that_is_copied_has_none(ffn, inputs, launches):
    x = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    wanted = ffn(*inputs)
    for _ in range(4):
        launches.clear()
        assert torch.equal(ffn(x, *inputs[1:]), wanted)
        assert launches


def test_weights_that_are_written_to_and_weights_that_are_not_known(ffn, inputs, launches):
    for _ in range(3):
        ffn(*inputs)
    (weights,) = ffn.weights
    weights.fc2_bias.add_(1)
    launches.clear()
    check(ffn.op, ffn(*inputs), [*inputs, weights], torch.float32)
    assert not launches
    ffn.plans.clear()
    ffn.weights = [weights.map(torch.Tensor.clone)]  # where nobody holds them
    for _ in range(4):
        launches.clear()
        check(ffn.op, ffn(*inputs), [*inputs, *ffn.weights], torch.float32)
        assert launches


@pytest.mark.parametrize("tool", ["record", "mode", "another file", "autocast", "eager"])
def test_calls_that_no_plan_may_serve(tool, ffn, inputs, launches, monkeypatch, tmp_path):
    for _ in range(3):
        wanted = ffn(*inputs)
    launches.clear()
    if tool == "record":
        with launch.record_launches() as recorded:
            ffn(*inputs)
        assert recorded
    elif tool == "mode":
        with FlopCounterMode(display=False):
            ffn(*inputs)
        assert launches
    elif tool == "another file":
        file = tmp_path / "tuned.json"
        file.write_text('{"kernels": {}}')
        monkeypatch.setenv("FASTSEG_CONFIGS", str(file))
        ffn(*inputs)
        assert launches
    elif tool == "autocast":
        with torch.autocast("cpu", torch.bfloat16), fastseg.backend("eager"):
            assert not torch.equal(ffn(*inputs), wanted)
    else:
        with fastseg.backend("eager"):
            torch.testing.assert_close(ffn(*inputs), wanted)
        assert not launches


def test_plans_of_many_shapes_are_bounded(ffn, launches, monkeypatch):
    monkeypatch.setattr(plans, "_MOST_KEYS", 2)
    channels = ffn.weights[0].channels
    for width in (1, 2, 1, 3, 4):
        ffn(torch.zeros(1, width, channels), 1, width, None, None, 0.0)
    assert len(ffn.plans._plans) == 2


def test_temporary_tensors_share_memory_where_they_can():
    sizes = [100, 300, 256, 50]
    uses = [[0, 1], [1, 2], [2, 3], [3]]
    offsets, total = plans._share(sizes, uses)
    assert offsets == [0, 256, 0, 256]
    assert total == 768
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    for i in range(4):
        for j in range(i):
            at_once = uses[i][0] <= uses[j][-1] and uses[j][0] <= uses[i][-1]
            apart = ends[i] <= offsets[j] or ends[j] <= offsets[i]
            assert apart or not at_once


@pytest.mark.slow
def test_a_model_by_plans(launches):
    """As a whole, at changing sizes: logits as on the plain path in float64."""
    widths = {"hidden_sizes": [32, 64, 160, 256], "decoder_hidden_size": 64}
    model = tiny_model(**widths).requires_grad_(False)
    reference = copy.deepcopy(model).double()
    sizes = [(32, 32), (32, 48)]
    with torch.no_grad():
        for number in range(3):
            for size in sizes:
                pixels = torch.randn(1, 3, *size)
                launches.clear()
                logits = model(pixels).logits
                assert bool(launches) == (number < 2)
                with fastseg.plain_path():
                    wanted = reference(pixels.double()).logits
                torch.testing.assert_close(logits.double(), wanted, rtol=1e-3, atol=1e-4)
        for one in (model, reference):
            one.segformer.encoder.block[1][0].mlp.dense1.weight.mul_(-1)
        launches.clear()
        logits = model(pixels).logits  # by no plan with the weights of before
        assert launches
        with fastseg.plain_path():
            wanted = reference(pixels.double()).logits
        torch.testing.assert_close(logits.double(), wanted, rtol=1e-3, atol=1e-4)

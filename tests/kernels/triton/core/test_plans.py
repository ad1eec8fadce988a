"""Launch plans, run by the interpreter: Triton's compiled kernels have a stand-in here.

Like them it is bound to a grid, and gets addresses and numbers, and no tensors.
"""

from __future__ import annotations

import copy
import ctypes
import pickle
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

import fastseg
from fastseg.kernels import mix_ffn
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


def run(op: Op, arguments: Any) -> torch.Tensor:
    return op(torch.device("cpu"), *arguments)


def expected(op: Op, arguments: Any) -> torch.Tensor:
    """The twin in float64."""

    def double(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [double(item) for item in value]
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        return value.map(double) if hasattr(value, "map") else value

    return op.eager(*map(double, arguments))


def inputs_of(op: Op, arguments: Any) -> int:
    return len(arguments) - (op.weights is not None)


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
    arguments = example_of(op, dtype)
    held = []
    for number in range(5):
        launches.clear()
        output = run(op, arguments)
        assert bool(launches) == (number < 2)
        check(op, output, arguments, dtype)
        held.append((output, output.clone(), arguments))  # inputs too: new addresses for others
        count = inputs_of(op, arguments)
        arguments = [*map(other, arguments[:count]), *arguments[count:]]
    for output, kept, _ in held:  # every call's own
        assert torch.equal(output, kept)


def ffn() -> Any:
    x, height, width, *_, weights = example_of(OPS["mix_ffn"], torch.float32)
    return [x, height, width, None, None, 0.0, weights]


def call(x: torch.Tensor, example: Any) -> torch.Tensor:
    return mix_ffn(x, *example[1:3], example[-1])


def test_an_input_that_is_not_aligned_has_a_plan_of_its_own(launches):
    """Triton compiles wide loads for addresses that are multiples of 16."""
    example = ffn()
    x = example[0]
    for _ in range(3):
        aligned = call(x, example)
    memory = torch.empty(x.numel() + 4)
    start = next(i for i in range(4) if memory[i:].data_ptr() % 16 == 4)
    shifted = memory[start : start + x.numel()].view(x.shape).copy_(x)
    for number in range(4):
        launches.clear()
        assert torch.equal(call(shifted, example), aligned)
        assert bool(launches) == (number < 2)


def test_an_input_that_is_copied_has_none(launches):
    example = ffn()
    x = example[0].transpose(1, 2).contiguous().transpose(1, 2)
    wanted = call(x.contiguous(), example)
    for _ in range(4):
        launches.clear()
        assert torch.equal(call(x, example), wanted)
        assert launches


def test_weights_that_are_written_to_or_moved(launches):
    example = ffn()
    weights = example[-1]
    for _ in range(3):
        call(example[0], example)
    weights.fc2_bias.add_(1)
    launches.clear()
    output = call(example[0], example)
    assert not launches
    check(OPS["mix_ffn"], output, example, torch.float32)
    old = weights.fc2_bias.data
    weights.fc2_bias.data = old + 1  # other memory
    output = call(example[0], example)
    assert launches
    check(OPS["mix_ffn"], output, example, torch.float32)


@pytest.mark.parametrize("tool", ["gradients", "record", "mode", "another file"])
def test_calls_that_no_plan_may_serve(tool, launches, monkeypatch, tmp_path):
    example = ffn()
    for _ in range(3):
        call(example[0], example)
    launches.clear()
    if tool == "gradients":
        x = example[0].clone().requires_grad_()
        with torch.enable_grad(), pytest.raises(RuntimeError, match="gradients are asked for"):
            call(x, example)
    elif tool == "record":
        with launch.record_launches() as recorded:
            call(example[0], example)
        assert recorded
    elif tool == "mode":
        with FlopCounterMode(display=False):
            call(example[0], example)
        assert launches
    else:
        file = tmp_path / "tuned.json"
        file.write_text('{"kernels": {}}')
        monkeypatch.setenv("FASTSEG_CONFIGS", str(file))
        call(example[0], example)
        assert launches


def test_weights_are_pickled_without_plans():
    example = ffn()
    for _ in range(3):
        wanted = call(example[0], example)
    weights = pickle.loads(pickle.dumps(example[-1]))
    assert torch.equal(call(example[0], [*example[:-1], weights]), wanted)


def test_plans_of_many_shapes_are_bounded(launches, monkeypatch):
    monkeypatch.setattr(plans, "_MOST_KEYS", 2)
    example = ffn()
    for width in (1, 2, 1, 3, 4):
        call(torch.zeros(1, width, example[0].shape[2]), [None, 1, width, example[-1]])
    assert len(example[-1].plans._plans) == 2


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

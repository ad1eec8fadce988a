"""What every op promises, on the example in its record: a new op is tested here without a line.

Its own folder has what is particular to it: hard values, layouts, forms.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import fastseg
from fastseg.kernels.core.configurations import FAMILIES, FOLDER, family_entries
from fastseg.kernels.core.launch import record_launches
from fastseg.kernels.core.registry import OPS, Op
from fastseg.kernels.core.weights import Weights
from fastseg.kernels.tune.candidates import by_kernel
from tests.kernels.triton.kernel_cases import DTYPES, check_parity

DOCS = Path(__file__).parents[3] / "docs" / "ops"


@pytest.fixture(params=OPS.values(), ids=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return request.param


def flat(op: Op, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as the registered op takes them."""
    if op.weights is None:
        return arguments, {}
    return arguments[:-1], arguments[-1].arguments()


def registered(op: Op) -> Any:
    return getattr(torch.ops.fastseg, op.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(op, dtype, device):
    """New memory is filled with NaN here, so that a value that is not written shows."""
    check(op, *flat(op, op.example(device, dtype)))


def check(op: Op, inputs: tuple[Any, ...], weights: dict[str, Any]) -> None:
    """The kernels against the twin in float64."""
    if op.name == "upsample_argmax":  # labels: equal, but for ties
        with fastseg.backend("eager"):
            expected = op.eager(inputs[0].double(), *inputs[1:])
        assert (registered(op)(*inputs) == expected).float().mean() > 0.999
        return
    check_parity(lambda *inputs, **weights: _run(op, inputs, weights), *inputs, **weights)


def _run(op: Op, inputs: tuple[Any, ...], weights: dict[str, Any]) -> torch.Tensor:
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    device = tensors[0].device if tensors else inputs[0][0].device
    of_op = () if op.weights is None else (op.weights.of(**weights),)
    return op(device, *inputs, *of_op)


def test_registration(op, device):
    inputs, weights = flat(op, op.example(device, torch.float32))
    torch.library.opcheck(registered(op).default, inputs, weights)


def test_an_empty_batch_launches_nothing(op, device):
    *inputs, last = op.example(device, torch.float32)
    first = tree_map(lambda tensor: tensor[:0], inputs[0] if inputs else last)
    arguments = (first, *inputs[1:], last) if inputs else (first,)
    expected = op.fused(*op.example(device, torch.float32)).shape
    with record_launches() as launches:
        assert op.fused(*arguments).shape == (0, *expected[1:])
    assert not launches


def test_inputs_and_weights_are_not_written_to(op, device):
    inputs, weights = flat(op, op.example(device, torch.float32))
    before = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (inputs, weights))
    registered(op)(*inputs, **weights)
    tensors = torch.utils._pytree.tree_leaves((inputs, weights))
    for now, then in zip(tensors, torch.utils._pytree.tree_leaves(before), strict=True):
        assert now is then or torch.equal(now, then)


def test_memory_of_any_layout(op, device):
    def strided(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        return torch.stack([value, value + 1], dim=-1)[..., 0]

    inputs, weights = tree_map(strided, flat(op, op.example(device, torch.float32)))
    check(op, inputs, weights)


def test_weights_are_checked_when_they_are_made(op, device):
    if op.weights is None:
        pytest.skip("it has no weights")
    weights = op.example(device, torch.float32)[-1]
    assert isinstance(weights, Weights)
    with pytest.raises(dataclasses.FrozenInstanceError):
        weights.eps = 1.0
    tensors = {n: v for n, v in weights.arguments().items() if isinstance(v, torch.Tensor)}
    if len(tensors) == 1:
        pytest.skip("there is nothing that its one tensor has to go with")
    for name, value in tensors.items():
        for wrong, error in ((value[1:], ValueError), (value.to("meta"), ValueError)):
            with pytest.raises(error, match=": expected"):
                dataclasses.replace(weights, **{name: wrong})
        with pytest.raises(TypeError, match=": expected"):
            dataclasses.replace(weights, **{name: value.half()})


def test_weights_of_another_op_are_refused(op, device):
    if op.weights is None:
        pytest.skip("it has no weights")
    function = getattr(fastseg.kernels, op.name)
    *inputs, weights = op.example(device, torch.float32)
    names = [argument.name for argument in registered(op).default._schema.arguments]
    arguments = dict(zip(names, inputs, strict=False))
    with pytest.raises(TypeError, match=f"weights: expected {op.weights.__name__}, got dict"):
        function(**arguments, weights=weights.arguments())


def test_every_configuration_has_candidates_and_an_entry(op):
    entries = family_entries("default")
    for kernel in op.candidates:
        assert entries[kernel], kernel
    for family in ("default", *FAMILIES):
        named = json.loads((FOLDER / f"{family}.json").read_text(encoding="utf-8"))["kernels"]
        assert set(named) <= set(by_kernel())


def test_it_has_a_page(op):
    assert f"{op.name}" in (DOCS / f"{op.name}.md").read_text(encoding="utf-8")

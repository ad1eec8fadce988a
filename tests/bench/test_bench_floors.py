"""bench.floors: the least work of ops, and what a device is measured to do at best."""

from __future__ import annotations

import math
import time

import pytest
import torch

from bench import floors, op_cases
from fastseg.kernels.core import registry
from tests.bench.call_cases import CPU, counted_flops, eager, recorded


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("size", "batch"), [((64, 96), 2), ((100, 68), 1)])
def test_flops_are_those_that_torch_counts(size, batch):
    """Also of a grid that the spatial reduction does not divide."""
    calls = recorded(size=size, batch=batch)
    assert {call.op for call in calls} >= {"patch_embed", "sr_attention", "mix_ffn"}
    for call in calls:
        on_meta = call.map(lambda tensor: tensor.to("meta"))
        counted = counted_flops(on_meta.bind(registry.EAGER[call.op]))
        assert floors.work(call, eager(call)).flops == counted, (call.op, call.stage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_inputs_and_result(dtype):
    """Counted by storage: nothing twice, and nothing but sums of weights left out."""
    for call in recorded(dtype):
        output = eager(call)
        left_out = [name for name in call.arguments if name.endswith("_sum")]
        found = [
            tensor.untyped_storage()
            for name, value in call.arguments.items()
            if name not in left_out
            for tensor in op_cases.tensors(value)
        ]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in found}
        expected = sum(sizes.values()) + output.untyped_storage().nbytes()
        assert floors.work(call, output).bytes == expected, call.op


def test_floor_is_the_larger_of_bytes_and_flops():
    known = floors.Ceilings(bytes_per_second=1e12, flops_per_second=1e14, source="")
    assert known.floor_microseconds(floors.Work(bytes=10**7, flops=10**9)) == pytest.approx(10)
    assert known.floor_microseconds(floors.Work(bytes=10**6, flops=10**10)) == pytest.approx(100)


def test_a_ceiling_is_of_the_fastest_runs(monkeypatch):
    taken = [*range(9, 29), 1.0, 2.0, 3.0]  # of 23 runs two are the fastest tenth
    monkeypatch.setattr(floors, "_for_a_while", lambda measure: list(taken))
    assert floors._least_seconds(lambda: None, CPU) == 1.0
    assert floors._least_seconds(lambda: None, torch.device("cuda")) == 1.5


def test_known_chips_are_measured_all_the_same(monkeypatch):
    """Also that a GPU is timed by events, on a copy that no cache holds."""
    asked = []

    def least_seconds(function, device):
        asked.append(device.type)
        return 1e-3

    class Tensor:
        def __init__(self, elements):
            self.elements = elements

        def numel(self):
            return self.elements

        def clone(self):
            return self

        def to(self, dtype):
            return self

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "ones", lambda size, **kwargs: Tensor(size))
    monkeypatch.setattr(torch, "randn", lambda *size, **kwargs: Tensor(math.prod(size)))
    monkeypatch.setattr(floors, "_least_seconds", least_seconds)
    found = floors.ceilings(torch.device("cuda"), torch.bfloat16)
    assert asked == ["cuda", "cuda"]
    assert found.bytes_per_second == pytest.approx(2 * 2**30 / 1e-3)
    assert found.flops_per_second == pytest.approx(2 * 8192**3 / 1e-3)
    assert found.source == "measured copy, measured torch.bfloat16 product"


def test_known_ceilings_are_found_by_name():
    assert floors.known_ceilings("NVIDIA H200").source.startswith("an H200")
    assert "H100" in floors.known_ceilings("NVIDIA H100 80GB HBM3").source
    assert floors.known_ceilings("NVIDIA H100 PCIe") is None
    assert floors.known_ceilings("AMD EPYC, 2 cores, AVX512") is None


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr(floors, "_SECONDS", 0.1)
    known = floors.ceilings(CPU, torch.float32)
    assert 1e8 < known.bytes_per_second < 1e13
    assert 1e8 < known.flops_per_second < 1e14
    assert known.source == "measured copy, measured torch.float32 product"


def test_slow_products_are_not_waited_for(monkeypatch):
    """A CPU may compute in float16 at a GFLOP/s, where the largest product takes many seconds."""
    sides = []

    def product(left, right):
        sides.append(len(left))
        time.sleep(2 * len(left) ** 3 / 1e9)

    monkeypatch.setattr(floors, "_SECONDS", 0.05)
    monkeypatch.setattr(torch, "mm", product)
    assert floors._product_flops_per_second(CPU, torch.float16) == pytest.approx(1e9, rel=0.5)
    assert set(sides) == {256}

"""`python -m bench.gpu.parity`: whether forwards are right on this device, in each way to run them.

Logits against a float64 run of the plain path, label maps against float64, repeats, two streams
and replays of a CUDA graph against the first forward, bit by bit. Where logits are wrong, each op
is checked alone, to tell which. Without a GPU the eager twins run, one after another: that tries
the script. The status is 1 where anything is wrong.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

import fastseg
from fastseg.kernels.core import registry

from .. import gates
from ..measure import calls
from ..measure.run import tidy
from ..setting import Setting, first_line
from .forwards import Report, label_map

_REPEATS = 20
Finding = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    report = Report("parity", argv)
    wrong = 0
    with torch.no_grad():
        for setting, model, pixels in report.left():
            found = list(_checks(setting, model, pixels))
            for one in found:
                print(f"{setting}: {one['check']} {one['outcome']} {one['said']}".strip())
            report.add(setting, found)
            wrong += sum(one["outcome"] != "right" for one in found)
            del model
            tidy(report.device)
    print(f"{wrong} checks are red" if wrong else "all is right")
    return int(wrong > 0)


def _checks(setting: Setting, model: torch.nn.Module, pixels: torch.Tensor) -> Iterator[Finding]:
    first = model(pixels).logits
    gate = _logits_gate(setting, model, pixels)
    logits = _finding("logits", lambda: f"{gate.check('logits', gates.ends(first)):.3g}")
    yield logits
    if logits["outcome"] != "right":
        yield from _ops(model, pixels, registry.FUSED if pixels.is_cuda else registry.EAGER)
    labels_gate = gates.of_ends(gates.labels_gate(gates.ends(first).float(), setting.size))
    for name, check in {
        "label map": lambda: f"{labels_gate.check('labels', label_map(model, pixels)):.3g}",
        f"{_REPEATS} repeats": lambda: _same(model(pixels).logits for _ in range(_REPEATS)),
        "two streams": lambda: _same(_on_two_streams(model, pixels)),
        "graph replays": lambda: _same(_replays(model, pixels)),
    }.items():
        yield _finding(name, check)


def _logits_gate(setting: Setting, model: torch.nn.Module, pixels: torch.Tensor) -> gates.Gate:
    """For the logits of the first and the last image; half precision is measured by eager maths."""
    pixels = gates.ends(pixels)
    with fastseg.plain_path():
        reference = copy.deepcopy(model).double()(pixels.double()).logits
        eager = model(pixels).logits
    if setting.dtype == "float32":
        return gates.logits_gate(reference, gates.GPU_FLOAT32_BOUND)
    return gates.logits_gate(reference, gates.HALF_BOUND * gates.relative_error(eager, reference))


def _ops(
    model: torch.nn.Module, pixels: torch.Tensor, forms: Mapping[str, Callable[..., Any]]
) -> Iterator[Finding]:
    """Each kind of call of an op by itself, on the inputs that the eager twins give."""
    for call in calls.record(model, gates.ends(pixels)):

        def check(call: calls.CountedCall = call) -> str:
            gate = calls.gate(call, call.bind(registry.EAGER[call.op])())
            return f"{gate.check(call.part, call.bind(forms[call.op])()):.3g}"

        yield _finding(call.part, check)


def _finding(name: str, check: Callable[[], str]) -> Finding:
    try:
        return {"check": name, "outcome": "right", "said": check()}
    except torch.AcceleratorError:  # the GPU is lost to this process
        raise
    except Exception as error:  # a red gate, or of Triton or CUDA: the other checks go on
        return {"check": name, "outcome": "wrong", "said": first_line(error)[:200]}


def _same(results: Iterator[torch.Tensor]) -> str:
    first = next(results)
    for number, result in enumerate(results):
        if not torch.equal(result, first):
            at = (result != first).sum().item()
            raise gates.RedGate(f"repeat {number + 1} differs in {at} of {first.numel()} values")
    return ""


def _on_two_streams(model: torch.nn.Module, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
    yield model(pixels).logits
    if not pixels.is_cuda:
        yield model(pixels).logits
        return
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for _ in range(_REPEATS):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(model(pixels).logits)
    torch.cuda.synchronize()
    yield from results


def _replays(model: torch.nn.Module, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of other pixels in between, so that what is read anew is seen."""
    runner = fastseg.graphed(model)
    yield model(pixels).logits
    for _ in range(3):
        runner(pixels.flip(3))
        yield runner(pixels).logits
    if pixels.is_cuda and " 0 replays" in runner.report():
        raise RuntimeError(f"no graph was replayed: {runner.report()}".replace("\n", "; "))


if __name__ == "__main__":
    sys.exit(main())

"""`fastseg.graphed` where no graph can be right: the model runs, and the report says why."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastseg
from fastseg.cuda_graphs import capture as graph_capture
from tests.cuda_graphs.graph_cases import (
    SHAPE,
    Wrap,
    capture,
    runner_of,
)
from tests.model_cases import SMALL, relative_error, tiny_model


def check_eager(runner, reason, *args, **kwargs):
    """Runs of the model, with the reason in the report."""
    captures = len(runner._capturer.recordings)
    replays = runner._counts["replays"]
    results = [runner(*args, **kwargs) for _ in range(3)]
    assert reason in runner.report()
    assert runner._counts["replays"] == replays
    assert len(runner._capturer.recordings) == captures or runner._capturer.live == 0
    return results[-1]


def test_a_cpu_runs_the_model(model):
    runner = fastseg.graphed(model)
    image = torch.randn(SHAPE)
    assert torch.equal(runner(image).logits, model(image).logits)
    assert "1 calls ran eagerly: CUDA graphs need a CUDA device, its input is on the cpu" in (
        runner.report()
    )
    runner.warmup([SHAPE])


def test_training_and_gradients(runner, model):
    capture(runner, torch.randn(SHAPE))
    with torch.enable_grad():
        loss = check_eager(runner, "gradients are on", torch.randn(SHAPE)).logits.sum()
        loss.backward()
        assert model.decode_head.classifier.weight.grad is not None
        model.requires_grad_(False)
        image = torch.randn(SHAPE, requires_grad=True)
        assert check_eager(runner, "gradients are on", image).logits.requires_grad
        # Nothing asks for gradients: a graph, though gradients are on.
        replays = runner._capturer.replays
        assert not runner(torch.randn(SHAPE)).logits.requires_grad
        assert runner._capturer.replays == replays + 1
    assert runner.train() is runner
    assert model.training
    check_eager(runner, "the model is in training mode", torch.randn(SHAPE))
    runner.eval()
    model.decode_head.train()
    check_eager(runner, "decode_head is in training mode", torch.randn(SHAPE))


def test_hooks_fire(runner, model):
    capture(runner, torch.randn(SHAPE))
    fired = []
    hook = model.decode_head.register_forward_hook(lambda *_: fired.append(1))
    check_eager(runner, "decode_head has forward hooks", torch.randn(SHAPE))
    assert fired == [1, 1, 1]
    hook.remove()
    for _ in range(3):
        runner(torch.randn(SHAPE))
    assert len(fired) == 3
    assert runner._capturer.live == 1


def test_modes_and_captures_around(runner):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    capture(runner, torch.randn(SHAPE))
    with Mode():
        check_eager(runner, "a TorchDispatchMode", torch.randn(SHAPE))
    runner._capturer.declined = "the current stream is capturing a graph"
    check_eager(runner, "the current stream is capturing a graph", torch.randn(SHAPE))
    runner._capturer.declined = None
    replays = runner._capturer.replays
    with torch.device("cpu"):  # a TorchFunctionMode as well
        runner(torch.randn(SHAPE))
    assert runner._capturer.replays == replays + 1


@pytest.mark.slow
def test_traced_and_compiled():
    model = tiny_model(**SMALL).requires_grad_(False)
    runner = runner_of(model)
    image, other = torch.randn(SHAPE), torch.randn(SHAPE)
    capture(runner, image)
    compiled = torch.compile(lambda x: runner(x).logits, fullgraph=True, backend="eager")
    assert torch.equal(compiled(other), model(other).logits)
    assert runner._capturer.replays == 0
    traced = torch.jit.trace(lambda x: runner(x, return_dict=False)[0], image, check_trace=False)
    assert relative_error(traced(other), model(other).logits) <= 2e-6


@dataclasses.dataclass
class Opaque:
    tensor: torch.Tensor


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda linear, x: Opaque(linear(x)), "its output has a Opaque"),
        (lambda linear, x: (linear(x), x.to("meta")), "tensor on meta"),
        (lambda linear, x: linear(x.add_(1)), "its forward edits its input"),
    ],
    ids=["output", "device", "input"],
)
def test_models_without_graphs(function, reason):
    check_eager(runner_of(Wrap(function).eval()), reason, torch.randn(2, 4))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((Opaque(torch.ones(1)),), "argument 1 is a Opaque"),
        ((torch.ones(2, 4).to_sparse(),), "argument 1 is a torch.sparse_coo tensor"),
        ((torch.ones(2, 4, device="meta"),), "its inputs are on several devices"),
    ],
)
def test_arguments_without_graphs(arguments, reason):
    model = Wrap(lambda linear, x, *rest: linear(x)).eval()
    check_eager(runner_of(model), reason, torch.randn(2, 4), *arguments)


def test_a_model_on_another_device():
    model = Wrap(lambda linear, x: x + 1).eval()
    model.linear.to("meta")
    check_eager(runner_of(model), "its weights are on meta", torch.randn(2, 4))


def test_a_forward_that_changes_its_model():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    model = Counting().eval()
    runner = runner_of(model)
    x = torch.zeros(3)
    assert [runner(x)[0].item() for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    assert "its forward changes calls" in runner.report()


def test_a_capture_that_fails(runner, model):
    def synchronizing(linear, x):
        return linear(x) * x.sum().item()

    sync = Wrap(synchronizing).eval()
    failing = runner_of(sync)
    x = torch.randn(2, 4)
    failing(x)
    with pytest.warns(RuntimeWarning, match=r"inputs \(2, 4\) run without a graph.*not permitted"):
        assert torch.equal(failing(x), sync(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(failing(x), sync(x))

    runner(torch.randn(SHAPE))
    runner._capturer.error = torch.OutOfMemoryError("out of memory")
    with pytest.warns(RuntimeWarning, match="OutOfMemoryError"):
        runner(torch.randn(SHAPE))
    assert runner._capturer.live == 0
    capture(runner, torch.randn(1, 3, 32, 32))  # others are captured
    runner.clear()
    capture(runner, torch.randn(SHAPE))
    image = torch.randn(SHAPE)
    assert torch.equal(runner(image).logits, model(image).logits)


def test_errors_of_the_model_are_the_callers(runner):
    for _ in range(3):
        with pytest.raises(TypeError):
            runner(torch.randn(SHAPE).long())
    with pytest.raises(TypeError):
        runner()
    capture(runner, torch.randn(SHAPE))


def test_another_kind_of_device():
    runner = fastseg.graphed(nn.Linear(4, 4, device="meta").eval())
    assert runner(torch.ones(2, 4, device="meta")).is_meta
    assert "its input is on the meta" in runner.report()


class BrokenGraph:
    """A CUDAGraph whose capture begins, and ends with an error if it is told so."""

    def __init__(self, calls, error):
        self.calls, self.error = calls, error

    def capture_begin(self, **options):
        self.calls.append(("begin", options))

    def capture_end(self):
        self.calls.append("end")
        if self.error:
            raise self.error

    def reset(self):
        self.calls.append("reset")


class Generator:
    """The random generator of a device."""

    state = "now"

    def clone_state(self):
        return f"copy of {self.state}"

    def graphsafe_set_state(self, state):
        self.state = state


def no_function():
    raise ValueError("not while a graph is captured")


@pytest.mark.parametrize("ends", [True, False])
def test_clearing_up_after_a_capture(monkeypatch, ends):
    calls = []
    generator = Generator()
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(
            torch._C, name, lambda *given, name=name: calls.append((name, given)), raising=False
        )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    begin = ("begin", {"pool": (0, 1), "capture_error_mode": "thread_local"})
    given_up = [("_cuda_endAllocateToPool", (0, (0, 1))), ("_cuda_releasePool", (0, (0, 1)))]

    graph = BrokenGraph(calls, None if ends else RuntimeError("capture invalidated"))
    with pytest.raises(ValueError, match="not while"):
        graph_capture._capture(graph, (0, 1), no_function)
    assert calls == [begin, "end", *([] if ends else given_up), "reset"]
    assert generator.state == ("now" if ends else "copy of now")

    calls.clear()
    if ends:
        assert graph_capture._capture(graph, (0, 1), lambda: "result") == "result"
        assert calls == [begin, "end"]
    else:
        with pytest.raises(RuntimeError, match="invalidated"):
            graph_capture._capture(graph, (0, 1), lambda: "result")
        assert calls == [begin, "end", *given_up]

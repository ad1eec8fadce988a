"""Eval without gradients is fast; everything else runs the host's own forward, to the bit."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastseg
from tests.half_precision import half_bound

from .checks import (
    FP32_BOUND,
    assert_parity,
    errors,
    reference,
    relative_error,
    run,
    same_bits,
)


def loss_of(host, model, pixels):
    return sum(output.float().square().mean() for output in host.call(model, pixels))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def pair(host, model):
    """An accelerated model that has run fast, and the plain one that it was."""
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, torch.randn(1, 3, 64, 64))
    return model, plain


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_are_the_hosts(host, pair, pixels, calls, training):
    results = []
    for each in pair:
        each.train(training)
        torch.manual_seed(7)  # of dropout and stochastic depth
        loss = loss_of(host, each, pixels)
        loss.backward()
        results.append((loss.detach(), gradients(each), dict(each.named_buffers())))
    (loss, ours, buffers), (their_loss, theirs, their_buffers) = results
    assert calls == []
    assert torch.equal(loss, their_loss)
    assert list(ours) == list(theirs)
    assert len(ours) > 50
    assert same_bits(list(ours.values()), list(theirs.values()))
    assert same_bits(list(buffers.values()), list(their_buffers.values()))


def test_gradients_of_the_input(host, pair, pixels, calls):
    grads = []
    for each in pair:
        each.requires_grad_(False)
        leaf = pixels.clone().requires_grad_()
        loss_of(host, each, leaf).backward()
        grads.append(leaf.grad)
    assert calls == []
    assert torch.equal(*grads)


def test_training_mode_under_no_grad(host, pair, pixels, calls):
    model, plain = pair
    outputs = []
    for each in (model.train(), plain.train()):
        torch.manual_seed(7)
        outputs.append(run(host, each, pixels))
    assert calls == []
    assert same_bits(*outputs)


def test_back_to_eval_after_training(host, pair, pixels, calls):
    model, plain = pair
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    loss_of(host, model, pixels).backward()
    optimizer.step()
    optimizer.zero_grad()
    plain.load_state_dict(model.eval().state_dict())
    assert calls == []
    assert_parity(host, model, plain, pixels)
    assert calls.count_and_clear() == host.calls()


def test_gradients_on_and_nothing_that_asks_for_one(host, pair, pixels, calls):
    model, plain = pair
    outputs = host.call(model.requires_grad_(False), pixels)
    assert calls.count_and_clear() == host.calls()
    assert not any(output.requires_grad for output in outputs)
    for error in errors(outputs, reference(host, plain, pixels)):
        assert error <= FP32_BOUND


def test_plain_path(host, pair, pixels, calls):
    model, plain = pair
    with fastseg.plain_path():
        assert same_bits(run(host, model, pixels), run(host, plain, pixels))
    assert calls == []
    run(host, model, pixels)
    assert calls.count_and_clear() == host.calls()


def test_inference_mode(host, model, pixels, calls):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    with torch.inference_mode():
        results = host.call(model, pixels)
    assert calls.count_and_clear() == host.calls()
    # What was folded inside serves outside too.
    outside = run(host, model, pixels)
    for outputs in (results, outside):
        for error in errors(outputs, reference(host, plain, pixels)):
            assert error <= FP32_BOUND


def test_accelerated_and_first_run_in_inference_mode(host, model, pixels):
    plain = copy.deepcopy(model)
    with torch.inference_mode():
        fastseg.accelerate(model)
        host.call(model, pixels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    plain.load_state_dict(model.state_dict())
    assert_parity(host, model, plain, pixels)


def test_autocast(host, model, pixels):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(host, model, pixels)
        with fastseg.plain_path():  # for fastseg's own models
            theirs = run(host, plain, pixels)
    expected = reference(host, plain, pixels)
    for mine, their, exact in zip(ours, theirs, expected, strict=True):
        if exact.numel():
            bound = half_bound(relative_error(their, exact), torch.bfloat16)
            assert relative_error(mine, exact) <= bound


def test_threads_that_run_first_at_once(host, model, pixels):
    plain = copy.deepcopy(model)
    expected = reference(host, plain, pixels)
    fastseg.accelerate(model)
    barrier = threading.Barrier(4)
    results: list[list[torch.Tensor]] = []

    def first_forward():
        barrier.wait()
        results.append(run(host, model, pixels))

    threads = [threading.Thread(target=first_forward) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for outputs in results:
        for error in errors(outputs, expected):
            assert error <= FP32_BOUND


def trace_of(model, pixels):
    with torch.no_grad():
        return torch.jit.trace(model, pixels, check_trace=False, strict=False)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace")
def test_jit_trace(host, pair, pixels, calls):
    """A trace is the host's: it takes weights as they are when it runs."""
    model, plain = pair
    calls.clear()
    try:
        expected = trace_of(plain, pixels)
    except RuntimeError as refused:  # of outputs that are no tensors
        with pytest.raises(RuntimeError, match=str(refused)[:40]):
            trace_of(model, pixels)
        return
    calls.clear()
    traced = trace_of(model, pixels)
    assert calls == []
    assert same_bits(tree_leaves(traced(pixels)), tree_leaves(expected(pixels)))


def test_symbolic_trace(host, pair, pixels):
    """FX traces the host's own forward where it can trace the host at all."""
    model, plain = pair
    try:
        expected = torch.fx.symbolic_trace(plain)
    except Exception as refused:
        with pytest.raises(type(refused)):
            torch.fx.symbolic_trace(model)
        return
    traced = torch.fx.symbolic_trace(model)
    assert str(traced.graph) == str(expected.graph)
    assert same_bits(run(host, traced, pixels), run(host, expected, pixels))

"""The Mix-FFN that makes its hidden tensors again in backward, against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels.blocks import bilinear
from fastseg.training.mix_ffn import mix_ffn
from tests.half_precision import HALF_FACTOR
from tests.memory_cases import Allocated

EPS = 1e-5


def draw(channels=8, grid=(9, 7), batch=3, dtype=torch.float64):
    """Parameters, and x and an outer gradient."""
    hidden = 4 * channels
    shapes = [(channels,), (channels,), (hidden, channels), (hidden,)]
    shapes += [(hidden, 1, 3, 3), (hidden,), (channels, hidden), (channels,)]
    parameters = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    parameters = [one / one[0].numel() ** 0.5 for one in parameters]
    tokens = [torch.randn(batch, grid[0] * grid[1], channels, dtype=torch.float64) for _ in "xg"]
    return [one.to(dtype).requires_grad_() for one in parameters], *(
        one.to(dtype) for one in tokens
    )


def plain(x, height, width, parameters, factors=None, form="none"):
    gain, shift, w1, b1, taps, tap_bias, w2, b2 = parameters
    h = F.linear(F.layer_norm(x, x.shape[2:], gain, shift, EPS), w1, b1)
    grid = h.transpose(1, 2).unflatten(2, (height, width))
    a = F.conv2d(grid, taps, tap_bias, padding=1, groups=len(taps)).flatten(2).transpose(1, 2)
    y = F.linear(F.gelu(a, approximate=form), w2, b2)
    return x + (y if factors is None else factors.view(-1, 1, 1) * y)


def ours(x, height, width, parameters, factors=None, **options):
    options = {"activation": "gelu", **options}
    return mix_ffn(x, height, width, parameters, eps=EPS, factors=factors, **options)


def results(function, x, outer, grid, parameters, *arguments, **options):
    leaf = x.clone().requires_grad_()
    y = function(leaf, *grid, parameters, *arguments, **options)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *parameters], outer.to(y.dtype))]


def check_equal(found, exact):
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 1e-12 * (1 + other.norm())


@pytest.mark.parametrize("keep_hidden", [False, True])
@pytest.mark.parametrize("rows", [None, 8])  # of a stripe
@pytest.mark.parametrize("factors", [None, [1.25, 0.0, 1.25], [1.25] * 3, [0.0] * 3])
@pytest.mark.parametrize("grid", [(26, 3), (9, 7), (1, 1)])
def test_all_gradients(grid, factors, rows, keep_hidden, monkeypatch):
    parameters, x, outer = draw(grid=grid)
    if rows is not None:
        monkeypatch.setattr(bilinear, "STRIPE_BYTES", rows * grid[1] * 32 * 8)
    if factors is not None:
        factors = torch.tensor(factors, dtype=torch.float64)
    arguments = (x, outer, grid, parameters, factors)
    check_equal(results(ours, *arguments, keep_hidden=keep_hidden), results(plain, *arguments))


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh"])
def test_the_other_form_of_gelu(activation):
    parameters, x, outer = draw()
    arguments = (x, outer, (9, 7), parameters)
    found = results(ours, *arguments, activation=activation)
    check_equal(found, results(plain, *arguments, form="tanh"))


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(bilinear, "STRIPE_BYTES", 8 * 2 * 8 * 8)
    parameters, x, _ = draw(channels=2, grid=(17, 2), batch=1)
    factors = torch.tensor([1.5], dtype=torch.float64)

    def function(x, *parameters):
        return ours(x, 17, 2, list(parameters), factors)

    torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("keep_hidden", [False, True])
def test_what_is_kept(keep_hidden):
    """Of numbers a token: x, and the first hidden tensor where it is asked for."""
    parameters, x, _ = draw()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda one: kept.append(one.numel()) or one, lambda one: one
    ):
        ours(x.requires_grad_(), 9, 7, parameters, keep_hidden=keep_hidden)
    assert sum(kept) - sum(one.numel() for one in parameters) == x.numel() * (
        5 if keep_hidden else 1
    )


def test_memory(monkeypatch):
    """At most a few stripes in use at once, beside what is kept and the two gradients."""
    monkeypatch.setattr(bilinear, "STRIPE_BYTES", 1 << 18)
    parameters, x, outer = draw(channels=16, grid=(256, 32), batch=2, dtype=torch.float32)
    x.requires_grad_()
    peaks = []
    for function in (ours, plain):
        with Allocated() as memory:
            function(x, 256, 32, parameters).backward(outer)
        peaks.append(memory.peak)
    assert peaks[0] < 3 * x.nbytes + 8 * (1 << 18)
    assert peaks[0] < peaks[1] / 4


def test_a_picture_that_is_dropped_is_not_looked_at():
    parameters, x, outer = draw()
    x[1] = torch.inf
    outer[1] = torch.randn_like(outer[1])
    factors = torch.tensor([2.0, 0.0, 2.0], dtype=torch.float64)
    y, grad_x, *gradients = results(ours, x, outer, (9, 7), parameters, factors)
    assert torch.equal(y[1], x[1])
    assert torch.equal(grad_x[1], outer[1])
    assert all(one.isfinite().all() for one in (y[::2], grad_x[::2], *gradients))


def test_frozen_parameters():
    parameters, x, outer = draw()
    exact = results(plain, x, outer, (9, 7), parameters)
    for one in parameters:
        one.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    ours(leaf, 9, 7, parameters).backward(outer)
    check_equal([leaf.grad], [exact[1]])
    assert not ours(x, 9, 7, parameters).requires_grad


def test_empty_batch():
    parameters, x, outer = draw(batch=0)
    y, grad_x, *gradients = results(ours, x, outer, (9, 7), parameters, torch.empty(0))
    assert y.shape == grad_x.shape == (0, 63, 8)
    assert all(not one.any() for one in gradients)


@pytest.mark.parametrize("form", ["float32", "autocast", "bfloat16"])
def test_errors_are_no_larger(form):
    """Than those of torch's operators in the same precision, both against float64."""
    exact_parameters, x, outer = draw(channels=32, grid=(16, 16))
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    parameters = [one.detach().to(dtype).requires_grad_() for one in exact_parameters]
    with torch.no_grad():
        for one, rounded in zip(exact_parameters, parameters, strict=True):
            one.copy_(rounded)
    x, outer = (one.to(torch.bfloat16 if form == "autocast" else dtype) for one in (x, outer))
    exact = results(plain, x.double(), outer.double(), (16, 16), exact_parameters)
    errors = []
    for function in (ours, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
            found = results(function, x, outer, (16, 16), parameters)
        pairs = zip(found, exact, strict=True)
        errors.append([((one - other).norm() / other.norm()).item() for one, other in pairs])
    floor = 1e-6 if form == "float32" else 2e-3
    for one, usual in zip(*errors, strict=True):
        assert one < HALF_FACTOR * max(usual, floor)


@pytest.mark.slow
def test_registered_ops():
    parameters, x, outer = draw(batch=2, grid=(3, 2))
    factors = torch.tensor([1.0, 0.0])
    options = (3, 2, EPS, "none", torch.float64)
    ops = torch.ops.fastseg
    arguments = (x.requires_grad_(), factors, *parameters, *options, False)
    torch.library.opcheck(ops.mix_ffn_with_gradients.default, arguments)
    detached = [one.detach() for one in parameters]
    arguments = (outer, x.detach(), factors, x.new_empty(0), detached, *options, True)
    torch.library.opcheck(ops.mix_ffn_gradients.default, arguments)


def test_gradients_of_gradients_are_an_error():
    parameters, x, _ = draw()
    loss = ours(x.requires_grad_(), 9, 7, parameters).square().sum()
    with pytest.raises(RuntimeError, match="mix_ffn: .*plain_path"):
        torch.autograd.grad(loss, x, create_graph=True)

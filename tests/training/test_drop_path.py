"""Stochastic depth that does not compute what it leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastseg.models.drop_path import DropPath
from fastseg.training.drop_path import add_branch, draw_factors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_draws_as_the_module(dtype):
    drop_path = DropPath(0.4).train()
    ones = torch.ones(64, 5, 3, dtype=dtype)
    torch.manual_seed(1)
    expected = drop_path(ones)[:, 0, 0]
    torch.manual_seed(1)
    factors = draw_factors(drop_path, ones, dtype)
    assert 0 < factors.count_nonzero() < 64
    torch.testing.assert_close(factors.to(dtype), expected)


def test_draws_nothing():
    x = torch.ones(2, 3, 4)
    before = torch.random.get_rng_state()
    for module in (DropPath(0.0).train(), DropPath(0.5).eval(), nn.Identity()):
        assert draw_factors(module, x, x.dtype) is None
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("factors", [None, [2.0, 2, 2], [0.0, 2, 0], [0.0, 0, 0]])
def test_values_and_gradients(factors):
    layer = nn.Linear(4, 4).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    seen = []

    def branch(x):
        seen.append(len(x))
        return layer(x)

    results = []
    scale = torch.ones(3) if factors is None else torch.tensor(factors)
    for result in (
        add_branch(x, branch, None if factors is None else scale),
        x + scale.view(-1, 1, 1) * layer(x),
    ):
        leaves = (x, *layer.parameters())
        results.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert seen == [3 if factors is None else sum(factor > 0 for factor in factors)]

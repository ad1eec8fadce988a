"""Accelerated hosts compute what the plain ones do, on the fast path, in each dtype and shape."""

from __future__ import annotations

import copy

import pytest
import torch

import fastseg
from tests.half_precision import half_bound

from .checks import (
    FP32_BOUND,
    assert_parity,
    errors,
    reference,
    run,
)
from .host_models import FAMILIES, HOSTS, Host

SHAPES = [
    pytest.param(host, size, id=f"{host.name}-{size[0]}x{size[1]}")
    for host in HOSTS.values()
    for size in host.sizes()
]
# Widths of B0, where an error is a mean over enough roundings to compare with another.
WIDE = {"unit": 32, "depths": (1, 1, 1, 1)}


def test_hosts_of_this_process():
    """Nothing that `make test` asks for is left out for want of a library."""
    assert len(FAMILIES) == len(set(FAMILIES))
    for family in FAMILIES:
        assert any(name.startswith(family.rstrip("45")) for name in HOSTS)


@pytest.mark.parametrize(("host", "size"), SHAPES)
def test_float32(host: Host, size, calls):
    model = host.build()
    plain = copy.deepcopy(model)
    assert fastseg.accelerate(model) is model
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, *size)
        calls.clear()
        results = run(host, model, pixels)
        assert calls.count_and_clear() == host.calls()
        for error in errors(results, reference(host, plain, pixels)):
            assert error <= FP32_BOUND
    assert all(result.dtype == torch.float32 for result in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_as_the_host(host, dtype, calls):
    # The reference has the rounded weights and pixels, so that rounding inside is what is compared.
    model = host.build(**({} if host.name.startswith("smp") else WIDE)).to(dtype)
    plain = copy.deepcopy(model)
    pixels = torch.randn(2, 3, *host.sizes()[1]).to(dtype)
    fastseg.accelerate(model)
    ours = run(host, model, pixels)
    assert set(calls) == set(host.calls())
    expected = reference(host, plain, pixels)
    with fastseg.plain_path():  # for fastseg's own models
        theirs = run(host, plain, pixels)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for our_error, their_error in zip(
        errors(ours, expected), errors(theirs, expected), strict=True
    ):
        assert our_error <= half_bound(their_error, dtype)


def test_float64_is_exact_but_for_rounding(host, model, pixels):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model).double()
    for error in errors(run(host, model, pixels.double()), reference(host, plain, pixels)):
        # transformers' eager attention takes its softmax in float32; its default is sdpa.
        assert error <= 1e-12


def test_channels_last_and_strided_pixels(host, model):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    wide = torch.randn(2, 64, 128, 3).permute(0, 3, 1, 2)
    for pixels in (wide, wide[..., ::2], wide[:, :, :32]):
        assert_parity(host, model, plain, pixels)


def test_memory_of_logits(host, model, pixels):
    """transformers resizes image by image: on channels-last logits five times as slow."""
    if not host.name.startswith("transformers") or not hasattr(model, "decode_head"):
        pytest.skip("its users resize batches, or there are no maps of logits")
    outputs = run(host, fastseg.accelerate(model), pixels)
    logits = [one for one in outputs if one.shape[1] == model.config.num_labels]
    assert logits
    assert all(one.is_contiguous() for one in logits)


def test_batch_of_none(host, model):
    """What the plain host makes of an empty batch: maps without elements, or an error."""
    pixels = torch.randn(0, 3, 64, 64)
    plain = copy.deepcopy(model)
    try:
        expected = [tuple(t.shape) for t in run(host, plain, pixels)]
    except (RuntimeError, ValueError):
        pytest.skip("the plain host takes no empty batch")
    fastseg.accelerate(model)
    assert [tuple(t.shape) for t in run(host, model, pixels)] == expected

"""`accelerate(training=True)`: heads with gradients, against the host's own code in float64."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

import fastseg
from fastseg.training.masks import compared

from .host_models import WHOLE

# DAFormer's and mmseg's have none: the former concatenates the other way round, the latter has a
# ReLU in between.
HEADS = {name: host for name, host in WHOLE.items() if name != "mmseg"}


def results(host, model, pixels):
    model.zero_grad()
    torch.manual_seed(7)  # of dropout and stochastic depth
    outputs = host.call(model, pixels)
    sum(one.square().mean() for one in outputs).backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return outputs, gradients, [one.clone() for one in model.buffers()]


@pytest.mark.parametrize("host", HEADS.values(), ids=HEADS)
def test_outputs_gradients_and_statistics(host, head_forms):
    model = host.build().double().train()
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with fastseg.plain_path():
        outputs, exact, buffers = results(host, copy.deepcopy(model), pixels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training: no loss is taken over")
        fastseg.accelerate(model, training=True)
    head_forms.clear()
    with compared():
        ours, found, moved = results(host, model, pixels)
    assert head_forms == ["logits_in_stripes"]
    assert "with gradients: every projection at its own stage's size" in fastseg.report(model)
    assert found.keys() == exact.keys()
    largest = max(one.norm() for one in exact.values())
    for name, one in exact.items():
        assert (found[name] - one).norm() < 1e-12 * one.norm() + 1e-14 * largest, name
    for some, others in ((ours, outputs), (moved, buffers)):
        for one, other in zip(some, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    fastseg.accelerate(model)
    head_forms.clear()
    with fastseg.plain_path():
        results(host, model, pixels)
    assert not head_forms


LOOPS = {name: host for name, host in WHOLE.items() if name in ("nvlabs", "mmseg")}


@pytest.mark.parametrize("host", LOOPS.values(), ids=LOOPS)
def test_the_loss_of_a_loop_of_its_own(host):
    """As these libraries resize logits, with weights of classes, and over all pixels."""
    model = host.build().double().train()
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 64, 96))
    labels[0, :40] = 255
    weight = torch.rand(5, dtype=torch.float64) + 0.5

    def gradients(model, loss):
        torch.manual_seed(7)
        with compared():
            found = loss(host.call(model, pixels)[0])
        found.backward()
        return found.item(), {name: one.grad for name, one in model.named_parameters()}

    def plain_loss(logits):
        resized = nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear")
        options = {"ignore_index": 255, "reduction": "none"}
        return nn.functional.cross_entropy(resized, labels, weight, **options).mean()

    expected, exact = gradients(copy.deepcopy(model), plain_loss)
    with pytest.warns(UserWarning, match="your loop may call fastseg.kernels.upsample_cross"):
        fastseg.accelerate(model, training=True)
    sums = functools.partial(
        fastseg.kernels.upsample_cross_entropy, labels=labels, weight=weight, reduction="sum"
    )
    loss, found = gradients(model, lambda logits: sums(logits) / labels.numel())
    assert loss == pytest.approx(expected, rel=1e-12)
    largest = max(one.norm() for one in exact.values() if one is not None)
    for name, one in exact.items():
        if one is None:  # of mmseg's conv_seg in NVlabs' head, which nothing calls
            assert found[name] is None
        else:
            assert (found[name] - one).norm() < 1e-12 * one.norm() + 1e-14 * largest, name

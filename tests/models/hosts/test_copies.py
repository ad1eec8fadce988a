"""Copies of NVlabs' code with small changes are taken; what only looks like one is named."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg

from . import nvlabs
from .host_models import randomize
from .nvlabs_copies import DAFormerHead, ListMiT, MiT

COPIES = {
    "sithu31296": lambda: nvlabs.EncoderDecoder(MiT(), nvlabs.SegFormerHead()),
    "bubbliiiing": lambda: nvlabs.EncoderDecoder(ListMiT(), nvlabs.SegFormerHead()),
    "DAFormer": lambda: nvlabs.EncoderDecoder(
        nvlabs.MixVisionTransformer(depths=(2, 1, 1, 1)), DAFormerHead()
    ),
}


def drawn(model):
    torch.manual_seed(0)
    randomize(model)
    return model.eval()


def relative(result, expected):
    return ((result.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("size", [(64, 96), (75, 69)])
def test_parity_with_float64(name, size):
    model = drawn(COPIES[name]())
    wide = copy.deepcopy(model).double()
    pixels = torch.randn(2, 3, *size)
    assert fastseg.accelerate(model, strict=True) is model
    with torch.no_grad():
        expected, expected_maps = wide(pixels.double()), wide.backbone(pixels.double())
        result, maps = model(pixels), model.backbone(pixels)
        plain = fastseg.restore(model).backbone(pixels)
    assert type(maps) is type(plain)  # some have lists, some tuples
    assert relative(result, expected) < 1e-5
    for one, wanted in zip(maps, expected_maps, strict=True):
        assert relative(one, wanted) < 1e-5


@pytest.mark.parametrize("name", COPIES)
def test_the_report_and_pickles(name):
    model = fastseg.accelerate(drawn(COPIES[name]()))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels)
        lines = fastseg.report(model).splitlines()
        assert [": folded" in line for line in lines] == [True, True]
        torch.testing.assert_close(copy.deepcopy(model)(pixels), expected)


def test_an_activation_by_name_of_another_function():
    """Where there is no module for it, GELU is taken for it, and tried out."""
    model = drawn(MiT(function=F.relu))
    fastseg.accelerate(model)
    with torch.no_grad():
        assert "Mix-FFN: the host's own: changed" not in fastseg.report(model)
        assert "computes something else" in fastseg.report(model)
    with pytest.raises(ValueError, match="computes something else"):
        fastseg.accelerate(drawn(MiT(function=F.relu)), strict=True)


class Elsewhere(nn.Module):
    """A head of other names than those known, beside an encoder that is known."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head


def strange_head():
    head = nvlabs.SegFormerHead()
    head.scales = nn.ModuleList(getattr(head, f"linear_c{stage}") for stage in (1, 2, 3, 4))
    for stage in (1, 2, 3, 4):
        delattr(head, f"linear_c{stage}")
    return head


@pytest.mark.parametrize(
    ("strange", "build"),
    [
        ("encoder", lambda: Elsewhere(MiT(embed="patch_embedding"), nvlabs.SegFormerHead())),
        ("head", lambda: Elsewhere(MiT(), strange_head())),
    ],
)
def test_what_looks_like_one_is_named(strange, build):
    model = build().eval()
    fastseg.accelerate(model)
    (line,) = (one for one in fastseg.report(model).splitlines() if "looks like" in one)
    assert line.startswith(f"{strange}: the host's own: it looks like")
    with pytest.raises(ValueError, match=f"{strange}: it looks like a part of a SegFormer"):
        fastseg.accelerate(model, strict=True)
    fastseg.restore(model)
    assert "_fastseg_refusal" not in model.get_submodule(strange).__dict__


def test_nothing_known_but_something_like_it():
    model = Elsewhere(MiT(embed="patch_embedding"), strange_head())
    with pytest.raises(ValueError, match="encoder: it looks like .* head: it looks like"):
        fastseg.accelerate(model)
    with pytest.raises(ValueError, match="expected one with a model of fastseg"):
        fastseg.report(model)  # it is as it was

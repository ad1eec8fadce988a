"""Copies of NVlabs' code with small changes are taken; what only looks like one is named."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg

from . import nvlabs
from .checks import errors
from .host_models import randomize
from .nvlabs_copies import ListMiT, MiT


def drawn(model):
    torch.manual_seed(0)
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("build", [MiT, ListMiT])
def test_maps_come_in_what_the_copy_gives_them_in(build):
    """A tuple or a list."""
    model = drawn(build())
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(pixels)
        maps = fastseg.accelerate(model, strict=True)(pixels)
        assert "folded" in fastseg.report(model)
    assert type(maps) is type(plain)


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


def test_pvt_v2_under_nvlabs_names():
    """As whai362's, for detection and segmentation: the tree of NVlabs', with a wider Mix-FFN."""
    model = drawn(nvlabs.MixVisionTransformer(mlp_ratios=(8, 8, 4, 4), depths=(2, 1, 1, 1)))
    wide = copy.deepcopy(model).double()
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = wide(pixels.double())
        results = fastseg.accelerate(model, strict=True)(pixels)
    assert max(errors(results, expected)) < 1e-5

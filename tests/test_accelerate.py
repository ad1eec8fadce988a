"""`accelerate` and `restore`: what they are given, and what they leave alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastseg
from tests.models.hosts import nvlabs


def test_nothing_to_accelerate():
    for model in (nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))):
        with pytest.raises(ValueError, match=f"model: .*{type(model).__name__}"):
            fastseg.accelerate(model)


@pytest.mark.parametrize("model", [None, "segformer_b0", {"a": torch.ones(1)}, nn.Linear])
def test_no_module(model):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        fastseg.accelerate(model)


def test_restore_of_a_plain_model():
    model = nn.Linear(2, 2)
    assert fastseg.restore(model) is model


def test_random_state_is_left_alone():
    model = nvlabs.MixVisionTransformer()
    before = torch.get_rng_state()
    fastseg.accelerate(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_in_one_model():
    """Two encoders and what is between them: both are taken."""
    model = nn.ModuleDict(
        {name: nvlabs.MixVisionTransformer() for name in ("student", "teacher")}
    ).eval()
    fastseg.accelerate(model, strict=True)
    with torch.no_grad():
        lines = fastseg.report(model).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["student", "teacher"]
    fastseg.restore(model["teacher"])
    assert type(model["teacher"]) is nvlabs.MixVisionTransformer
    assert type(model["student"]) is not nvlabs.MixVisionTransformer


def test_synchronised_batch_norm_in_a_head():
    """What mmseg's configurations train with; in eval mode it is BatchNorm."""
    model = nvlabs.SegFormerHead(norm=nn.SyncBatchNorm).eval()
    maps = [torch.randn(1, 8 * heads, 16 >> i, 24 >> i) for i, heads in enumerate((1, 2, 5, 8))]
    with torch.no_grad():
        expected = model.double()([one.double() for one in maps])
        fastseg.accelerate(model.float(), strict=True)
        result = model(maps)
    assert (result - expected).square().mean().sqrt() <= 2e-6 * expected.square().mean().sqrt()


@pytest.mark.slow
def test_no_host_library_is_imported():
    """By `accelerate`, and by the command line, run as a module."""
    code = """
import runpy, sys
import fastseg
from tests.models.hosts import nvlabs
fastseg.accelerate(nvlabs.MixVisionTransformer())
sys.argv = ["fastseg", "info"]
try:
    runpy.run_module("fastseg", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
assert not {"transformers", "timm", "segmentation_models_pytorch", "mmseg"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("versions")

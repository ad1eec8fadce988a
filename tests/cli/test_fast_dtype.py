"""`--dtype fast`: which dtype on which device, and what `predict` and `info` tell of it."""

from __future__ import annotations

import pytest
import torch

import fastseg
from fastseg.cli import main
from fastseg.kernels.core import precision
from tests.cli.cli_cases import read_labels, segmented

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "expected", "why"),
    [
        (True, True, torch.bfloat16, "AMX"),
        (False, True, torch.bfloat16, "AVX512-BF16"),
        (False, False, torch.float32, "neither"),
    ],
)
def test_of_a_cpu(monkeypatch, amx, avx512, expected, why, model_folder):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    dtype, reason = precision.fast_dtype(CPU)
    assert dtype == expected
    assert why in reason
    for load in (fastseg.from_pretrained, fastseg.SegformerForSemanticSegmentation.from_pretrained):
        assert load(model_folder, dtype="fast", device="cpu").dtype == expected


def test_of_a_gpu(monkeypatch):
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, has=has, **__: has)
        assert precision.fast_dtype(torch.device("cuda"))[0] == expected
    assert precision.fast_dtype(torch.device("mps"))[0] == torch.float32


def test_torch_tells():
    """The names that `fast_dtype` asks by, which are torch's own and not public."""
    assert torch.cpu._is_amx_tile_supported() in (False, True)
    assert torch.cpu._is_avx512_bf16_supported() in (False, True)


@pytest.mark.parametrize("has", [False, True])
def test_predict(monkeypatch, has, predict, photos, tmp_path, model_folder, capsys):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    path = photos / "below" / "astronaut.png"
    assert predict(path, "--no-overlay", "--dtype", "fast") == 0
    said = capsys.readouterr().err
    labels = read_labels(tmp_path / "out" / "astronaut_labels.png")
    from PIL import Image

    with Image.open(path) as image:
        share = (labels == segmented(model_folder, image)).mean()
    if has:
        assert f"{share:.2%} of the first picture's labels are those of float32" in said
    else:
        assert share == 1
        assert "those of float32" not in said


def test_info(capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert main(["info"]) == 0
    assert "--dtype fast bfloat16: the CPU has AMX" in capsys.readouterr().out

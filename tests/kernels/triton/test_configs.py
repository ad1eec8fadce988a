"""Every committed launch configuration, of all families, computes what float64 does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastseg.kernels import upsample_scores
from fastseg.kernels.core.configurations import FAMILIES, family_entries
from fastseg.kernels.core.launch import record_launches
from tests.kernels.triton.embed.embed_cases import FORMS, parameters, patch_embed, tokens_map
from tests.kernels.triton.ffn.ffn_cases import mix_ffn, weights
from tests.kernels.triton.head.head_cases import NARROW, decode_head, head
from tests.kernels.triton.kernel_cases import INTERPRETING, check_parity, randn, set_config
from tests.kernels.triton.labels.label_cases import check

# They change the code that a GPU runs, and nothing in the interpreter.
OF_THE_GPU = ("num_warps", "num_stages", "maxnreg") if INTERPRETING else ()


def committed(kernel: str, by_dtype: bool = False) -> list[Any]:
    """The distinct configurations of a kernel as parameters of a test, each with an entry of it.

    With `by_dtype` one that serves halves and float32 is two, whose names tell which: of those in
    half precision the interpreter runs a third.
    """
    found: dict[str, tuple[dict, dict]] = {}
    for family in ("default", *FAMILIES):
        for entry in family_entries(family).get(kernel, []):
            config = entry["config"]
            key = {name: config[name] for name in sorted(config) if name not in OF_THE_GPU}
            if by_dtype:
                key["dtype"] = entry["dtype"]
            found.setdefault(json.dumps(key), (config, entry))
    return [
        pytest.param(config, entry, id=f"{entry['dtype']} {number}" if by_dtype else str(number))
        for number, (config, entry) in enumerate(found.values())
    ]


@pytest.mark.parametrize(("config", "entry"), committed("mix_ffn", by_dtype=True))
def test_mix_ffn(config, entry, device, monkeypatch):
    set_config(monkeypatch, "mix_ffn", config)
    dtype = torch.float32 if entry["dtype"] == "float32" else torch.bfloat16
    channels, norm = entry["sizes"]["channels"], entry["sizes"]["tokens"] > 2048
    tile_width = config["BLOCK_X"] * config["STRIP"]
    grid = (3, tile_width + 1) if config["BLOCK_Y"] < 8 else (9, tile_width - 1)
    x = randn(1, grid[0] * grid[1], channels, dtype=dtype, device=device)
    folded = weights(channels, dtype, device, 1 if channels > 160 else 2, norm=norm)
    with record_launches(dry=True) as launches:
        mix_ffn(x, *grid, **folded)
    assert {k: v for k, v in config.items() if k != "form"}.items() <= launches[1].options.items()
    check_parity(mix_ffn, x, *grid, **folded)


@pytest.mark.parametrize(("config", "entry"), committed("decode_head"))
@pytest.mark.parametrize("classes", [19, 150])
def test_decode_head(config, entry, classes, device, monkeypatch):
    set_config(monkeypatch, "decode_head", config)
    sizes = ((9, 10), (5, 5), (3, 3), (2, 2))
    check_parity(decode_head, *head(1, sizes, NARROW, 64, classes, torch.half, device))


@pytest.mark.parametrize(("config", "entry"), committed("decode_head_project"))
def test_decode_head_project(config, entry, device, monkeypatch):
    set_config(monkeypatch, "decode_head_project", config)
    sizes, channels = ((9, 10), (5, 9), (3, 3), (2, 2)), (32, 64, 128, 192)
    check_parity(decode_head, *head(3, sizes, channels, 96, 2, torch.half, device))


@pytest.mark.parametrize(("config", "entry"), committed("patch_embed"))
def test_patch_embed(config, entry, device, monkeypatch):
    set_config(monkeypatch, "patch_embed", config)
    channels = {32: 160, 64: 64, 128: 256, 256: 256}[config["BLOCK_N"]]
    feature_map = tokens_map(2, 64, 3, 4, torch.float16, device)
    of_layer = parameters(64, channels, 3, torch.float16, device)
    check_parity(patch_embed, feature_map, *of_layer, stride=2, padding=1, eps=1e-6)


@pytest.mark.parametrize("channels", [32, 160, 512])
@pytest.mark.parametrize(("config", "entry"), committed("patch_embed_pixels"))
def test_patch_embed_pixels(config, entry, channels, device, monkeypatch):
    set_config(monkeypatch, "patch_embed_pixels", config)
    pixels = torch.randn(1, 3, 9, 20, device=device)
    of_layer = parameters(3, channels, 7, torch.float32, device)
    check_parity(patch_embed, pixels, *of_layer, stride=4, padding=3, eps=1e-6)


@pytest.mark.parametrize(("config", "entry"), committed("patch_embed_reduce"))
def test_patch_embed_reduce(config, entry, device, monkeypatch):
    set_config(monkeypatch, "patch_embed_reduce", config)
    set_config(monkeypatch, "patch_embed", FORMS["split"])
    feature_map = tokens_map(3, 32, 5, 5, torch.float32, device)
    of_layer = parameters(32, 96, 3, torch.float32, device)
    check_parity(patch_embed, feature_map, *of_layer, stride=2, padding=1, eps=1e-6)


@pytest.mark.parametrize(
    ("kernel", "size"), [("upsample_argmax", (52, 44)), ("upsample_argmax_gather", (9, 10))]
)
def test_upsample_argmax(kernel, size, device, monkeypatch):
    for case in committed(kernel):
        set_config(monkeypatch, kernel, case.values[0])
        check(torch.randn(2, 5, 13, 11, device=device), size, f"{kernel}_kernel")


def test_upsample_scores(device, monkeypatch):
    for case in committed("upsample_scores"):
        set_config(monkeypatch, "upsample_scores", case.values[0])
        check_parity(upsample_scores, torch.randn(2, 5, 13, 11, device=device), (52, 44))

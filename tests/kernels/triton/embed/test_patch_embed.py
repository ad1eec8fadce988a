"""Patch embedding kernels: parity with float64, edges, pixels of all kinds, forms, wrong input."""

from __future__ import annotations

import pytest
import torch

import fastseg
from fastseg.kernels.core.launch import record_launches
from tests.kernels.triton.embed.embed_cases import FORMS, parameters, patch_embed, tokens_map
from tests.kernels.triton.kernel_cases import DTYPES, check_parity, randn, set_config


def launched(*arguments, **keywords):
    with record_launches() as launches:
        patch_embed(*arguments, **keywords)
    return [launch.name for launch in launches]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "in_channels", "channels", "size", "grid"),
    [
        (1, 3, 32, (1, 1), (1, 1)),
        (3, 3, 64, (7, 10), (2, 3)),
        (1, 3, 160, (27, 19), (7, 5)),
        (1, 1, 32, (129, 36), (33, 9)),
        (3, 4, 40, (8, 5), (2, 2)),
    ],
)
def test_pixels(batch, in_channels, channels, size, grid, dtype, device):
    pixels = randn(batch, in_channels, *size, dtype=dtype, device=device)
    weights = parameters(in_channels, channels, 7, dtype, device)
    tokens, *found = check_parity(patch_embed, pixels, *weights, stride=4, padding=3, eps=1e-6)
    assert tuple(found) == grid
    assert tokens.is_contiguous()
    assert launched(pixels, *weights, stride=4, padding=3, eps=1e-6) == [
        "patch_embed_pixels_kernel"
    ]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 2, 1), (2, 2, 0), (5, 1, 2), (3, 4, 0), (3, 2, 4), (1, 1, 0), (16, 16, 0)],
)
def test_pixels_under_other_kernels(kernel, stride, padding, device):
    pixels = torch.randn(2, 3, 16, 17, device=device)
    weights = parameters(3, 32, kernel, torch.float32, device)
    check_parity(patch_embed, pixels, *weights, stride=stride, padding=padding, eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "pixel_dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_normalisation_of_pixels(pixel_dtype, dtype, device):
    """With an offset far from 0: were the padding normalised too, every edge would show it."""
    pixels = torch.randint(0, 256, (2, 3, 9, 14), device=device).to(pixel_dtype)
    scale = torch.tensor([0.02, 0.01, 0.03], device=device)
    offset = torch.tensor([-2.0, 3.0, 5.0], device=device)
    weights = parameters(3, 32, 7, dtype, device)
    keywords = {"stride": 4, "padding": 3, "eps": 1e-6, "pixel_scale": scale}
    check_parity(patch_embed, pixels, *weights, **keywords)
    tokens, *_ = check_parity(patch_embed, pixels, *weights, **keywords, pixel_offset=offset)
    normalised = (pixels.float() * scale[:, None, None] + offset[:, None, None]).to(dtype)
    plain, *_ = patch_embed(normalised, *weights, stride=4, padding=3, eps=1e-6)
    bound = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(tokens, plain, rtol=bound, atol=bound)


def test_an_offset_alone(device):
    pixels = torch.randn(1, 2, 9, 9, device=device)
    offset = torch.tensor([4.0, -1.0], device=device)
    weights = parameters(2, 32, 3, torch.float32, device)
    check_parity(patch_embed, pixels, *weights, stride=2, padding=1, eps=1e-6, pixel_offset=offset)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "flipped"])
@pytest.mark.parametrize("pixel_dtype", [torch.uint8, torch.float32], ids=str)
def test_layouts_of_pixels(layout, pixel_dtype, device):
    pixels = torch.randint(0, 256, (2, 3, 12, 18), device=device).to(pixel_dtype)
    pixels = {
        "channels_last": pixels.contiguous(memory_format=torch.channels_last),
        "sliced": pixels[:, :, 1::2, 3:-2],
        "expanded": pixels[:1, :1].expand(2, 3, 12, 18),
        "flipped": pixels.transpose(2, 3),
    }[layout]
    weights = parameters(3, 32, 7, torch.float32, device)
    scale = torch.full((3,), 0.02, device=device)
    check_parity(patch_embed, pixels, *weights, stride=4, padding=3, eps=1e-6, pixel_scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "in_channels", "channels", "size", "grid"),
    [
        (1, 32, 64, (1, 2), (1, 1)),
        (3, 64, 128, (3, 5), (2, 3)),
        (1, 64, 160, (13, 10), (7, 5)),
        (3, 160, 256, (2, 1), (1, 1)),
        (1, 128, 320, (4, 5), (2, 3)),
        (1, 32, 32, (65, 18), (33, 9)),
    ],
)
def test_tokens(batch, in_channels, channels, size, grid, dtype, device):
    """With the committed configurations."""
    feature_map = tokens_map(batch, in_channels, *size, dtype, device)
    weights = parameters(in_channels, channels, 3, dtype, device)
    tokens, *found = check_parity(patch_embed, feature_map, *weights, stride=2, padding=1, eps=1e-6)
    assert tuple(found) == grid
    assert tokens.is_contiguous()


@pytest.mark.parametrize("form", FORMS)
def test_widest_tokens(form, device, monkeypatch):
    set_config(monkeypatch, "patch_embed", FORMS[form] | {"BLOCK_N": 128, "BLOCK_K": 64})
    feature_map = tokens_map(1, 320, 3, 3, torch.float16, device)
    weights = parameters(320, 512, 3, torch.float16, device)
    check_parity(patch_embed, feature_map, *weights, stride=2, padding=1, eps=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [64, 160])
def test_forms(form, channels, dtype, device, monkeypatch):
    set_config(monkeypatch, "patch_embed", FORMS[form])
    feature_map = tokens_map(3, 64, 9, 7, dtype, device)
    weights = parameters(64, channels, 3, dtype, device)
    keywords = {"stride": 2, "padding": 1, "eps": 1e-6}
    check_parity(patch_embed, feature_map, *weights, **keywords)
    kernels = {
        "whole_row": ["patch_embed_whole_row_kernel"],
        "split": ["patch_embed_split_kernel", "patch_embed_reduce_kernel"],
    }
    assert launched(feature_map, *weights, **keywords) == kernels[form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (5, 3, 2), (1, 1, 0), (3, 1, 3), (7, 4, 3)]
)
def test_tokens_under_other_kernels(kernel, stride, padding, form, device, monkeypatch):
    set_config(monkeypatch, "patch_embed", FORMS[form])
    feature_map = tokens_map(2, 32, 9, 8, torch.float32, device)
    weights = parameters(32, 64, kernel, torch.float32, device)
    check_parity(patch_embed, feature_map, *weights, stride=stride, padding=padding, eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["pixels", *FORMS])
def test_rows_far_from_zero(kind, dtype, device, monkeypatch):
    """The convolution's rows have a mean of 100 times their deviation."""
    in_channels = 3 if kind == "pixels" else 32
    if kind in FORMS:
        set_config(monkeypatch, "patch_embed", FORMS[kind])
    feature_map = tokens_map(2, in_channels, 9, 9, dtype, device)
    weight, bias, norm_weight, norm_bias = parameters(in_channels, 64, 3, dtype, device)
    weights = (weight, torch.full_like(bias, 100.0), norm_weight, norm_bias)
    check_parity(patch_embed, feature_map, *weights, stride=2, padding=1, eps=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_and_tiny_values(dtype, scale, device):
    for in_channels in (3, 32):
        feature_map = tokens_map(1, in_channels, 9, 9, dtype, device) * scale
        weight, bias, *norm = parameters(in_channels, 64, 3, dtype, device)
        check_parity(
            patch_embed, feature_map, weight, bias * scale, *norm, stride=2, padding=1, eps=1e-6
        )


@pytest.mark.parametrize("kind", ["pixels", *FORMS])
def test_constant_rows_give_the_bias(kind, device, monkeypatch):
    in_channels = 3 if kind == "pixels" else 32
    if kind in FORMS:
        set_config(monkeypatch, "patch_embed", FORMS[kind])
    weight, bias, norm_weight, norm_bias = parameters(in_channels, 160, 3, torch.float32, device)
    feature_map = torch.randn(1, in_channels, 5, 5, device=device)
    weights = (torch.zeros_like(weight), torch.full_like(bias, 0.5), norm_weight, norm_bias)
    tokens, *_ = patch_embed(feature_map, *weights, stride=2, padding=1, eps=1e-6)
    assert torch.equal(tokens, norm_bias.expand(1, 9, 160))


@pytest.mark.parametrize("kind", ["pixels", *FORMS])
def test_nan_stays_in_the_patches_that_hold_it(kind, device, monkeypatch):
    in_channels = 3 if kind == "pixels" else 32
    if kind in FORMS:
        set_config(monkeypatch, "patch_embed", FORMS[kind])
    feature_map = tokens_map(2, in_channels, 8, 8, torch.float32, device)
    feature_map[1, 1, 3, 4] = float("nan")
    weights = parameters(in_channels, 64, 3, torch.float32, device)
    tokens, *_ = patch_embed(feature_map, *weights, stride=2, padding=1, eps=1e-6)
    expected = torch.zeros(2, 4, 4, dtype=torch.bool, device=device)
    expected[1, 1:3, 2] = True  # rows 1..3 and 3..5 hold row 3, columns 3..5 alone hold column 4
    isnan = tokens.isnan().view(2, 4, 4, 64)
    assert torch.equal(isnan.all(dim=-1), expected)
    assert torch.equal(isnan.any(dim=-1), expected)


@pytest.mark.parametrize("layout", ["NCHW", "sliced"])
@pytest.mark.parametrize("in_channels", [3, 32])
def test_memory_that_is_not_as_expected(in_channels, layout, device):
    feature_map = torch.randn(2, in_channels, 9, 16, device=device)
    if layout == "sliced":
        feature_map = feature_map[..., ::2]
    weight, *rest = parameters(in_channels, 64, 3, torch.float32, device)
    rest = [torch.stack([tensor, tensor], dim=1)[:, 0] for tensor in rest]
    check_parity(
        patch_embed, feature_map, weight.contiguous(), *rest, stride=2, padding=1, eps=1e-6
    )


def test_empty_batch(device):
    for in_channels in (3, 32):
        feature_map = torch.randn(0, in_channels, 9, 9, device=device)
        weights = parameters(in_channels, 64, 3, torch.float32, device)
        tokens, *grid = patch_embed(feature_map, *weights, stride=2, padding=1, eps=1e-6)
        assert (tokens.shape, grid) == ((0, 25, 64), [5, 5])


def test_wrong_input(device):
    pixels = torch.randn(1, 3, 8, 8, device=device)
    weights = parameters(3, 32, 7, torch.float32, device)
    weight, bias, *norm = weights
    keywords = {"stride": 4, "padding": 3, "eps": 1e-6}
    scale = torch.ones(3, device=device)
    with pytest.raises(TypeError, match="feature_map: expected floating-point, or a pixel_scale"):
        patch_embed(pixels.byte(), *weights, **keywords)
    with pytest.raises(TypeError, match="feature_map: expected floating-point or uint8, got"):
        patch_embed(pixels.int(), *weights, **keywords, pixel_scale=scale)
    with pytest.raises(TypeError, match="feature_map: expected torch.float32 as the weight"):
        patch_embed(pixels.half(), *weights, **keywords)
    with pytest.raises(TypeError, match="feature_map: expected a tensor, got ndarray"):
        patch_embed(pixels.cpu().numpy(), *weights, **keywords)
    with pytest.raises(TypeError, match="pixel_scale: expected torch.float32, got"):
        patch_embed(pixels, *weights, **keywords, pixel_scale=scale.half())
    with pytest.raises(ValueError, match=r"pixel_offset: expected shape \(3,\) .* got \(4,\)"):
        patch_embed(pixels, *weights, **keywords, pixel_offset=torch.ones(4, device=device))
    with pytest.raises(ValueError, match=r"pixel_offset: .* on .*, got \(3,\) on meta"):
        patch_embed(pixels, *weights, **keywords, pixel_offset=scale.to("meta"))
    with pytest.raises(ValueError, match=r"feature_map: expected shape \(batch, 3, height, width"):
        patch_embed(pixels[:, :2], *weights, **keywords)
    with pytest.raises(ValueError, match="feature_map: expected a tensor on .*, got meta"):
        patch_embed(pixels.to("meta"), *weights, **keywords)
    with pytest.raises(ValueError, match="feature_map: expected at least 7x7 for a kernel of 7"):
        patch_embed(pixels[:, :, :6], *weights, stride=4, padding=0, eps=1e-6)
    with pytest.raises(ValueError, match="feature_map: expected at least 1x1"):
        patch_embed(pixels[:, :, :0], *weights, stride=4, padding=4, eps=1e-6)
    with pytest.raises(ValueError, match="stride, padding: expected"):
        patch_embed(pixels, *weights, stride=0, padding=3, eps=1e-6)
    with pytest.raises(ValueError, match="weight: expected"):
        patch_embed(pixels, weight[..., :3], bias, *norm, **keywords)
    with pytest.raises(ValueError, match=r"bias: expected shape \(32,\), got \(31,\)"):
        patch_embed(pixels, weight, bias[:31], *norm, **keywords)
    with pytest.raises(TypeError, match="norm_bias: expected torch.float32 as the others"):
        patch_embed(pixels, weight, bias, norm[0], norm[1].half(), **keywords)


@pytest.mark.parametrize(
    ("in_channels", "channels", "kernel", "dtype", "reason"),
    [
        (40, 32, 7, torch.float32, "40 input channels, .* are more than 128"),
        (3, 544, 7, torch.float32, "544 channels are more than 512"),
        (32, 544, 3, torch.float16, "544 channels are more than 512"),
        (12, 192, 7, torch.float32, "12 input channels, .* too many for shared memory"),
        (3, 32, 7, torch.float64, "no kernels for torch.float64"),
    ],
)
def test_what_the_kernels_decline(in_channels, channels, kernel, dtype, reason, device):
    feature_map = torch.randn(1, in_channels, 8, 8, device=device, dtype=dtype)
    weights = parameters(in_channels, channels, kernel, dtype, device)
    with pytest.raises(RuntimeError, match=reason):
        patch_embed(feature_map, *weights, stride=2, padding=3, eps=1e-6)
    with fastseg.backend("auto"):
        tokens, *_ = patch_embed(feature_map, *weights, stride=2, padding=3, eps=1e-6)
    side = (8 + 6 - kernel) // 2 + 1
    assert tokens.shape == (1, side * side, channels)


def test_autocast_runs_the_eager_twin(device):
    pixels = torch.randn(1, 3, 8, 8, device=device)
    weights = parameters(3, 32, 7, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        with pytest.raises(RuntimeError, match="autocast is on"):
            patch_embed(pixels, *weights, stride=4, padding=3, eps=1e-6)
        with fastseg.backend("auto"):
            assert not launched(pixels, *weights, stride=4, padding=3, eps=1e-6)


def test_in_a_compiled_graph(device):
    pixels = torch.randint(0, 256, (1, 3, 9, 9), device=device, dtype=torch.uint8)
    scale = torch.full((3,), 0.02, device=device)
    weights = parameters(3, 32, 7, torch.float32, device)

    def embed(pixels):
        return patch_embed(pixels, *weights, stride=4, padding=3, eps=1e-6, pixel_scale=scale)

    tokens, *grid = torch.compile(embed, fullgraph=True, backend="eager")(pixels)
    expected, *expected_grid = embed(pixels)
    assert torch.equal(tokens, expected)
    assert grid == expected_grid


def test_registration(device):
    op = torch.ops.fastseg.patch_embed.default
    layer = {"stride": 2, "padding": 1, "eps": 1e-6}
    names = ("weight", "bias", "norm_weight", "norm_bias")
    for in_channels in (3, 32):
        feature_map = torch.randn(2, in_channels, 5, 6, device=device)
        weights = parameters(in_channels, 32, 3, torch.float32, device)
        flat = {**dict(zip(names, weights, strict=True)), **layer}
        torch.library.opcheck(op, (feature_map, None, None), flat)
    pixels = torch.randint(0, 256, (1, 3, 5, 5), device=device, dtype=torch.uint8)
    weights = parameters(3, 32, 3, torch.float16, device)
    scale = torch.ones(3, device=device)
    flat = {**dict(zip(names, weights, strict=True)), **layer}
    torch.library.opcheck(op, (pixels, scale, scale), flat)

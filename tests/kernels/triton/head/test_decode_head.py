"""Decode head kernels: parity with float64 for all ratios of sizes and numbers of classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg.kernels.core.launch import record_launches
from fastseg.kernels.head import op
from tests.kernels.triton.head.head_cases import B0, B1, NARROW, decode_head, head
from tests.kernels.triton.kernel_cases import DTYPES, check_parity, set_config

ODD = ((13, 19), (7, 10), (4, 5), (2, 3))
EXACT = ((16, 32), (8, 16), (4, 8), (2, 4))
ONE = ((1, 1),) * 4

WIDE_TILE = {
    "TILE_HEIGHT": 1,
    "TILE_WIDTH": 128,
    "BLOCK_D": 32,
    "MAX_CLASSES": 128,
    "num_warps": 4,
    "num_stages": 2,
}

SIZES = {
    "odd": ODD,
    "exact": EXACT,
    "one": ONE,
    "a coarse map as large as the finest": ((9, 20), (9, 20), (3, 5), (2, 3)),
    "all as large as the finest": ((6, 9),) * 4,
    "not monotone": ((12, 16), (3, 4), (12, 8), (1, 16)),
    "two thirds": ((12, 17), (8, 12), (5, 8), (4, 6)),
    "far coarser": ((16, 16), (1, 1), (2, 1), (1, 3)),
    "one row": ((1, 40), (1, 20), (1, 10), (1, 5)),
    "one column": ((33, 1), (17, 1), (9, 1), (5, 1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_sizes(sizes, dtype, device):
    arguments = head(1, sizes, NARROW, 64, 2, dtype, device)
    logits = check_parity(decode_head, *arguments)
    assert logits.shape == (1, 2, *sizes[0])
    assert logits.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "sizes", "channels", "width", "classes"),
    [
        (3, ODD, B0, 64, 19),
        (1, ODD, B1, 96, 150),
        (2, EXACT, B0, 32, 1),
        (3, ONE, B1, 256, 40),
        (1, ((3, 5), (2, 3), (1, 2), (1, 1)), B0, 768, 150),
        (2, ((3, 5), (2, 3), (1, 2), (1, 1)), (96, 32, 64, 96), 32, 1000),
    ],
)
def test_widths_and_classes(batch, sizes, channels, width, classes, dtype, device):
    arguments = head(batch, sizes, channels, width, classes, dtype, device)
    logits = check_parity(decode_head, *arguments)
    assert logits.shape == (batch, classes, *sizes[0])


def test_two_launches(device):
    with record_launches() as launches:
        decode_head(*head(2, ODD, NARROW, 32, 19, torch.float32, device))
    assert [launch.name for launch in launches] == [
        "decode_head_project_kernel",
        "decode_head_kernel",
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_far_from_zero(dtype, device):
    maps, *rest = head(2, ODD, NARROW, 64, 19, dtype, device)
    check_parity(decode_head, [feature_map + 100 for feature_map in maps], *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1e2])
def test_tiny_and_large_values(scale, dtype, device):
    maps, weights, bias, *classifier = head(1, ODD, NARROW, 64, 19, dtype, device)
    maps = [feature_map * scale for feature_map in maps]
    check_parity(decode_head, maps, weights, bias * scale, *classifier)


def test_each_map_has_its_place(device):
    """One map after the other alone: its upsampling is that of torch."""
    maps, weights, bias, _, _ = head(1, ODD, NARROW, 32, 32, torch.float32, device)
    for index in range(4):
        alone = [m * float(i == index) for i, m in enumerate(maps)]
        logits = decode_head(
            alone, weights, bias + 50, torch.eye(32, device=device), -50 - bias
        )  # the bias keeps all sums above 0
        projected = torch.einsum("bchw,dc->bdhw", maps[index], weights[index])
        expected = F.interpolate(projected, size=ODD[0], mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("sizes", [(1024, 512), (2001, 1001), (7, 7), (500, 3)])
def test_shares_far_along_an_axis(sizes, device, monkeypatch):
    """A long axis costs no digits: positions are computed in integers."""
    set_config(monkeypatch, "decode_head", WIDE_TILE)
    size, source_size = sizes
    maps = [torch.zeros(1, 32, 1, side, device=device) for side in (size, source_size, 1, 1)]
    maps[1] = torch.randn(1, 32, 1, source_size, device=device)
    weights = [torch.eye(32, device=device)] * 4
    bias = torch.full((32,), 16.0, device=device)
    classifier = torch.eye(32, device=device)[:2].contiguous()
    logits = decode_head(maps, weights, bias, classifier, -bias[:2])
    expected = F.interpolate(maps[1].double(), size=(1, size), mode="bilinear")[:, :2]
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=5e-6)


def test_windows_hold_all_neighbours():
    """The bound on a window, against the neighbours that interpolation reads."""
    for size in range(1, 70):
        for source_size in range(1, size + 1):
            reads = [max((2 * i + 1) * source_size - size, 0) // (2 * size) for i in range(size)]
            for tile in (4, 8, 16):
                window = op.window_size(tile, size, source_size)
                for first in range(0, size, tile):
                    last = min(first + tile, size) - 1
                    upper = min(reads[last] + 1, source_size - 1)
                    assert upper - reads[first] < window


def test_class_blocks():
    assert op.class_blocks(1, 128) == (16, 0)
    assert op.class_blocks(19, 128) == (32, 0)
    assert op.class_blocks(40, 128) == (32, 16)
    assert op.class_blocks(128, 128) == (128, 0)
    assert op.class_blocks(150, 128) == (128, 32)
    assert op.class_blocks(150, 64) == (64, 16)
    assert op.class_blocks(1000, 128) == (128, 128)


def test_nan_in_the_finest_map_stays_in_its_pixel(device):
    maps, *rest = head(2, ODD, NARROW, 32, 19, torch.float32, device)
    maps[0][1, 5, 7, 11] = float("nan")
    isnan = decode_head(maps, *rest).isnan()
    assert isnan[1, :, 7, 11].all()
    assert isnan.sum() == 19


def test_nan_in_a_coarse_map_stays_in_the_tiles_that_read_it(device):
    sizes = ((24, 48), (12, 24), (6, 12), (3, 6))
    maps, *rest = head(2, sizes, NARROW, 32, 2, torch.float32, device)
    maps[2][1, 5, 1, 9] = float("nan")  # of rows 2 to 9, columns 34 to 41
    isnan = decode_head(maps, *rest).isnan()
    assert isnan[1, :, 2:10, 34:42].all()
    assert not isnan[0].any()
    assert not isnan[1, :, 16:].any()
    assert not isnan[1, :, :, :16].any()


def test_relu_cuts_at_zero(device):
    maps, weights, bias, classifier, classifier_bias = head(
        1, ODD, NARROW, 32, 19, torch.float32, device
    )
    logits = decode_head(maps, weights, bias - 1e3, classifier, classifier_bias)
    assert torch.equal(logits, classifier_bias[:, None, None].expand_as(logits))


@pytest.mark.parametrize("layout", ["NCHW", "sliced", "expanded"])
def test_layouts(layout, device):
    maps, weights, *rest = head(2, ODD, NARROW, 32, 19, torch.float32, device)
    change = {
        "NCHW": lambda feature_map: feature_map.contiguous(),
        "sliced": lambda feature_map: torch.cat([feature_map, feature_map], dim=1)[:, ::2],
        "expanded": lambda feature_map: feature_map[:1].expand(2, -1, -1, -1),
    }[layout]
    weights = [weight.T.contiguous().T for weight in weights]
    rest = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in rest]
    check_parity(decode_head, [change(feature_map) for feature_map in maps], weights, *rest)


def test_wrong_input(device):
    maps, weights, bias, classifier, classifier_bias = head(
        2, ODD, NARROW, 32, 19, torch.float32, device
    )
    rest = (bias, classifier, classifier_bias)

    def changed(tensor, index=1):
        return [tensor if i == index else m for i, m in enumerate(maps)]

    with pytest.raises(ValueError, match="feature_maps: expected 4 maps as weights, got 3"):
        decode_head(maps[:3], weights, *rest)
    with pytest.raises(ValueError, match="weights: expected a tuple of at least one matrix"):
        decode_head([], [], *rest)
    with pytest.raises(TypeError, match=r"feature_maps\[1\]: expected a floating-point tensor"):
        decode_head(changed(maps[1].int()), weights, *rest)
    with pytest.raises(TypeError, match=r"feature_maps\[1\]: expected torch.float32 as the w"):
        decode_head(changed(maps[1].half()), weights, *rest)
    with pytest.raises(ValueError, match=r"feature_maps\[1\]: expected shape \(2, 32, height"):
        decode_head(changed(maps[1][:1]), weights, *rest)
    with pytest.raises(ValueError, match=r"feature_maps\[3\]: expected shape \(2, 32, height"):
        decode_head(changed(maps[3][:, :, :0], 3), weights, *rest)
    with pytest.raises(ValueError, match=r"feature_maps\[1\]: expected shape \(2, 32, height"):
        decode_head(changed(maps[1][0]), weights, *rest)
    with pytest.raises(ValueError, match=r"feature_maps\[1\]: expected a tensor on"):
        decode_head(changed(maps[1].to("meta")), weights, *rest)
    with pytest.raises(ValueError, match=r"feature_maps\[1\]: expected shape \(2, 32, height"):
        decode_head(changed(maps[1][:, :31]), weights, *rest)
    with pytest.raises(ValueError, match=r"bias: expected shape \(32,\)"):
        decode_head(maps, weights, bias[1:], classifier, classifier_bias)
    with pytest.raises(ValueError, match=r"classifier_weight: expected shape \(19, 32\)"):
        decode_head(maps, weights, bias, classifier[:, 1:], classifier_bias)
    with pytest.raises(ValueError, match=r"classifier_bias: expected shape \(19,\)"):
        decode_head(maps, weights, bias, classifier, classifier_bias[1:])
    with pytest.raises(TypeError, match="classifier_bias: expected torch.float32 as the others"):
        decode_head(maps, weights, bias, classifier, classifier_bias.half())


@pytest.mark.parametrize(
    ("sizes", "channels", "width", "reason"),
    [
        (ODD[:3], NARROW[:3], 32, "3 maps are not 4"),
        (ODD, (32, 48, 32, 32), 32, "48 to 32 channels are no multiples of 32"),
        (ODD, NARROW, 40, "32 to 40 channels are no multiples of 32"),
        (ODD, (160, 32, 32, 32), 32, "the finest map's 160 channels exceed 128"),
        (((4, 4), (2, 5), (1, 1), (1, 1)), NARROW, 32, "a coarse map is larger than the finest"),
    ],
)
def test_what_the_kernels_decline(sizes, channels, width, reason, device):
    arguments = head(1, sizes, channels, width, 3, torch.float32, device)
    with pytest.raises(RuntimeError, match=reason):
        decode_head(*arguments)
    with fastseg.backend("auto"):
        assert decode_head(*arguments).shape == (1, 3, *sizes[0])


def test_in_a_compiled_graph(device):
    arguments = head(1, ODD, NARROW, 32, 19, torch.float32, device)
    compiled = torch.compile(decode_head, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), decode_head(*arguments))

"""Label-map kernels: equal to interpolate + argmax for every form, scale and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg.kernels import upsample_argmax
from fastseg.kernels.core.launch import record_launches
from fastseg.kernels.core.optional_triton import interpreting
from fastseg.kernels.labels import kernels as argmax_kernels
from tests.kernels.triton.kernel_cases import DTYPES
from tests.kernels.triton.labels.label_cases import check, resize

CELLS = {
    "form": "cells",
    "BLOCK": 512,
    "BLOCK_ROWS": 1,
    "LANE_OUTPUTS": 16,
    "PREFETCH": 2,
    "num_warps": 4,
}
GATHER = {"BLOCK": 1024, "UNROLL": 2, "num_warps": 4}
AGREE = {"form": "agree", "BLOCK": 32, "BLOCK_ROWS": 4, "num_warps": 1}


@pytest.fixture
def use_config(monkeypatch):
    """`use_config(...)` replaces parts of the configurations by what runs quickly interpreted."""

    def use(**changes: Any) -> None:
        def look_up(kernel: str, *arguments: Any, **keywords: Any) -> dict[str, Any]:
            base = GATHER if kernel == "upsample_argmax_gather" else CELLS
            return {**base, **{key: value for key, value in changes.items() if key in base}}

        monkeypatch.setitem(upsample_argmax.__globals__, "look_up", look_up)

    return use


@pytest.fixture(autouse=True)
def large_blocks(use_config) -> None:
    use_config()


def smooth(batch, classes, height, width, device):
    """Logits with regions, as a network gives them."""
    coarse = torch.randn(batch, classes, 3, 3, device=device)
    return F.interpolate(coarse, size=(height, width), mode="bicubic")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("grid", [(1, 1), (7, 5), (16, 16), (33, 9)])
def test_whole_scales(grid, scale, dtype, device):
    logits = torch.randn(2, 5, *grid, device=device).to(dtype)
    check(logits, (scale * grid[0], scale * grid[1]))


@pytest.mark.parametrize(
    ("classes", "prefetch"),
    [*((classes, prefetch) for classes in (2, 3, 19) for prefetch in (1, 2, 4)), (150, 4)],
)
def test_classes(classes, prefetch, use_config, device):
    """Also counts that groups of classes do not divide, or that are fewer than a group."""
    use_config(PREFETCH=prefetch, UNROLL=prefetch)
    logits = torch.randn(1, classes, 6, 5, device=device)
    check(logits, (24, 20))
    check(logits, (4, 20), "upsample_argmax_gather_kernel")


@pytest.mark.parametrize(
    ("grid", "size"),
    [
        ((7, 5), (21, 25)),  # odd scales: pixels lie at the very edges of cells
        ((9, 11), (10, 12)),
        ((16, 16), (16, 37)),
        ((16, 12), (85, 64)),  # 683 x 512 from 128 x 96, a photo's
        ((1, 4), (5, 37)),  # cells wider than a lane takes
        ((1, 2), (11, 20)),
        ((33, 9), (97, 9)),
    ],
)
@pytest.mark.parametrize("form", ["cells", "agree"])
def test_any_larger_size(grid, size, form, use_config, device):
    use_config(form=form)
    check(torch.randn(2, 3, *grid, device=device), size)


@pytest.mark.parametrize(
    ("grid", "size"),
    [((16, 16), (16, 16)), ((16, 16), (7, 5)), ((9, 7), (36, 6)), ((9, 7), (1, 1))],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smaller_and_equal_sizes(grid, size, dtype, device):
    logits = torch.randn(3, 7, *grid, device=device).to(dtype)
    check(logits, size, "upsample_argmax_gather_kernel")


def test_gathers_where_positions_pass_32_bits(monkeypatch, device):
    logits = torch.randn(1, 3, 3, 4, device=device)
    reason = upsample_argmax.__globals__["_cells_reason"]
    assert reason((4096, 4096), (16384, 16384)) is None
    assert reason((4096, 30000), (16384, 60000)) == "32-bit positions pass their end"
    monkeypatch.setitem(upsample_argmax.__globals__, "_cells_reason", lambda *sizes: "said so")
    check(logits, (12, 16), "upsample_argmax_gather_kernel")


@pytest.mark.parametrize("scale", [2, 4, 8])
@pytest.mark.parametrize("lane_outputs", [1, 4, 8, 32, 64])
def test_shares_of_cells(lane_outputs, scale, use_config, device):
    use_config(LANE_OUTPUTS=lane_outputs)
    check(torch.randn(1, 3, 5, 6, device=device), (5 * scale, 6 * scale))


@pytest.mark.parametrize("form", ["cells", "agree"])
@pytest.mark.parametrize("block_rows", [1, 2, 4])
def test_blocks(block_rows, form, use_config, device):
    """Blocks that cells do not fill, that span rows, and bands with rows outside the image."""
    use_config(form=form, BLOCK=32, BLOCK_ROWS=block_rows)
    check(smooth(2, 4, 9, 12, device), (36, 48))


class TestAgreement:
    """The form that looks at the corners of cells first."""

    @pytest.fixture(autouse=True)
    def agree(self, use_config):
        use_config(**AGREE)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_regions(self, dtype, device):
        check(smooth(1, 5, 9, 21, device).to(dtype), (36, 84))

    def test_a_spot(self, device):
        """Four blocks meet where the spot is: each sees it at one corner of one cell."""
        logits = torch.zeros(1, 3, 8, 15, device=device)
        logits[:, 1] = 1.0
        assert (upsample_argmax(logits, (16, 30)) == 1).all()
        logits[:, 2, 3, 7] = 5.0
        labels = upsample_argmax(logits, (16, 30))
        assert torch.equal(labels, resize(logits, (16, 30)).argmax(1))

    @pytest.mark.skipif(not interpreting(), reason="counts the steps of the interpreter")
    def test_nothing_is_blended_where_all_agree(self, device, monkeypatch):
        """Of 30 cells, one program's share, and 16 pixels each."""
        steps = []
        keep_highest = argmax_kernels.keep_highest
        monkeypatch.setattr(
            argmax_kernels, "keep_highest", lambda *values: steps.append(1) or keep_highest(*values)
        )
        logits = torch.zeros(1, 6, 3, 6, device=device)
        upsample_argmax(logits, (12, 24))
        assert len(steps) == 6 * 4
        logits[:, 1, 0, 0] = 1.0
        upsample_argmax(logits, (12, 24))
        assert len(steps) == 6 * 4 + 6 * (4 + 16)

    def test_a_class_that_wins_at_no_corner(self, device):
        """Second everywhere, class 2 wins in the middle between two others."""
        logits = torch.zeros(1, 3, 2, 2, device=device)
        logits[0, 0, :, 0], logits[0, 1, :, 1], logits[0, 2] = 1.0, 1.0, 0.8
        labels = check(logits, (8, 8))
        assert (labels == 2).any()

    def test_ties_and_nan(self, device):
        logits = torch.zeros(1, 4, 3, 3, device=device)
        logits[:, 1:3] = 1.0
        assert (upsample_argmax(logits, (12, 12)) == 1).all()
        logits[:, 3] = torch.nan
        assert (upsample_argmax(logits, (12, 12)) == 3).all()


@pytest.mark.parametrize("form", ["cells", "agree"])
@pytest.mark.parametrize(
    "layout", ["channels-last", "sliced", "expanded", "transposed", "flipped classes"]
)
def test_layouts(layout, form, use_config, device):
    use_config(form=form)
    logits = smooth(2, 7, 12, 10, device)
    logits = {
        "channels-last": lambda: logits.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: logits[:, 1:, ::2, 3:],
        "expanded": lambda: logits[:1].expand(3, -1, -1, -1),
        "transposed": lambda: logits.transpose(2, 3),
        "flipped classes": lambda: logits.permute(0, 2, 1, 3),
    }[layout]()
    height, width = logits.shape[2:]
    check(logits, (4 * height, 4 * width))
    check(logits, (height, width), "upsample_argmax_gather_kernel")
    check(logits, (height - 1, 2 * width), "upsample_argmax_gather_kernel")


SIZES = [(32, 40), (24, 30), (8, 10), (5, 7)]  # of 8 x 10 logits: cells, odd cells, equal, gathered


@pytest.mark.parametrize("size", SIZES)
def test_lowest_class_wins_ties(size, device):
    logits = torch.zeros(1, 5, 8, 10, device=device)
    assert (upsample_argmax(logits, size) == 0).all()
    logits[:, 2:4] = torch.randn(1, 1, 8, 10, device=device).abs() + 1  # equal everywhere
    assert (upsample_argmax(logits, size) == 2).all()


@pytest.mark.parametrize("size", SIZES)
def test_nan_wins_where_interpolate_has_one(size, device):
    logits = torch.randn(2, 6, 8, 10, device=device)
    logits[0, 3, 4, 4] = logits[0, 1, 4, 5] = logits[1, 5, 0, 0] = torch.nan
    labels = upsample_argmax(logits, size)
    resized = resize(logits, size)
    if size == (24, 30):
        # A pixel in the middle of a cell's edge belongs to either cell.
        kept = torch.ones(24, 30, dtype=torch.bool, device=device)
        kept[1::3] = kept[:, 1::3] = False
        labels, resized = labels[:, kept], resized[:, :, kept]
    assert resized.isnan().any()
    assert torch.equal(labels, resized.argmax(1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_classes_never_win(size, dtype, device):
    logits = torch.randn(1, 7, 8, 10, device=device).to(dtype)
    kept = [0, 1, 3, 4, 6]
    logits[:, [2, 5]] = -torch.inf
    labels = upsample_argmax(logits, size)
    expected = torch.tensor(kept, device=device)[upsample_argmax(logits[:, kept], size)]
    assert torch.equal(labels, expected)
    logits[:] = -torch.inf
    assert (upsample_argmax(logits, size) == 0).all()


def test_classes_masked_here_and_there(device):
    logits = torch.randn(2, 5, 8, 10, device=device)
    logits[torch.rand(2, 5, 8, 10) < 0.3] = -torch.inf
    logits[:, 4] = 0.0
    for size in [(32, 40), (61, 33), (8, 10)]:
        labels = upsample_argmax(logits, size)
        with fastseg.backend("eager"):
            expected = upsample_argmax(logits, size)
        assert (labels == expected).float().mean() > 0.999
        # What interpolate gives -inf may not win; it gives NaN where -inf weighs nothing.
        assert not (resize(logits, size).gather(1, labels[:, None]) == -torch.inf).any()


def test_masked_corner_at_odd_scales(device):
    """At the centre of a position its own classes count alone, however positions are rounded."""
    logits = torch.randn(1, 3, 40, 40, device=device)
    logits[torch.rand(1, 3, 40, 40) < 0.4] = -torch.inf
    logits[:, 2] = 0.0
    centres = upsample_argmax(logits, (120, 120))[:, 1::3, 1::3]
    assert logits.gather(1, centres[:, None]).isfinite().all()


def test_nothing_is_extrapolated(device):
    """Row 11 of 23 lies at position 3 of 7, in float32 a rounding before: past -inf lies +inf."""
    logits = torch.zeros(1, 2, 7, 4, device=device)
    logits[:, 0] = 1.0
    logits[:, 1, 4] = -torch.inf
    assert not upsample_argmax(logits, (23, 16)).any()


def test_infinity_wins(device):
    logits = torch.randn(1, 4, 8, 10, device=device)
    logits[0, 2, 3, 3] = torch.inf
    labels = upsample_argmax(logits, (32, 40))
    resized = resize(logits, (32, 40))
    assert torch.equal(labels[(resized == torch.inf).any(1)].unique().cpu(), torch.tensor([2]))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_large_and_tiny_values(scale, device):
    logits = torch.randn(1, 5, 9, 7, device=device)
    labels = upsample_argmax(logits * scale, (36, 28))
    assert (labels == upsample_argmax(logits, (36, 28))).float().mean() > 0.999


@pytest.mark.parametrize("classes", [2, 256])
def test_uint8(classes, device):
    logits = torch.randn(1, classes, 4, 3, device=device)
    logits[:, -1, :2] = 9.0
    for size, kernel in [
        ((8, 6), "upsample_argmax_kernel"),
        ((3, 3), "upsample_argmax_gather_kernel"),
    ]:
        labels = check(logits, size, kernel, dtype=torch.uint8)
        assert labels.max() == classes - 1
        with fastseg.backend("eager"):
            assert torch.equal(upsample_argmax(logits, size, torch.uint8), labels)


def test_one_class(device):
    labels = upsample_argmax(torch.randn(2, 1, 3, 4, device=device), (12, 16))
    assert labels.shape == (2, 12, 16)
    assert not labels.any()


def test_batch_of_none(device):
    for size in SIZES:
        with record_launches() as launches:
            labels = upsample_argmax(torch.randn(0, 3, 8, 10, device=device), size)
        assert labels.shape == (0, *size)
        assert not launches


def test_gradients_and_autocast_do_not_matter(device):
    logits = torch.randn(1, 3, 4, 4, device=device).requires_grad_()
    with torch.enable_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        assert not check(logits, (16, 16)).requires_grad


def test_wrong_input(device):
    logits = torch.randn(1, 300, 2, 2, device=device)
    with pytest.raises(ValueError, match=r"dtype: torch.uint8 tells 256 classes apart, got 300"):
        upsample_argmax(logits, (8, 8), torch.uint8)
    with pytest.raises(TypeError, match=r"dtype: expected torch.int64 or torch.uint8, got .*int32"):
        upsample_argmax(logits, (8, 8), torch.int32)
    with pytest.raises(RuntimeError, match="no kernels for torch.float64"):
        upsample_argmax(logits.double(), (8, 8))
    with pytest.raises(ValueError, match=r"size: expected a positive height and width, got \(0, 8"):
        upsample_argmax(logits, (0, 8))
    with pytest.raises(ValueError, match=r"logits: expected shape .*, got \(1, 300, 0, 2\)"):
        upsample_argmax(logits[:, :, :0], (8, 8))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_registration(dtype, device):
    op = torch.ops.fastseg.upsample_argmax.default
    for size in [(16, 12), (3, 3)]:
        torch.library.opcheck(op, (torch.randn(2, 5, 4, 3, device=device), *size, dtype))


def test_in_a_graph(device):
    compiled = torch.compile(upsample_argmax, fullgraph=True, backend="eager", dynamic=True)
    logits = torch.randn(1, 4, 5, 6, device=device)
    for size in [(20, 24), (10, 12)]:
        assert torch.equal(compiled(logits, size), upsample_argmax(logits, size))


@pytest.mark.parametrize("size", [(4, 4), (16, 16)])
def test_what_stands_for_minus_infinity_is_below_any_logit(size, device):
    logits = torch.full((1, 3, 4, 4), float("-inf"), device=device)
    logits[:, 1] = -8e37
    assert (upsample_argmax(logits, size) == 1).all()


@pytest.mark.parametrize(("grid", "size"), [((1, 5), (1, 5)), ((2, 2), (1, 1)), ((3, 4), (1, 9))])
def test_maps_of_one_row(grid, size, device):
    logits = torch.randn(1, 7, *grid, device=device)
    resized = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
    assert torch.equal(upsample_argmax(logits, size), resized.argmax(1))


@pytest.mark.parametrize("size", [(4, 4), (16, 16)])
def test_both_zeros_tie(size, device):
    logits = torch.zeros(1, 3, 4, 4, device=device)
    logits[:, 0] = -0.0
    assert not upsample_argmax(logits, size).any()

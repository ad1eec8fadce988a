"""Label maps against interpolate + argmax in float64, and how much is computed for them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels import upsample_argmax
from fastseg.kernels.labels import borders

GRIDS = [(1, 1), (1, 7), (16, 16), (33, 9)]


def check(logits, size, tie):
    """All pixels equal those of a float64 run, but where its two best classes are a tie."""
    labels = upsample_argmax(logits, size)
    resized = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    assert labels.dtype == torch.int64
    assert labels.shape == (logits.shape[0], *size)
    if logits.shape[1] == 1:
        assert not labels.any()
        return
    best = resized.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > tie
    assert clear.float().mean() > 0.9
    assert torch.equal(labels[clear], resized.argmax(1)[clear])


def smooth(batch, classes, height, width):
    """Logits with regions, as a network gives them."""
    coarse = torch.randn(batch, classes, 3, 3)
    return F.interpolate(coarse, size=(height, width), mode="bicubic")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("classes", [1, 2, 19, 150])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("make", [torch.randn, smooth])
def test_equals_interpolate_and_argmax(grid, classes, batch, make):
    height, width = grid
    logits = make(batch, classes, height, width)
    for size in [(4 * height, 4 * width), grid, (131, 77), (1, 1), (max(height // 3, 1), width)]:
        check(logits, size, tie=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    check(smooth(2, 19, 16, 24).to(dtype), (64, 96), tie=1e-5)
    check(torch.randn(1, 5, 9, 9, dtype=dtype), (35, 36), tie=1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda logits: logits.contiguous(memory_format=torch.channels_last),
        lambda logits: logits[:, 1:, ::2],
        lambda logits: logits[:1].expand(2, -1, -1, -1),
        lambda logits: logits.transpose(2, 3),
    ],
)
def test_memory_layouts(view):
    check(view(smooth(2, 7, 20, 12)), (50, 61), tie=1e-5)


def test_masked_classes_never_win():
    logits = smooth(1, 9, 12, 12)
    logits[:, [2, 7]] = -torch.inf
    labels = upsample_argmax(logits, (48, 48))
    kept = [0, 1, 3, 4, 5, 6, 8]
    assert torch.equal(labels, torch.tensor(kept)[upsample_argmax(logits[:, kept], (48, 48))])


@pytest.mark.parametrize("classes", [4, 30])  # blended whole, and along borders alone
def test_lowest_class_wins_ties(classes):
    logits = torch.zeros(1, classes, 5, 5)
    logits[:, 1:3] = 1.0  # classes 1 and 2 are equal everywhere
    assert (upsample_argmax(logits, (20, 20)) == 1).all()
    logits[:, 0, 2, 2] = 2.0
    labels = upsample_argmax(logits, (20, 20))
    resized = F.interpolate(logits, size=(20, 20), mode="bilinear", align_corners=False)
    assert torch.equal(labels, resized.argmax(1))


@pytest.mark.parametrize("size", [(40, 40), (37, 41), (12, 8)])
def test_border_pixels_alone_are_blended(size, monkeypatch):
    """Two half planes: the classes of every pixel are asked for along one column of cells only."""
    logits = torch.zeros(1, 30, 10, 10)
    logits[:, 3, :, :5] = 5
    logits[:, 7, :, 5:] = 5
    blended = record_blends(monkeypatch)
    check(logits, size, tie=1e-5)
    columns = sum(4 <= max((x + 0.5) * 10 / size[1] - 0.5, 0) < 5 for x in range(size[1]))
    most = -(-size[1] // 10)  # of a run of columns, which may be padded
    assert sum(blended) == -(-columns // most) * most * size[0]


def record_blends(monkeypatch) -> list[int]:
    """Numbers of pixels that are blended on borders, call by call."""
    blended = []
    lerp = torch.lerp

    def noting(start, end, weight):
        found = lerp(start, end, weight)
        if found.ndim == 3:  # (runs, columns, classes)
            blended.append(found.shape[0] * found.shape[1])
        return found

    monkeypatch.setattr(torch, "lerp", noting)
    return blended


def test_of_many_classes_rivals_alone_are_blended(monkeypatch):
    """Two half planes, and noise that cannot win; a class that is not a number wins everywhere."""
    logits = 0.1 * torch.randn(1, 150, 10, 10)
    logits[:, 3, :, :5] = 5
    logits[:, 7, :, 5:] = 5
    widths = []
    ranked = borders._ranked
    monkeypatch.setattr(
        borders, "_ranked", lambda *given: widths.append(given[0].sum(1).max()) or ranked(*given)
    )
    check(logits, (40, 44), tie=1e-5)
    assert widths == [2]
    logits[0, 60, 2, 5] = torch.nan
    labels = upsample_argmax(logits, (40, 44))
    resized = F.interpolate(logits, size=(40, 44), mode="bilinear", align_corners=False)
    assert torch.equal(labels == 60, resized[:, 60].isnan())


@pytest.mark.parametrize("classes", [9, 150])
def test_logits_with_gradients_have_labels(classes):
    logits = torch.zeros(1, classes, 10, 10)
    logits[:, 3, :, :5] = 5
    logits[:, 7, :, 5:] = 5
    logits += 0.1 * torch.randn(1, classes, 10, 10)
    expected = F.interpolate(logits.double(), size=(40, 40), mode="bilinear", align_corners=False)
    assert torch.equal(upsample_argmax(logits.requires_grad_(), (40, 40)), expected.argmax(1))


def test_chunks_and_stripes(monkeypatch):
    monkeypatch.setattr(borders, "_LOGITS_PER_CHUNK", 999)
    monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", 100)
    blended, resized = record_blends(monkeypatch), []
    interpolate = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: resized.append(1) or interpolate(*a, **k))
    halves = 0.1 * torch.randn(2, 30, 9, 11)  # borders alone are blended: in chunks
    halves[:, 3, :, :5] += 5
    halves[:, 7, :, 5:] += 5
    check(halves, (36, 44), tie=1e-5)
    assert len(blended) > 5
    resized.clear()
    check(torch.randn(2, 9, 9, 11), (36, 44), tie=1e-5)  # everything is blended: in stripes
    assert len(resized) > 10


@pytest.mark.parametrize("size", [(64, 5), (5, 64), (9, 41), (80, 11)])
def test_cells_without_a_column_and_runs_of_one(size):
    """Larger one way and smaller the other."""
    check(smooth(2, 9, 8, 10), size, tie=1e-5)


def test_in_a_graph():
    compiled = torch.compile(upsample_argmax, fullgraph=True, backend="eager")
    logits = smooth(1, 9, 8, 8)
    assert torch.equal(compiled(logits, (32, 32)), upsample_argmax(logits, (32, 32)))


@pytest.mark.parametrize(
    ("logits", "size", "error", "text"),
    [
        (torch.zeros(1, 2, 3, 3, dtype=torch.int64), (4, 4), TypeError, "logits: .*int64"),
        ([[0.0]], (4, 4), TypeError, "logits: .*list"),
        (torch.zeros(2, 3, 3), (4, 4), ValueError, r"logits: .*\(2, 3, 3\)"),
        (torch.zeros(1, 0, 3, 3), (4, 4), ValueError, r"logits: .*\(1, 0, 3, 3\)"),
        (torch.zeros(1, 2, 3, 3), (0, 4), ValueError, r"size: .*\(0, 4\)"),
        (torch.zeros(1, 2, 3, 3), 7, ValueError, "size: .*7"),
        (torch.zeros(1, 2, 3, 3), (1, 2, 3), ValueError, r"size: .*\(1, 2, 3\)"),
    ],
)
def test_wrong_arguments(logits, size, error, text):
    with pytest.raises(error, match=text):
        upsample_argmax(logits, size)

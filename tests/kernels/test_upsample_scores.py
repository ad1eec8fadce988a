"""Scores against interpolate, softmax and maximum in float64, and what memory they take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels import upsample_scores
from tests.memory_cases import LargestTensor


def check(logits, size):
    """Every pixel, to rounding."""
    scores = upsample_scores(logits, size)
    resized = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    assert scores.dtype == torch.promote_types(logits.dtype, torch.float32)
    torch.testing.assert_close(scores.double(), resized.softmax(1).amax(1), rtol=2e-5, atol=0)
    return scores


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (16, 16), (33, 9)])
@pytest.mark.parametrize("classes", [1, 2, 19, 150])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_interpolate_and_softmax(grid, classes, batch):
    height, width = grid
    logits = 3 * torch.randn(batch, classes, height, width)
    for size in [(4 * height, 4 * width), grid, (131, 77), (1, 1), (max(height // 3, 1), width)]:
        check(logits, size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    """Half precision is blended in float32."""
    scores = check((5 * torch.randn(2, 19, 16, 24)).to(dtype), (64, 96))
    assert scores.min() < 0.5 < scores.max()


def test_memory_layouts():
    logits = torch.randn(2, 7, 20, 12)
    for view in (
        logits.contiguous(memory_format=torch.channels_last),
        logits[:, 1:, ::2],
        logits[:1].expand(2, -1, -1, -1),
        logits.transpose(2, 3),
    ):
        before = view.clone()
        check(view, (50, 61))
        check(view, tuple(view.shape[2:]))
        assert torch.equal(view, before)  # it is not written to


def test_large_values_do_not_overflow():
    logits = 1e4 * torch.randn(1, 5, 9, 9)
    scores = upsample_scores(logits, (36, 36))
    assert (scores > 0.999).float().mean() > 0.9
    assert scores.max() == 1


def test_masked_classes_count_for_nothing():
    logits = torch.randn(1, 9, 12, 12)
    logits[:, [2, 7]] = -torch.inf
    kept = [0, 1, 3, 4, 5, 6, 8]
    expected = upsample_scores(logits[:, kept], (48, 48))
    torch.testing.assert_close(upsample_scores(logits, (48, 48)), expected)
    logits[:] = -torch.inf
    torch.testing.assert_close(upsample_scores(logits, (2, 2)), torch.full((1, 2, 2), 1 / 9))


def test_nan_where_interpolate_has_one():
    logits = torch.randn(1, 6, 8, 10)
    logits[0, 3, 4, 4] = torch.nan
    scores = upsample_scores(logits, (32, 40))
    resized = F.interpolate(logits, size=(32, 40), mode="bilinear", align_corners=False)
    assert torch.equal(scores.isnan(), resized.isnan().any(1))
    assert 0 < scores.isnan().sum() < scores.numel() / 10


def test_no_map_of_all_classes(monkeypatch):
    logits = torch.randn(2, 150, 16, 16)
    with LargestTensor() as largest:
        scores = upsample_scores(logits, (512, 512))
    assert largest.elements < 150 * 512 * 512 / 8
    monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", 1)  # a row at a time
    with LargestTensor() as largest:
        torch.testing.assert_close(upsample_scores(logits, (512, 512)), scores)
    assert largest.elements == 2 * 512 * 512


def test_no_gradient():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    assert not upsample_scores(logits, (16, 16)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_a_graph(dtype):
    compiled = torch.compile(upsample_scores, fullgraph=True, backend="eager", dynamic=True)
    logits = torch.randn(1, 9, 8, 8, dtype=dtype)
    for size in [(32, 32), (21, 40)]:
        torch.testing.assert_close(compiled(logits, size), upsample_scores(logits, size))


def test_the_registered_op():
    op = torch.ops.fastseg.upsample_scores.default
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(op, (torch.randn(2, 5, 4, 3).to(dtype), 16, 12))


def test_wrong_arguments():
    with pytest.raises(TypeError, match="logits: .*int64"):
        upsample_scores(torch.zeros(1, 2, 3, 3, dtype=torch.int64), (4, 4))
    with pytest.raises(ValueError, match=r"logits: .*\(2, 3, 3\)"):
        upsample_scores(torch.zeros(2, 3, 3), (4, 4))
    with pytest.raises(ValueError, match=r"size: .*\(0, 4\)"):
        upsample_scores(torch.zeros(1, 2, 3, 3), (0, 4))
    assert upsample_scores(torch.zeros(1, 300, 3, 3), (4, 4)).shape == (1, 4, 4)

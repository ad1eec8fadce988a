"""The kernel of scores: equal to interpolate, softmax and maximum for every scale and layout."""

from __future__ import annotations

import pytest
import torch

from fastseg.kernels import upsample_scores
from fastseg.kernels.core.launch import record_launches
from tests.kernels.triton.kernel_cases import DTYPES, set_config
from tests.kernels.triton.labels.label_cases import resize

SIZES = [(32, 40), (24, 30), (61, 33), (8, 10), (5, 7)]  # of 8 x 10 logits


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch) -> None:
    """What runs quickly interpreted."""
    set_config(monkeypatch, "upsample_scores", {"BLOCK": 1024, "UNROLL": 2, "num_warps": 4})


def check(logits, size):
    """One launch, and every pixel is a float64 run's but for rounding."""
    with record_launches() as launches:
        scores = upsample_scores(logits, size)
    assert [launch.name for launch in launches] == ["upsample_scores_kernel"]
    assert scores.dtype == torch.float32
    assert scores.shape == (logits.shape[0], *size)
    expected = resize(logits.double(), size).softmax(1).amax(1)
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, dtype, device):
    check(4 * torch.randn(2, 5, 8, 10, device=device).to(dtype), size)


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (33, 9)])
def test_grids(grid, device):
    check(torch.randn(3, 3, *grid, device=device), (4 * grid[0], 3 * grid[1]))


@pytest.mark.parametrize("unroll", [1, 4])
@pytest.mark.parametrize("classes", [1, 2, 19, 150])
def test_classes(classes, unroll, monkeypatch, device):
    """Also counts that an unrolled loop does not divide."""
    config = {"BLOCK": 256, "UNROLL": unroll, "num_warps": 4}
    set_config(monkeypatch, "upsample_scores", config)
    check(torch.randn(1, classes, 6, 5, device=device), (24, 20))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_highest_class_comes_first_or_last(order, device):
    """Sums over a maximum that rises with every class, and over one that stays."""
    steps = torch.arange(12.0, device=device)
    steps = steps if order == "rising" else steps.flip(0)
    check(steps[None, :, None, None] + torch.randn(1, 12, 5, 4, device=device), (20, 16))


def test_large_values_do_not_overflow(device):
    check(300 * torch.randn(1, 5, 9, 7, device=device), (36, 28))


@pytest.mark.parametrize("layout", ["channels-last", "sliced", "expanded", "transposed"])
def test_layouts(layout, device):
    logits = torch.randn(2, 7, 12, 10, device=device)
    logits = {
        "channels-last": lambda: logits.contiguous(memory_format=torch.channels_last),
        "sliced": lambda: logits[:, 1:, ::2, 3:],
        "expanded": lambda: logits[:1].expand(3, -1, -1, -1),
        "transposed": lambda: logits.transpose(2, 3),
    }[layout]()
    height, width = logits.shape[2:]
    check(logits, (4 * height, 4 * width))
    check(logits, (height, width))


@pytest.mark.parametrize("size", SIZES)
def test_masked_classes_count_for_nothing(size, device):
    logits = torch.randn(1, 7, 8, 10, device=device)
    kept = [0, 1, 3, 4, 6]
    logits[:, [2, 5]] = -torch.inf
    assert torch.equal(upsample_scores(logits, size), upsample_scores(logits[:, kept], size))
    logits[:] = -torch.inf
    assert torch.allclose(upsample_scores(logits, size), torch.tensor(1 / 7, device=device))


@pytest.mark.parametrize("place", [0, 3, 5])
def test_nan(place, device):
    logits = torch.randn(1, 6, 8, 10, device=device)
    logits[0, place, 4, 4] = torch.nan
    scores = upsample_scores(logits, (32, 40))
    assert torch.equal(scores.isnan(), resize(logits, (32, 40)).isnan().any(1))
    assert scores.isnan().any()


def test_batch_of_none(device):
    with record_launches() as launches:
        scores = upsample_scores(torch.randn(0, 3, 8, 10, device=device), (32, 40))
    assert scores.shape == (0, 32, 40)
    assert not launches


def test_gradients_and_autocast_do_not_matter(device):
    logits = torch.randn(1, 3, 4, 4, device=device).requires_grad_()
    with torch.enable_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        assert not upsample_scores(logits, (16, 16)).requires_grad
    check(logits.detach(), (16, 16))


def test_declined(device):
    with pytest.raises(RuntimeError, match="no kernels for torch.float64"):
        upsample_scores(torch.randn(1, 3, 4, 4, device=device).double(), (8, 8))


def test_in_a_graph(device):
    compiled = torch.compile(upsample_scores, fullgraph=True, backend="eager", dynamic=True)
    logits = torch.randn(1, 4, 5, 6, device=device)
    for size in [(20, 24), (10, 12)]:
        assert torch.equal(compiled(logits, size), upsample_scores(logits, size))

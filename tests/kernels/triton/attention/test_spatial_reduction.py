"""The reduction of keys and values: shares of its sum, chunks, leftover tokens, semaphores."""

from __future__ import annotations

import pytest
import torch

from fastseg.kernels.attention import kernels as attention
from fastseg.kernels.attention import spatial_reduction
from tests.kernels.triton.attention.attention_cases import (
    configure,
    force,
    op,
    sr_attention,
    weights,
)
from tests.kernels.triton.kernel_cases import check_parity, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("channels", "heads", "form", "splits"),
    [
        # Of 9 taps: 9, 5 + 4, 3 + 3 + 3, single ones.
        *((32, 1, form, splits) for form in ("one_launch", "split") for splits in (1, 2, 4, 16)),
        (160, 5, "split", 2),
        (160, 5, "split", 16),
    ],
)
def test_splits(channels, heads, form, splits, dtype, device, monkeypatch):
    force(monkeypatch, form)
    configure(monkeypatch, spatial_reduction, SPLITS=splits)
    x = randn(1, 10 * 7, channels, dtype=dtype, device=device)
    check_parity(sr_attention, x, 10, 7, **weights(channels, heads, 3, dtype, device))


@pytest.mark.parametrize("form", ["one_launch", "split"])
def test_chunks_of_a_power_of_two(form, device, monkeypatch):
    """Widths that fit a tile, in chunks all the same."""
    force(monkeypatch, form)
    configure(monkeypatch, spatial_reduction, BLOCK_K=32)
    configure(monkeypatch, attention, CHUNK=32)
    x = randn(1, 63, 64, dtype=torch.float16, device=device)
    check_parity(sr_attention, x, 9, 7, **weights(64, 2, 2, torch.float16, device))


@pytest.mark.parametrize("form", ["one_launch", "split"])
def test_leftover_tokens_take_no_part(form, device, monkeypatch):
    force(monkeypatch, form)
    folded = weights(32, 1, 4, torch.float32, device)
    x = torch.randn(2, 9 * 7, 32, device=device)
    before = sr_attention(x, 9, 7, **folded)
    grid = torch.ones(9, 7, dtype=torch.bool, device=device)
    grid[:8, :4] = False
    leftover = grid.flatten()
    x[:, leftover] = float("nan")
    after = sr_attention(x, 9, 7, **folded)
    assert torch.equal(before[:, ~leftover], after[:, ~leftover])
    assert after[:, leftover].isnan().all()


def test_one_launch_repeats_and_leaves_semaphores_at_zero(device, monkeypatch):
    force(monkeypatch, "one_launch")
    taken = []
    semaphores_of = spatial_reduction.semaphores
    monkeypatch.setattr(
        spatial_reduction,
        "semaphores",
        lambda *arguments: taken.append(semaphores_of(*arguments)) or taken[-1],
    )
    x = randn(3, 16 * 16, 64, dtype=torch.float16, device=device)
    folded = weights(64, 1, 4, torch.float16, device)
    results = [sr_attention(x, 16, 16, **folded) for _ in range(3)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(taken) == 3
    assert all(counters.dtype == torch.int32 and not counters.any() for counters in taken)
    assert len({counters.data_ptr() for counters in taken}) == 1


@pytest.mark.parametrize("channels", [32, 160])
def test_a_share_without_taps_adds_nothing(channels, device, monkeypatch):
    """Nine taps in shares of three or two; without eps a row of zeros has no finite LayerNorm."""
    configure(monkeypatch, spatial_reduction, SPLITS=4)
    folded = weights(channels, channels // 32, 3, torch.float32, device)
    folded["eps"] = 0.0
    x = randn(1, 36, channels, dtype=torch.float32, device=device)
    check_parity(sr_attention, x, 6, 6, **folded)


def test_amd_adds_the_parts_up_in_a_second_launch(device, monkeypatch):
    x = torch.randn(1, 64, 32, device=device)
    assert op.choose(x, 1, 2, 16).key_value == "one_launch"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert op.choose(x, 1, 2, 16).key_value == "split"

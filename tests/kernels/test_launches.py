"""How many kernels a forward launches, and that torch launches none beside them."""

from __future__ import annotations

import pytest
import torch

from bench.work import H200, forward_work, total, trace_model

# Of an image of 512x512 to its label map, at batch 1.
LAUNCHES = {"b0": 53, "b1": 53, "b2": 99, "b3": 183, "b4": 262, "b5": 345}


@pytest.mark.parametrize("variant", LAUNCHES)
def test_half_precision(variant):
    trace = trace_model(variant, (512, 512), 1, torch.bfloat16, "sm_90")
    assert len(trace.launches) <= LAUNCHES[variant]
    assert trace.torch_operators == []


@pytest.mark.parametrize("variant", ["b0", "b2"])
@pytest.mark.parametrize("family", ["default", "sm_80", "sm_100", "sm_120"])
def test_other_families(variant, family):
    trace = trace_model(variant, (512, 512), 1, torch.bfloat16, family)
    assert len(trace.launches) <= 1.1 * LAUNCHES[variant]
    assert trace.torch_operators == []


@pytest.mark.parametrize(
    ("size", "batch", "dtype"),
    [
        ((512, 512), 1, torch.float32),
        ((512, 512), 8, torch.float16),
        ((1024, 2048), 1, torch.bfloat16),
        ((517, 389), 3, torch.bfloat16),
        ((33, 97), 1, torch.float32),
    ],
    ids=str,
)
def test_other_sizes_and_dtypes(size, batch, dtype):
    trace = trace_model("b0", size, batch, dtype, "sm_90")
    assert len(trace.launches) <= 1.2 * LAUNCHES["b0"]
    assert trace.torch_operators == []


def test_counts_of_a_forward():
    """Twice the published multiply-adds of B0 at 512x512, 8.4 G, before the head is folded: 4.09 G
    after (a figure of the eager twins' study), to which the label map adds none."""
    works = forward_work("b0", (512, 512), 1, "bfloat16", labels=True)
    trace = trace_model("b0", (512, 512), 1, torch.bfloat16, "sm_90")
    assert len(trace.launches) == LAUNCHES["b0"]
    assert total(works).flops / 2e9 == pytest.approx(4.09, rel=0.03)
    assert 10 < 1e3 * H200.floor_ms(works) < 100


def test_large_batches_take_fewer():
    """From 8192 tokens a stage up the attention block and the FFN tail serve all stages."""
    one, eight = (
        len(trace_model("b2", (512, 512), batch, torch.bfloat16, "sm_90").launches)
        for batch in (1, 8)
    )
    assert eight < one

"""The memory of a training step, by what torch's allocator gave out at once."""

from __future__ import annotations

import pytest
import torch

import fastseg
from bench.allocated import most_allocated
from fastseg.training import stripes
from tests.model_cases import tiny_model

CPU = torch.device("cpu")


def peak(function):
    function()  # what is made once
    return most_allocated(function, CPU)


def test_most_allocated():
    kept = []

    def run():
        torch.empty(3000, dtype=torch.uint8)
        one = torch.empty(2000, dtype=torch.uint8)
        kept.append(torch.empty(1500, dtype=torch.uint8))
        del one
        kept.append(torch.empty(1000, dtype=torch.uint8))

    assert most_allocated(run, CPU) == 3500


@pytest.mark.every(2)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_head_keeps_its_sum_and_a_mask(dropout, monkeypatch):
    """At most: the sum, the gradient behind its normalisation, the mask, and what is small."""
    monkeypatch.setattr(stripes, "STRIPE_BYTES", 1)
    channels, grid, batch = 128, (32, 48), 6
    model = tiny_model(decoder_hidden_size=channels, classifier_dropout_prob=dropout)
    head, config = model.decode_head.train(), model.config
    maps = [
        torch.randn(batch, width, grid[0] >> stage, grid[1] >> stage, requires_grad=True)
        for stage, width in enumerate(config.hidden_sizes)
    ]

    def step():
        head.zero_grad()
        head(maps).square().mean().backward()

    wide = 4 * batch * channels * grid[0] * grid[1]  # bytes of a map
    ours = peak(step)
    with fastseg.plain_path():
        plain = peak(step)
    assert plain > 8 * wide
    assert ours < (2.85 + 0.25 * (dropout > 0)) * wide


@pytest.mark.slow
def test_a_whole_step_takes_a_third_of_transformers():
    """Of B0 with 150 classes, above weights, gradients and the optimizer's state."""
    from bench.measure.training import Step, draw_batch
    from bench.providers.training import PROVIDERS
    from bench.setting import Setting

    build, providers = PROVIDERS["transformers 5"]
    batch = draw_batch(Setting("b0", (256, 256), 2, "float32"), 150, CPU)
    theirs, ours = (
        Step(*providers[name](build("b0", 150)), batch).peak_mb()
        for name in ("transformers eager", "fastseg accelerate")
    )
    assert ours < 0.34 * theirs

"""transformers' encoder with gradients: `accelerate(training=True)` against its own code."""

from __future__ import annotations

import copy

import pytest
import torch

import fastseg
from fastseg.models.segformer import encoder_training

transformers = pytest.importorskip("transformers")  # this file is collected where it is there

SIZES = {
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [8, 16, 40, 64],
    "decoder_hidden_size": 24,
    "num_labels": 5,
    "classifier_dropout_prob": 0.0,
}


def build(**options):
    config = transformers.SegformerConfig(**{**SIZES, "drop_path_rate": 0.4, **options})
    model = transformers.SegformerForSemanticSegmentation(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Not so small that there is no rounding to see.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def draw(size=(64, 96), batch=3, dtype=torch.float64):
    return torch.randn(batch, 3, *size, dtype=dtype), torch.randint(0, 5, (batch, *size))


def results(model, pixels, labels):
    model.zero_grad()
    torch.manual_seed(5)
    output = model(pixels, labels=labels, output_hidden_states=True)
    output.loss.backward()
    gradients = [one.grad.clone() for one in model.parameters()]
    return [output.loss.detach(), *(one.detach() for one in output.hidden_states), *gradients]


def check_equal(found, exact):
    """To 1e-12 of each; some, as of a key's bias, are 0 but for rounding of what is larger."""
    largest = max(one.norm() for one in exact)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 1e-12 * other.norm() + 1e-14 * largest


@pytest.fixture
def calls(monkeypatch):
    """Calls of the Mix-FFN for training."""
    monkeypatch.setattr(encoder_training, "_MAKE_AGAIN_FROM", 0)  # small as they are
    made, function = [], encoder_training.mix_ffn
    monkeypatch.setattr(
        encoder_training,
        "mix_ffn",
        lambda *arguments, **options: made.append(1) or function(*arguments, **options),
    )
    return made


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((64, 96), {}),
        ((61, 67), {"drop_path_rate": 0.0}),
        ((64, 40), {"sr_ratios": [1, 2, 3, 1], "hidden_act": "gelu_new"}),
    ],
)
def test_loss_maps_and_all_gradients(size, options, calls):
    model = build(**options).double()
    fast = fastseg.accelerate(copy.deepcopy(model), training=True)
    arguments = draw(size)
    check_equal(results(fast, *arguments), results(model, *arguments))
    assert len(calls) == 5


def test_only_with_training(calls):
    """And restored; without it all is transformers', bit for bit."""
    model = build()
    arguments = draw(dtype=torch.float32)
    exact = results(model, *arguments)
    for change in (
        fastseg.accelerate,
        lambda one: fastseg.accelerate(fastseg.accelerate(one, training=True)),
        lambda one: fastseg.restore(fastseg.accelerate(one, training=True)),
    ):
        change(model)
        found = results(model, *arguments)
        assert all(map(torch.equal, found, exact))
    assert not calls


def test_ten_steps_of_adamw():
    """With stochastic depth, the same losses and weights."""
    first = build().double()
    pixels, labels = draw()
    losses, models = [], (copy.deepcopy(first), fastseg.accelerate(first, training=True))
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(11)
        steps = []
        for _ in range(10):
            loss = model(pixels, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)

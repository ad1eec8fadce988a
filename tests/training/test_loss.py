"""The loss of a model's forward against transformers': values, gradients, what switches it off."""

from __future__ import annotations

import pytest
import torch

import fastseg
from fastseg.training import loss as fast_loss
from tests.kernels.loss_cases import draw, plain_loss
from tests.model_cases import TINY, tiny_model, twins

PLAIN = {**TINY, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}


@pytest.fixture
def calls(monkeypatch):
    """Calls of the loss without resized logits."""
    made = []
    function = fast_loss.upsample_cross_entropy
    monkeypatch.setattr(
        fast_loss,
        "upsample_cross_entropy",
        lambda *arguments, **options: made.append(1) or function(*arguments, **options),
    )
    return made


def double_twins(classes, **config):
    """transformers' model and fastseg's, in training mode, nothing of them random."""
    hf_model, model = twins(**{**PLAIN, "num_labels": classes, **config})
    return hf_model.double().train(), model.double().train()


def batch(classes, size, ignored=0.2):
    labels = torch.randint(0, max(classes, 2), (2, *size))
    labels[torch.rand(labels.shape) < ignored] = 255
    return torch.randn(2, 3, 64, 96, dtype=torch.float64), labels


def gradients(model, pixels, labels):
    model.zero_grad()
    loss = model(pixels, labels=labels).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def check_equal(ours, theirs):
    """To 1e-12 of each; some, as of a key's bias, are 0 but for rounding of what is larger."""
    (loss, found), (expected, exact) = ours, theirs
    assert abs(loss - expected) < 1e-12 * expected.abs()
    largest = max(one.norm() for one in exact)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 1e-12 * other.norm() + 1e-15 * largest


@pytest.mark.parametrize(
    ("classes", "size", "ignored"),
    [
        (1, (64, 96), 0.2),
        (2, (61, 90), 0.0),
        (19, (64, 96), 0.9),
        (19, (7, 200), 0.2),
        pytest.param(150, (64, 96), 0.2, marks=pytest.mark.slow),
    ],
)
def test_loss_and_all_gradients(classes, size, ignored, calls, monkeypatch):
    """Of one model, by its own code and by transformers' loss of its logits."""
    _, model = double_twins(classes)
    pixels, labels = batch(classes, size, ignored)
    ours = gradients(model, pixels, labels)
    assert len(calls) == 1
    monkeypatch.setattr(
        type(model),
        "_loss",
        lambda self, logits, labels: plain_loss(logits, labels),
    )
    check_equal(ours, gradients(model, pixels, labels))


@pytest.mark.parametrize("classes", [1, 19])
def test_loss_is_that_of_transformers(classes):
    hf_model, model = double_twins(classes)
    pixels, labels = batch(classes, (64, 96))
    loss, expected = (one(pixels, labels=labels).loss for one in (model, hf_model))
    # Of one class transformers' is in float32, as it makes the labels so.
    assert abs(loss - expected) < (1e-11 if classes > 1 else 1e-6) * expected


def test_ten_steps_of_adamw():
    losses = []
    for fast in (True, False):
        torch.manual_seed(1)
        model = tiny_model(**PLAIN).double().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        pixels, labels = batch(5, (64, 96))
        steps = []
        for _ in range(10):
            if fast:
                loss = model(pixels, labels=labels).loss
            else:
                loss = plain_loss(model(pixels).logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("classes", [1, 5])
def test_plain_path_takes_torchs_operators(classes, calls):
    model = tiny_model(num_labels=classes).double().train()
    logits, labels = draw(classes, (16, 24), (64, 96))
    with fastseg.plain_path():
        loss = model._loss(logits.float(), labels)
    assert not calls
    assert torch.equal(loss, plain_loss(logits.float(), labels))
    expected = plain_loss(logits, labels)
    assert torch.allclose(model._loss(logits, labels), expected, rtol=1e-12)
    assert len(calls) == 1


def test_floating_labels_of_one_class(calls):
    """transformers takes them."""
    model = tiny_model(num_labels=1).double()
    logits, labels = draw(1, (16, 24), (64, 96))
    expected = model._loss(logits, labels)
    calls.clear()
    found = model._loss(logits, labels.double())
    assert torch.allclose(found.double(), expected, rtol=1e-6)  # in float32, as labels become
    assert not calls


def test_transforms_of_torch_func_take_torchs_operators(calls):
    model = tiny_model(**PLAIN).double()
    pixels, labels = batch(5, (64, 96))
    _, exact = gradients(model, pixels, labels)
    calls.clear()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (pixels,), {"labels": labels}).loss

    parameters = {name: one.detach() for name, one in model.named_parameters()}
    found = torch.func.grad(loss)(parameters)
    assert not calls
    largest = max(one.norm() for one in exact)
    for one, other in zip(found.values(), exact, strict=True):
        assert (one - other).norm() < 1e-12 * other.norm() + 1e-15 * largest


@pytest.mark.slow
def test_whole_graph(calls):
    model = tiny_model(**PLAIN).double().train()
    pixels, labels = batch(5, (64, 96))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(pixels, labels=labels)
    result.loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    check_equal((result.loss.detach(), found), gradients(model, pixels, labels))


def test_wrong_labels_are_named():
    model = tiny_model()
    labels = torch.zeros(1, 64, 64, dtype=torch.uint8)
    labels[0, 5, 6] = 5
    message = "labels: expected 0 to 4, or 255 to ignore a pixel, got 5 in image 0, row 5, column 6"
    with pytest.raises(ValueError, match=message):
        model(torch.randn(1, 3, 64, 64), labels=labels)


def test_report():
    model = tiny_model()
    assert "loss" not in fastseg.report(model)
    model.train()
    line = "SegformerForSemanticSegmentation, loss: "
    assert f"{line}without resized logits, eager: kernels need a GPU" in fastseg.report(model)
    with fastseg.plain_path():
        found = fastseg.report(model)
    assert f"{line}by torch's operators: asked for by fastseg.plain_path" in found

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


# -- life in training ------------------------------------------------------------------------------


def steps(model, pixels, labels, count=3):
    """Yields after each step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(5)
    for _ in range(count):
        model(pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def folded_logits(model, pixels):
    """Those of eval mode, which are the plain path's."""
    with torch.no_grad():
        logits = model(pixels).logits
        assert "decode_head (transformers): folded" in fastseg.report(model)
        with fastseg.plain_path():
            torch.testing.assert_close(logits, model(pixels).logits, rtol=1e-9, atol=1e-9)
    return logits


def test_a_moving_average():
    """The copy is accelerated too, and folds for itself."""
    model = build().double()
    pixels, labels = draw()
    averages = []
    for one in (copy.deepcopy(model), fastseg.accelerate(model, training=True)):
        average = torch.optim.swa_utils.AveragedModel(
            one, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.6), use_buffers=True
        )
        for _ in steps(one, pixels, labels):
            average.update_parameters(one)
        averages.append(average.module.eval())
    theirs, ours = averages
    for name, one in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], one, rtol=1e-9, atol=1e-9)
    logits = folded_logits(ours, pixels)
    torch.testing.assert_close(logits, theirs(pixels).logits, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, folded_logits(model.eval(), pixels), rtol=1e-3)


def test_folded_anew_after_steps_and_once():
    model = fastseg.accelerate(build().double(), training=True)
    pixels, labels = draw()
    parts = [one for one in model.modules() if hasattr(one, "fastseg_state")]
    before = None
    for _ in steps(model, pixels, labels):
        model.eval()
        logits = folded_logits(model, pixels)
        assert before is None or not torch.allclose(logits, before, rtol=1e-3)
        before, folds = logits, [one.fastseg_state().folds for one in parts]
        assert torch.equal(folded_logits(model, pixels), logits)
        assert folds == [one.fastseg_state().folds for one in parts]
        model.train()


def test_transforms_of_torch_func(calls):
    """The library's own operators run in them, in gradients of each picture too."""
    model = build(drop_path_rate=0.0).double()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # else pictures are not apart
    fast = fastseg.accelerate(copy.deepcopy(model), training=True)
    pixels, labels = draw(batch=2)
    reports = []

    def loss(parameters, picture, label):
        reports.append(fastseg.report(fast))
        options = {"labels": label[None]}
        return torch.func.functional_call(fast, parameters, (picture[None],), options).loss

    parameters = {name: one.detach() for name, one in fast.named_parameters()}
    found = torch.func.grad(loss)(parameters, pixels[0], labels[0])
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, pixels, labels)
    assert not calls
    for report in reports:
        assert "decode_head, with gradients: as it is written: it is inside a transform" in report
        assert "loss: by torch's operators: it is inside a transform of torch.func" in report
        assert "on tokens" not in report
    for index in range(2):
        model.zero_grad()
        model(pixels[index : index + 1], labels=labels[index : index + 1]).loss.backward()
        exact = [one.grad for one in model.parameters()]
        check_equal([each[name][index] for name in parameters], exact)
        if index == 0:
            check_equal(list(found.values()), exact)


def test_gradients_of_gradients_are_an_error():
    options = {"drop_path_rate": 0.0, "attn_implementation": "eager"}  # torch's flash has none
    model = fastseg.accelerate(build(**options).double(), training=True)
    pixels, labels = draw()
    pixels.requires_grad_()

    def second():
        loss = model(pixels, labels=labels).loss
        (first,) = torch.autograd.grad(loss, pixels, create_graph=True)
        return torch.autograd.grad(first.square().sum(), pixels)[0]

    with pytest.raises(RuntimeError, match="gradients of gradients.*plain_path"):
        second()
    with fastseg.plain_path():
        assert second().isfinite().all()


@pytest.mark.parametrize("first", ["converted", "accelerated"])
def test_sync_batch_norm_is_called(first, monkeypatch):
    """Over one process it runs on a CPU; over several torch has it on GPUs alone."""
    kind = torch.nn.SyncBatchNorm
    model = kind.convert_sync_batchnorm(build().double())
    fast = copy.deepcopy(model)
    if first == "accelerated":
        fast = fastseg.accelerate(build().double(), training=True)
        fast.load_state_dict(model.state_dict())
        kind.convert_sync_batchnorm(fast)
    else:
        fastseg.accelerate(fast, training=True)
    assert isinstance(fast.decode_head.batch_norm, kind)
    seen, forward = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda *given: seen.append(1) or forward(*given))
    drawn = draw()
    check_equal(results(fast, *drawn), results(model, *drawn))
    assert len(seen) == 2
    line = "at its own stage's size, the rest as it is: its normalisation is a SyncBatchNorm"
    assert line in fastseg.report(fast)

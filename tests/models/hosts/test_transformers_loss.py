"""The loss that transformers' model computes, taken over by `accelerate(training=True)`."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

import fastseg
from fastseg.training.masks import compared

transformers = pytest.importorskip("transformers")  # this file is collected where it is there

SIZES = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 40, 64],
    "decoder_hidden_size": 24,
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}


def build(classes=19, **options):
    config = transformers.SegformerConfig(num_labels=classes, **SIZES, **options)
    model = transformers.SegformerForSemanticSegmentation(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Not so small that there is no rounding to see.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(classes=19, size=(61, 90), dtype=torch.float32, image=(64, 96), ignored=0.2):
    labels = torch.randint(0, max(classes, 2), (2, *size))
    labels[torch.rand(labels.shape) < ignored] = 255
    return torch.randn(2, 3, *image, dtype=dtype), labels


def gradients(model, pixels, labels):
    model.zero_grad()
    loss = model(pixels, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: one.grad.clone() for name, one in model.named_parameters()}


@pytest.mark.parametrize(
    ("classes", "image", "size", "ignored"),
    [
        (1, (64, 96), (61, 90), 0.2),
        (2, (64, 96), (64, 96), 0.0),
        (2, (33, 50), (33, 50), 0.5),
        (19, (64, 96), (61, 90), 0.2),
        (19, (32, 160), (7, 200), 0.97),
        (19, (29, 32), (1, 3), 0.2),  # the last stage has one position
        pytest.param(150, (64, 64), (64, 64), 0.2, marks=pytest.mark.slow),
        pytest.param(150, (30, 95), (30, 95), 0.9, marks=pytest.mark.slow),
    ],
)
def test_loss_and_all_gradients_in_float64(classes, image, size, ignored, head_forms):
    model = build(classes).double()
    pixels, labels = batch(classes, size, torch.float64, image, ignored)
    expected, exact = gradients(model, pixels, labels)
    assert fastseg.accelerate(model, training=True, strict=True) is model
    head_forms.clear()
    loss, found = gradients(model, pixels, labels)
    assert head_forms == ["logits_in_stripes"]
    # Of one class transformers computes a part in float32.
    bound = 1e-12 if classes > 1 else 1e-6
    assert abs(loss - expected) < bound * expected
    largest = max(one.norm() for one in exact.values())
    for name, one in exact.items():
        assert (found[name] - one).norm() < bound * one.norm() + 1e-15 * largest, name


def test_all_pixels_ignored():
    model = fastseg.accelerate(build(), training=True)
    pixels, labels = batch(ignored=1.0)
    loss, found = gradients(model, pixels, labels)
    assert loss.isnan()
    assert not any(one.any() for one in found.values())


def test_ten_steps_of_adamw():
    """With dropout and stochastic depth, which draw the same numbers."""
    first = build().double()
    first.decode_head.dropout.p = 0.1
    pixels, labels = batch(dtype=torch.float64)
    losses = []
    for fast in (True, False):
        model = copy.deepcopy(first)
        if fast:
            fastseg.accelerate(model, training=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        steps = []
        with compared():
            for _ in range(10):
                loss = model(pixels, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                steps.append(loss.item())
        losses.append(steps)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_the_loss_is_taken_over_in_training_alone(monkeypatch):
    """Proved by a loss that is none; without `training` all is transformers', bit for bit."""
    monkeypatch.setattr("fastseg.training.swap.segmentation_loss", lambda *_: torch.tensor(7.0))
    model = build()
    pixels, labels = batch()
    before = gradients(model, pixels, labels)
    fastseg.accelerate(model)
    after = gradients(model, pixels, labels)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(one, after[1][name]) for name, one in before[1].items())
    fastseg.accelerate(model, training=True)
    assert model(pixels, labels=labels).loss == 7
    assert model.eval()(pixels, labels=labels).loss == 7
    with fastseg.plain_path():
        assert torch.equal(model.train()(pixels, labels=labels).loss, before[0])
    assert model(pixels).loss is None
    fastseg.accelerate(model)
    assert torch.equal(model(pixels, labels=labels).loss, before[0])


def test_outputs_are_of_the_same_kind():
    model = build()
    pixels, labels = batch()
    accelerated = fastseg.accelerate(copy.deepcopy(model), training=True)
    for options in ({}, {"output_hidden_states": True}, {"return_dict": False}):
        for arguments in ({"labels": labels}, {}):
            theirs = model(pixels, **arguments, **options)
            ours = accelerated(pixels, **arguments, **options)
            assert type(ours) is type(theirs)
            if isinstance(theirs, dict):
                assert list(ours) == list(theirs)
            assert len(ours) == len(theirs)
            pairs = zip(list(ours), list(theirs), strict=True)
            assert options.get("return_dict", True) or all(
                type(one) is type(other) for one, other in pairs
            )
    assert torch.equal(accelerated(pixels, labels).loss, accelerated(pixels, labels=labels).loss)
    assert inspect.signature(accelerated.forward) == inspect.signature(model.forward)


def test_restored_as_it_was():
    model = build()
    kind, attributes = type(model), set(model.__dict__)
    state = torch.random.get_rng_state()
    for _ in range(2):
        fastseg.accelerate(model, training=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(model, kind)
    fastseg.restore(model)
    assert type(model) is kind
    assert set(model.__dict__) == attributes


def test_copies_and_pickles():
    model = fastseg.accelerate(build(), training=True)
    pixels, labels = batch()
    other = pickle.loads(pickle.dumps(model))
    loss = model(pixels, labels=labels).loss
    for one in (other, copy.deepcopy(model)):
        assert type(one) is type(model)
        assert torch.equal(one(pixels, labels=labels).loss, loss)


def test_report():
    model = fastseg.accelerate(build(), training=True)
    line = "SegformerForSemanticSegmentation, loss: "
    assert f"{line}without resized logits, eager" in fastseg.report(model)
    assert "loss" not in fastseg.report(fastseg.accelerate(model))


def test_inside_of_another_model():
    model = build()
    outer = nn.Sequential(nn.Identity(), model)
    fastseg.accelerate(outer, training=True)
    assert "1, loss: without resized logits" in fastseg.report(outer)


class OtherLoss(transformers.SegformerForSemanticSegmentation):
    def forward(self, pixel_values, labels=None, **kwargs):
        output = super().forward(pixel_values, **kwargs)
        output["loss"] = output.logits.sum()
        return output


def test_where_there_is_no_loss_to_take_over():
    config = transformers.SegformerConfig(num_labels=19, **SIZES)
    for model in (OtherLoss(config), transformers.SegformerModel(config)):
        kind = type(model).__name__
        message = f"no loss is taken over, as the forward of {kind} .*upsample_cross_entropy"
        with pytest.warns(UserWarning, match=message):
            fastseg.accelerate(model, training=True)
        with pytest.raises(ValueError, match=message):
            fastseg.accelerate(model, training=True, strict=True)
    model = build()
    model.forward = model.forward
    with pytest.warns(UserWarning, match=r"loss of SegformerFor\w+ stays: it has a forward of its"):
        fastseg.accelerate(model, training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = fastseg.SegformerForSemanticSegmentation(fastseg.SegformerConfig(**SIZES))
        fastseg.accelerate(own, training=True)
    with pytest.raises(TypeError, match="training: expected a bool, got 'speed'"):
        fastseg.accelerate(build(), training="speed")


def test_a_loss_of_another_form_stays(monkeypatch):
    from fastseg.models.segformer.hosts import losses

    losses._trial.cache_clear()
    monkeypatch.setattr(losses, "segmentation_loss", lambda logits, *_: logits.new_tensor(3.5))
    with pytest.warns(UserWarning, match=r"stays: its loss is \d\.\d+ where 3.500000 was expected"):
        fastseg.accelerate(build(), training=True)
    losses._trial.cache_clear()


@pytest.mark.slow
def test_whole_graph():
    model = fastseg.accelerate(build(), training=True)
    pixels, labels = batch()
    loss, exact = gradients(model, pixels, labels)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, of_graph = gradients(compiled, pixels, labels)
    assert abs(found - loss) < 1e-6 * loss
    largest = max(one.norm() for one in exact.values())
    for one, other in zip(of_graph.values(), exact.values(), strict=True):
        assert (one - other).norm() < 1e-5 * other.norm() + 1e-6 * largest


def test_trainer(tmp_path):
    """Losses of a run, its evaluation and its weights, with and without."""
    pixels, labels = batch()
    data = [{"pixel_values": one, "labels": two} for one, two in zip(pixels, labels, strict=True)]
    torch.manual_seed(3)
    first = build()
    found = []
    for model in (copy.deepcopy(first), fastseg.accelerate(first, training=True)):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data
        )
        found.append((trainer.train().training_loss, trainer.evaluate()["eval_loss"]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_the_head_draws_and_counts_as_its_own_code(head_forms):
    """With dropout and running statistics."""
    model = build()
    model.decode_head.dropout.p = 0.4
    model.double()
    pixels, labels = batch(dtype=torch.float64)
    theirs = copy.deepcopy(model)
    fastseg.accelerate(model, training=True)
    head_forms.clear()
    found = []
    for one in (model, theirs):
        torch.manual_seed(5)
        with compared():
            found.append(gradients(one, pixels, labels))
    assert len(head_forms) == 1
    assert abs(found[0][0] - found[1][0]) < 1e-12
    largest = max(one.norm() for one in found[1][1].values())
    for name, one in found[1][1].items():
        assert (found[0][1][name] - one).norm() < 1e-11 * one.norm() + 1e-14 * largest, name
    for one, other in zip(model.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_head_runs_as_it_is_written(head_forms):
    pixels, labels = batch()
    model = fastseg.accelerate(build())
    gradients(model, pixels, labels)
    assert "with gradients" not in fastseg.report(model)
    fastseg.accelerate(model, training=True)
    head_forms.clear()
    line = "decode_head, with gradients: "
    assert f"{line}every projection at its own stage's size" in fastseg.report(model)
    with fastseg.plain_path():
        gradients(model, pixels, labels)
    handle = model.decode_head.linear_fuse.register_forward_hook(lambda *_: None)
    gradients(model, pixels, labels)
    assert not head_forms
    assert f"{line}as it is written: one of its layers has hooks" in fastseg.report(model)
    handle.remove()
    gradients(model, pixels, labels)
    assert len(head_forms) == 1


def test_a_head_with_another_dropout_stays(head_forms):
    """In eval mode it is none, so it takes a trial in training mode to see it."""
    model = build()

    class Twice(type(model.decode_head)):
        def forward(self, *given, **named):
            logits = super().forward(*given, **named)
            return nn.functional.dropout(logits, 0.5, self.training)

    model.decode_head.__class__ = Twice
    fastseg.accelerate(model, training=True)
    head_forms.clear()
    gradients(model, *batch())
    assert not head_forms
    line = "decode_head, with gradients: as it is written: it computes something else"
    assert line in fastseg.report(model)


def test_lora_on_the_projections(head_forms):
    peft = pytest.importorskip("peft")
    model = fastseg.accelerate(build(), training=True)
    names = [name for name, _ in model.named_modules() if name.endswith(".proj")]
    targets = [name for name in names if name.startswith("decode_head")]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"])
    adapted = peft.get_peft_model(model, config)
    head_forms.clear()
    pixels, labels = batch()
    adapted(pixels, labels=labels).loss.backward()
    assert not head_forms
    assert "as it is written: one of its layers is a Linear" in fastseg.report(adapted)
    trained = [name for name, one in adapted.named_parameters() if one.grad is not None]
    assert any("lora_B" in name for name in trained)
    assert any("classifier" in name for name in trained)

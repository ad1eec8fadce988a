"""The plain path in training: losses, gradients, dropout and statistics against transformers'."""

from __future__ import annotations

import pytest
import torch

from tests.model_cases import TINY, twins

BOUND = 1e-11  # both sides in float64


def named_gradients(hf_model, model, tmp_path):
    """Gradients of both, under the names on disk."""
    from safetensors.torch import load_file

    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.copy_(parameter.grad)
    hf_model.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        yield name, parameter.grad, theirs[name]


def double_twins(*arguments, training=False, **config):
    hf_model, model = twins(*arguments, **config)
    return hf_model.double().train(training), model.double().train(training)


def labels_with_ignored(classes, *shape):
    labels = torch.randint(0, classes, shape)
    labels[torch.rand(shape) < 0.2] = 255
    return labels


@pytest.mark.parametrize("training", [False, True])
def test_segmentation_loss_and_gradients(training, tmp_path):
    config = {**TINY, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
    hf_model, model = double_twins(**config, training=training)
    pixel_values = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    labels = labels_with_ignored(5, 2, 61, 90)
    expected = hf_model(pixel_values, labels=labels)
    result = model(pixel_values, labels=labels)
    torch.testing.assert_close(result.loss, expected.loss, rtol=BOUND, atol=BOUND)
    expected.loss.backward()
    result.loss.backward()
    for name, ours, theirs in named_gradients(hf_model, model, tmp_path):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12, msg=name)


def test_all_pixels_ignored_is_nan_as_in_transformers():
    hf_model, model = double_twins(**TINY)
    labels = torch.full((1, 64, 64), 255)
    pixel_values = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert model(pixel_values, labels=labels).loss.isnan()
    assert hf_model(pixel_values, labels=labels).loss.isnan()


def test_binary_loss():
    hf_model, model = double_twins(**{**TINY, "num_labels": 1})
    pixel_values = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    labels = labels_with_ignored(2, 2, 64, 64)
    expected = hf_model(pixel_values, labels=labels).loss
    assert expected.dtype == torch.float32  # as transformers makes labels so
    result = model(pixel_values, labels=labels).loss
    torch.testing.assert_close(result.float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("ignore_index", [0, -100])
def test_other_ignore_index(ignore_index):
    hf_model, model = double_twins(**TINY, semantic_loss_ignore_index=ignore_index)
    pixel_values = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    labels = torch.randint(0, 5, (1, 64, 64))
    labels[:, :9] = ignore_index
    expected = hf_model(pixel_values, labels=labels).loss
    torch.testing.assert_close(
        model(pixel_values, labels=labels).loss, expected, rtol=BOUND, atol=BOUND
    )


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (4, None, torch.tensor([1, 3])),
        (4, None, torch.tensor([[0.0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.float64)),
        (1, None, torch.tensor([0.3, -1.0], dtype=torch.float64)),
        (3, "regression", torch.randn(2, 3, dtype=torch.float64)),
        (3, "single_label_classification", torch.tensor([2, 0])),
        (3, "multi_label_classification", torch.ones(2, 3, dtype=torch.float64)),
    ],
)
def test_classification_losses(num_labels, problem_type, labels):
    config = {**TINY, "num_labels": num_labels, "problem_type": problem_type}
    hf_model, model = double_twins("SegformerForImageClassification", **config)
    pixel_values = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = hf_model(pixel_values, labels=labels).loss
    result = model(pixel_values, labels=labels).loss
    torch.testing.assert_close(result, expected, rtol=BOUND, atol=BOUND)


def test_dropout_and_stochastic_depth_draw_as_transformers_does():
    hf_model, model = double_twins(
        attention="eager",
        **{**TINY, "depths": [2, 1, 2, 2]},
        drop_path_rate=0.5,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.3,
        classifier_dropout_prob=0.4,
        training=True,
    )
    pixel_values = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    torch.manual_seed(3)
    expected = hf_model(pixel_values).logits
    torch.manual_seed(3)
    result = model(pixel_values).logits
    # transformers' softmax is in float32 whatever the model's dtype.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(4)
    assert not torch.allclose(model(pixel_values).logits, expected)


def test_batch_norm_statistics_move_as_in_transformers(tmp_path):
    hf_model, model = double_twins(
        **TINY, drop_path_rate=0.0, classifier_dropout_prob=0.0, training=True
    )
    for _ in range(2):
        pixel_values = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        hf_model(pixel_values)
        model(pixel_values)
    theirs = hf_model.decode_head.batch_norm
    ours = model.decode_head.batch_norm
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == 2


def test_gradient_checkpointing_changes_nothing():
    _, model = double_twins(**TINY, training=True)
    pixel_values = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        torch.manual_seed(5)
        model(pixel_values).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    before = gradients()
    calls = []
    layer = model.segformer.encoder.block[0][0]
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    after = gradients()
    assert len(calls) == 2  # once forward, once again in the backward pass
    model.gradient_checkpointing_disable()
    handle.remove()
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_input_gradient_in_eval_mode():
    hf_model, model = double_twins(**TINY)
    model.requires_grad_(False)
    gradients = []
    values = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for each in (hf_model, model):
        pixel_values = values.clone().requires_grad_()
        each(pixel_values).logits.square().sum().backward()
        gradients.append(pixel_values.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)

"""Folded weights are never stale, and never in the way."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import fastseg
from tests.folding.fold_cases import (
    count_folds,
    every_parameter,
    folded,
    is_folded,
    parts_of,
    plain,
)
from tests.half_precision import half_bound, half_limit
from tests.model_cases import relative_error, tiny_model

PIXELS = (2, 3, 64, 96)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def pixel_values():
    return torch.randn(PIXELS)


def assert_fresh(model, pixel_values, before=None):
    result, expected = folded(model, pixel_values), plain(model, pixel_values)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    if before is not None:
        assert not torch.allclose(result, before, rtol=1e-2, atol=1e-2)


def test_folded_once_and_used(model, pixel_values, monkeypatch):
    folds = count_folds(monkeypatch)
    assert not any(map(is_folded, parts_of(model)))
    folded(model, pixel_values)
    assert len(folds) == len(parts_of(model)) == 4 * 3 + 2
    assert all(map(is_folded, parts_of(model)))
    folded(model, pixel_values)
    assert len(folds) == 14


def test_plain_path_where_gradients_or_attentions_are_asked_for(model, pixel_values, monkeypatch):
    folds = count_folds(monkeypatch)
    model(pixel_values)
    with torch.no_grad():
        model.train()(pixel_values)
    assert folds == []
    model.eval().requires_grad_(False)
    model.segformer(pixel_values.clone().requires_grad_())
    assert folds == []
    model(pixel_values)  # gradients are on, but nothing can ask for one
    assert len(folds) == 14
    monkeypatch.delattr(fastseg.kernels, "sr_attention")  # it tells no probabilities
    assert len(model(pixel_values, output_attentions=True).attentions) == 4


def optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def replace_parameters(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.randn_like(parameter)))


def move_statistics(model):
    model.decode_head.batch_norm.running_mean.add_(5)


def train_a_step(model):
    model.train()
    model(torch.randn(PIXELS)).logits.square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.eval()


def edit_behind_pytorch(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.refold()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(tiny_model().state_dict()),
        lambda model: model.load_state_dict(tiny_model().state_dict(), assign=True),
        lambda model: model.decode_head.load_state_dict(tiny_model().decode_head.state_dict()),
        torch.no_grad()(every_parameter(lambda parameter: parameter.mul_(1.5))),
        torch.no_grad()(every_parameter(lambda p: p.copy_(torch.randn_like(p)))),
        torch.no_grad()(optimizer_step),
        replace_parameters,
        move_statistics,
        train_a_step,
        edit_behind_pytorch,
    ],
    ids=[
        "load_state_dict",
        "load_state_dict-assign",
        "load_state_dict-of-a-part",
        "mul_",
        "copy_",
        "optimizer",
        "new-parameters",
        "batch-norm-statistics",
        "training",
        "data-then-refold",
    ],
)
def test_changed_weights_are_noticed(model, pixel_values, change):
    before = folded(model, pixel_values)
    change(model)
    assert_fresh(model, pixel_values, before)


def test_one_changed_parameter_folds_one_op(model, pixel_values, monkeypatch):
    folded(model, pixel_values)
    folds = count_folds(monkeypatch)
    with torch.no_grad():
        model.segformer.encoder.block[0][0].attention.self.key.bias.add_(1)
        model.segformer.encoder.block[2][0].mlp.dense1.weight.add_(0.1)
    assert_fresh(model, pixel_values)
    assert len(folds) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_round_trip(model, pixel_values, dtype):
    folded(model, pixel_values)
    model.to(dtype)
    result = folded(model, pixel_values.to(dtype))
    assert result.dtype == dtype
    # With the rounded weights and pixels.
    expected = plain(model.double(), pixel_values.to(dtype).double())
    bound = 1e-12 if dtype == torch.float64 else half_limit(dtype)
    assert relative_error(result, expected) <= bound
    model.float()
    assert_fresh(model, pixel_values)


def test_half_and_to(model, pixel_values):
    folded(model, pixel_values)
    assert folded(model.half(), pixel_values.half()).dtype == torch.float16
    folded(model.float(), pixel_values)
    model.to("meta")
    assert not any(map(is_folded, parts_of(model)))


def test_train_and_eval_round_trip(model, pixel_values):
    before = folded(model, pixel_values)
    model.train()
    assert not any(map(is_folded, parts_of(model)))
    model.eval()
    assert torch.equal(folded(model, pixel_values), before)


def test_part_in_training_mode_takes_the_plain_path(model, pixel_values):
    model.decode_head.train()
    before = model.decode_head.batch_norm.running_mean.clone()
    folded(model, pixel_values)
    assert not torch.equal(model.decode_head.batch_norm.running_mean, before)


def test_dropout_alone_in_training_mode_is_heard(model, pixel_values):
    model.decode_head.dropout.train()  # Monte Carlo dropout
    model.decode_head.dropout.p = 0.5
    assert not torch.equal(folded(model, pixel_values), folded(model, pixel_values))


class Doubled(torch.nn.Module):
    """A layer put in the place of another, as LoRA does it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return 2 * self.layer(x)


def hook(model):
    linear = model.segformer.encoder.block[1][0].attention.self.query
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)


def replace(model):
    attention = model.segformer.encoder.block[1][0].attention.self
    attention.query = Doubled(attention.query)


def own_forward(model):
    linear = model.segformer.encoder.block[1][0].attention.self.query
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


def parametrize(model):
    linear = model.segformer.encoder.block[1][0].attention.self.query
    doubling = torch.nn.Module()
    doubling.forward = lambda weight: 2 * weight
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", doubling)
    with torch.no_grad():
        linear.bias.mul_(2)


def test_a_layer_of_its_own_code_holds_nothing_folded(model, pixel_values, monkeypatch):
    folded(model, pixel_values)
    handle = model.segformer.encoder.block[1][0].register_forward_hook(lambda *_: None)
    assert_fresh(model, pixel_values)
    assert sum(map(is_folded, parts_of(model))) == 14 - 2
    folds = count_folds(monkeypatch)
    folded(model, pixel_values)
    assert folds == []
    handle.remove()
    assert_fresh(model, pixel_values)
    assert len(folds) == 2
    assert all(map(is_folded, parts_of(model)))


@pytest.mark.parametrize("change", [hook, replace, own_forward, parametrize])
def test_changed_parts_are_not_left_out(model, pixel_values, change):
    before = folded(model, pixel_values)
    change(model.eval())
    model.eval()
    result = folded(model, pixel_values)
    torch.testing.assert_close(result, plain(model, pixel_values), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(result, before, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        report = fastseg.report(model)
    assert "segformer.encoder.block.1.0, attention: plain: attention.self.query" in report
    assert report.count("plain") == 1


def test_report(model):
    names = ["segformer.encoder", "decode_head"]
    reason = fastseg.kernels.select_backend("cpu")[1]
    with torch.no_grad():
        lines = fastseg.report(model).splitlines()
        assert lines[:2] == [f"{name}: folded, eager: {reason}" for name in names]
        model.decode_head.dropout.train()
        assert "decode_head: plain: dropout is in training mode" in fastseg.report(model)
    assert "gradients are on and patch_embeddings.0.proj.weight" in fastseg.report(model)
    with pytest.raises(ValueError, match="model: .*Linear"):
        fastseg.report(torch.nn.Linear(2, 2))


def test_copies_fold_for_themselves(model, pixel_values):
    before = folded(model, pixel_values)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(map(is_folded, parts_of(duplicate)))
        assert torch.equal(folded(duplicate, pixel_values), before)
        with torch.no_grad():
            every_parameter(lambda parameter: parameter.mul_(1.5))(duplicate)
        assert_fresh(duplicate, pixel_values, before)
    assert torch.equal(folded(model, pixel_values), before)


def test_state_dict_buffers_and_pickles_hold_no_folded_tensors(model, pixel_values):
    names, buffers = list(model.state_dict()), len(list(model.buffers()))
    size = len(pickle.dumps(model))
    folded(model, pixel_values)
    assert list(model.state_dict()) == names
    assert len(list(model.buffers())) == buffers
    assert len(pickle.dumps(model)) == size
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert torch.equal(folded(loaded, pixel_values), folded(model, pixel_values))


def test_inference_mode_and_inference_weights(model, pixel_values):
    expected = folded(model, pixel_values)
    with torch.inference_mode():
        assert torch.equal(model(pixel_values).logits, expected)
        inside = copy.deepcopy(model)
        # Edits of such weights are not counted, so they are never folded.
        assert "eval() mends that" in fastseg.report(inside)
        torch.testing.assert_close(inside(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)
    # Folded inside inference mode, then used with gradients on.
    model.requires_grad_(False)
    torch.testing.assert_close(model(pixel_values).logits, expected)


def test_weights_at_the_address_of_earlier_ones(model, pixel_values):
    """Replaced twice, a parameter may come to lie where the first one was."""
    linear = model.decode_head.linear_c[0].proj
    for _ in range(20):
        shape = linear.weight.shape
        linear.weight = torch.nn.Parameter(torch.randn(shape))
        folded(model, pixel_values)
        linear.weight = torch.nn.Parameter(torch.randn(shape))
        linear.weight = torch.nn.Parameter(torch.randn(shape))
        assert_fresh(model, pixel_values)


def test_changed_eps_is_noticed(model, pixel_values):
    before = folded(model, pixel_values)
    for module in model.modules():
        if hasattr(module, "eps"):
            module.eps = 0.5
    assert_fresh(model, pixel_values, before)


def test_autocast_keeps_float32_tokens(model, pixel_values):
    expected = plain(model.double(), pixel_values.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = folded(model, pixel_values), plain(model, pixel_values)
    assert ours.dtype == theirs.dtype
    assert relative_error(ours, expected) <= half_bound(
        relative_error(theirs, expected), torch.bfloat16
    )


def test_plain_path_ends_with_its_block(model, pixel_values, monkeypatch):
    folds = count_folds(monkeypatch)
    with pytest.raises(RuntimeError, match="inside"), fastseg.plain_path():
        raise RuntimeError("inside")
    folded(model, pixel_values)
    assert folds


def test_a_weight_that_is_no_parameter_is_not_folded(model, pixel_values):
    """As FullyShardedDataParallel and replicas have them, in memory that may be freed."""
    fuse = model.decode_head.linear_fuse
    fuse.weight = torch.Tensor(fuse._parameters.pop("weight").detach())
    with torch.no_grad():
        logits = model(pixel_values).logits
        report = fastseg.report(model)
        with fastseg.plain_path():
            assert relative_error(logits, model(pixel_values).logits) < 1e-6
    assert "decode_head: plain: linear_fuse has a weight that is no parameter" in report

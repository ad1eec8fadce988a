"""`fastseg.graphed` never gives stale results: whatever changes in a model, graphs see it or go."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastseg
from fastseg.folding.freshness import ATTRIBUTES_COUNT, ModelWatch
from tests.cuda_graphs.graph_cases import SHAPE, capture, default_of, runner_of
from tests.model_cases import TINY, randomize, tiny_model, twins


def first_layer(model):
    return model.segformer.encoder.block[0][0]


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model.train()
        model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    optimizer.step()
    model.eval()


def step_in_eval_mode(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(torch.randn(2, 3, 64, 64)).logits.square().mean().backward()
    optimizer.step()


def load(model):
    other = copy.deepcopy(model)
    randomize(other)
    model.load_state_dict(other.state_dict())


def load_by_assignment(model):
    other = copy.deepcopy(model)
    randomize(other)
    model.load_state_dict(other.state_dict(), assign=True)


def edit_folded(model):
    first_layer(model).mlp.dense1.weight.copy_(
        torch.randn_like(first_layer(model).mlp.dense1.weight)
    )


def edit_unfolded(model):
    model.segformer.encoder.layer_norm[0].weight.mul_(-1)


def edit_buffer(model):
    model.decode_head.batch_norm.running_mean.add_(1)


def edit_data(model):
    first_layer(model).mlp.dense1.weight.data.mul_(-1)
    model.refold()


def replace_data(model):
    weight = first_layer(model).mlp.dense1.weight
    weight.data = -weight


def replace_parameter(model):
    model.decode_head.classifier.bias = nn.Parameter(torch.randn(5))


def remove_bias(model):
    model.decode_head.classifier.bias = None


def replace_module(model):
    model.decode_head.classifier = nn.Conv2d(24, 3, 1).eval()


def append_module(model):
    model.decode_head.classifier = nn.Sequential(model.decode_head.classifier, nn.ReLU()).eval()


def tie(model):
    attention = first_layer(model).attention.self
    attention.value.weight = attention.key.weight


def change_eps(model):
    first_layer(model).layer_norm_1.eps = 0.5


def change_config(model):
    model.config.output_hidden_states = True


def change_class(model):
    class Doubled(type(model.decode_head)):
        def forward(self, *args):
            return 2 * super().forward(*args)

    model.decode_head.__class__ = Doubled


def change_forward(model):
    forward = model.decode_head.forward
    model.decode_head.forward = lambda maps: 2 * forward(maps)


CHANGES = [
    *(step, step_in_eval_mode, load, load_by_assignment, edit_folded, edit_unfolded, edit_buffer),
    *(edit_data, replace_data, replace_parameter, remove_bias, replace_module, append_module, tie),
    *(change_eps, change_config, change_class, change_forward),
]


# The values of attributes, at which replays look every 50 ms.
WAITING = (change_eps, change_config)


@pytest.mark.every(5)
@pytest.mark.parametrize("make", [runner_of, default_of])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(change, make):
    model = tiny_model()
    runner = make(model)
    capture(runner, torch.randn(SHAPE))
    capture(runner, torch.randn(2, *SHAPE[1:]))
    before = copy.deepcopy(model)(torch.ones(SHAPE))
    change(model)
    if change in WAITING:
        time.sleep(ATTRIBUTES_COUNT)
    image = torch.ones(SHAPE)
    # As a model has it that was never seen before.
    expected = copy.deepcopy(model)(image)
    assert list(expected) != list(before) or not torch.equal(expected.logits, before.logits)
    for _ in range(4):
        output = runner(image)
        assert list(output) == list(expected)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert "1 times graphs dropped, for this changed: " in runner.report()
    assert runner._capturer.live == 1
    assert runner._counts["replays"] == 2


def test_without_the_look_a_model_needs_clear():
    """Also shows that the tests would see a stale result: recordings read folded weights."""
    model = tiny_model()
    runner = runner_of(model, check_weights=False)
    image = torch.ones(SHAPE)
    capture(runner, image)
    stale = model(image).logits
    edit_folded(model)
    assert torch.equal(runner(image).logits, stale)
    runner.clear()
    for _ in range(3):
        assert torch.equal(runner(image).logits, model(image).logits)
    assert not torch.equal(model(image).logits, stale)
    # A new shape looks in any case.
    edit_folded(model)
    runner(torch.ones(2, *SHAPE[1:]))
    assert torch.equal(runner(image).logits, model(image).logits)


def test_changes_at_every_call_are_not_captured():
    model = tiny_model()
    runner = runner_of(model)
    image = torch.randn(SHAPE)
    for _ in range(6):
        assert torch.equal(runner(image).logits, model(image).logits)
        edit_folded(model)
    assert not runner._capturer.recordings


def test_moving_a_model_away_and_back():
    model = tiny_model()
    runner = runner_of(model)
    image = torch.randn(SHAPE)
    capture(runner, image)
    expected = runner(image).logits
    runner.double().float()
    for _ in range(3):
        assert torch.equal(runner(image).logits, expected)
    assert runner._counts["replays"] == 2


def test_lora_adapters():
    """Which adapter counts is an attribute; a merge edits weights that PyTorch does not count."""
    hf_model, _ = twins(**TINY)
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(hf_model, config).eval()
    runner = runner_of(model)
    image = torch.randn(SHAPE)

    def check():
        time.sleep(ATTRIBUTES_COUNT)
        expected = model(image).logits
        for _ in range(3):
            torch.testing.assert_close(runner(image).logits, expected, rtol=1e-4, atol=1e-5)
        return expected

    adapted = check()
    with model.disable_adapter():
        assert not torch.allclose(check(), adapted, atol=1e-3)
    torch.testing.assert_close(check(), adapted)
    model.merge_adapter()
    torch.testing.assert_close(check(), adapted, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(check(), adapted, rtol=1e-4, atol=1e-5)
    assert runner._counts["replays"] >= 5


class TestModelWatch:
    def test_it_names_what_changed(self):
        model = tiny_model()
        watch = ModelWatch(model, derived=True)
        assert watch.reason is None
        assert watch.change() is None
        edit_folded(model)
        assert watch.change() == "segformer.encoder.block.0.0.mlp.dense1.weight"
        watch = ModelWatch(model, derived=True)
        change_eps(model)
        assert watch.change() == "segformer.encoder.block.0.0.layer_norm_1.eps"
        watch = ModelWatch(model, derived=True)
        change_class(model)
        assert watch.change() == "the class of decode_head"

    def test_it_sees_modules_that_are_no_submodules(self):
        model = nn.Linear(2, 2).eval()
        hidden = nn.Linear(2, 2).eval()
        model.__dict__["others"] = {"a": [hidden]}
        watch = ModelWatch(model, derived=True)
        hidden.weight.mul_(2)
        assert watch.change() == "others.a.0.weight"

    def test_equal_values_are_no_change(self):
        model = tiny_model()
        model.last_size = (64, 64)
        model.names = ["a"]
        watch = ModelWatch(model, derived=True)
        model.last_size = tuple([64, 64])  # another object
        assert watch.change() is None
        model.names.append("b")
        assert watch.change() == "names.1"

    def test_what_cannot_be_watched(self):
        with torch.inference_mode():
            model = nn.Linear(2, 2).eval()
        assert ModelWatch(model, derived=True).reason == (
            "weight was made in inference mode, where edits are not counted"
        )
        script = torch.jit.script(nn.Linear(2, 2).eval())
        assert "is a ScriptModule" in ModelWatch(script, derived=True).reason

    def test_a_fold_is_watched(self):
        model = tiny_model()
        fastseg.warmup(model, [SHAPE])
        watch = ModelWatch(model, derived=True)
        model.refold()
        assert "_fastseg_state" in watch.change()

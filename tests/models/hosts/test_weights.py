"""Weights that change after they were folded: outputs are those of a fresh host, always."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastseg
from fastseg.folding.swap import Accelerated

from .checks import assert_parity, errors, fresh, relative_error, run
from .host_models import BLOCKS, WHOLE, randomize


@pytest.fixture(params=WHOLE.values(), ids=WHOLE)
def host(request):
    return request.param


def optimizer_step(model, optimizer_class=torch.optim.SGD, **options):
    optimizer = optimizer_class(model.parameters(), **options)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def sgd(model):
    optimizer_step(model, lr=0.02)


def foreach(model):
    optimizer_step(model, torch.optim.AdamW, lr=0.05, foreach=True)


def fused_in_training(model):
    """The default of transformers' Trainer. PyTorch does not count what fused optimizers edit."""
    model.train()
    optimizer_step(model, torch.optim.AdamW, lr=0.05, fused=True)
    model.eval()


def fused_in_eval_mode(model):
    """Fine-tuning with frozen statistics: what tells is the forward that asks for gradients."""
    tree_leaves(model(torch.randn(1, 3, 64, 64)))[0].sum().backward()
    optimizer_step(model, torch.optim.AdamW, lr=0.05, fused=True)


def redrawn(model):
    """Other weights of the same scale: with any, float32 itself would be far from float64."""
    twin = copy.deepcopy(model)
    randomize(twin)
    return twin.state_dict()


def load(model):
    model.load_state_dict(redrawn(model))


def load_assigned(model):
    model.load_state_dict(redrawn(model), assign=True)


def copy_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))


def replace_parameters(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.randn_like(parameter)))


def exchange_data(model):
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)


def swap_tensors(model):
    for parameter in list(model.parameters()):
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(torch.randn_like(parameter)))


def move_statistics(model):
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.add_(3)
            module.running_var.mul_(2)


def scale_in_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.3)


def average(model):
    """An exponential moving average's weights put in the place of the trained ones."""
    shadow = [torch.randn_like(parameter) for parameter in model.parameters()]
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), shadow, 0.1)


@pytest.mark.parametrize(
    "change",
    [
        sgd,
        foreach,
        fused_in_training,
        fused_in_eval_mode,
        load,
        load_assigned,
        copy_in_place,
        replace_parameters,
        exchange_data,
        swap_tensors,
        move_statistics,
        scale_in_inference_mode,
        average,
    ],
)
def test_changed_weights_are_noticed(host, model, pixels, calls, change):
    if change is move_statistics and not any(True for _ in model.buffers()):
        pytest.skip("no statistics in this host")
    fastseg.accelerate(model)
    before = run(host, model, pixels)
    change(model)
    calls.clear()
    results = run(host, model, pixels)
    assert calls.count_and_clear() == host.calls()
    assert max(errors(results, before)) > 1e-3
    assert_parity(host, model, fresh(host, model), pixels)


# One weight at a time, of each kind that is folded.
ROLES = ["query", "value", "ffn", "fuse", "classifier"]


@pytest.mark.parametrize("role", ROLES)
def test_one_changed_weight(host, model, pixels, role):
    path = getattr(host, role)
    if not path:
        pytest.skip("no such part in this host")
    fastseg.accelerate(model)
    before = run(host, model, pixels)
    with torch.no_grad():
        next(model.get_submodule(path).parameters()).mul_(-1)
    assert max(errors(run(host, model, pixels), before)) > 1e-4
    assert_parity(host, model, fresh(host, model), pixels)


def test_every_parameter_counts(host, pixels):
    """No parameter is left out of the comparison: each one alone, changed by a lot, is seen."""
    model = host.build(depths=(1, 1, 1, 1))
    fastseg.accelerate(model)
    plain = copy.deepcopy(model)
    fastseg.restore(plain)
    pixels = pixels[:1, :, :64, :64].double()
    model.double()
    plain.double()
    run(host, model, pixels)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if host.multiple > 1 and "block" in name and "block3" not in name:
            continue  # smp's encoder has one size alone, and its blocks are alike
        with torch.no_grad():
            ours.add_(0.7)
            theirs.add_(0.7)
        for mine, other in zip(run(host, model, pixels), run(host, plain, pixels), strict=True):
            if other.numel():
                assert relative_error(mine, other) <= 1e-10, name


def test_tied_weights(host, model, pixels):
    """Two layers that share a parameter, as when one is tied to the other after folding."""
    if host.name == "fastseg":
        first, second = "segformer.encoder.block.0.0", "segformer.encoder.block.0.1"
    else:
        blocks = [name for name, part in model.named_modules() if type(part).__name__ in BLOCKS]
        first, second = blocks[0], blocks[1]
    fastseg.accelerate(model)
    run(host, model, pixels)
    one, two = model.get_submodule(first), model.get_submodule(second)
    for name, parameter in list(one.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        setattr(two.get_submodule(parent), leaf, parameter)
    assert_parity(host, model, fresh(host, model), pixels)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(1.5)
    assert_parity(host, model, fresh(host, model), pixels)


def test_changed_eps_is_noticed(host, model, pixels):
    """An eps is no parameter, and folded all the same."""
    fastseg.accelerate(model)
    plain = copy.deepcopy(model)
    fastseg.restore(plain)
    run(host, model, pixels)
    for each in (model, plain):
        for module in each.modules():
            if hasattr(module, "eps"):
                module.eps = 0.5
    assert_parity(host, model, plain, pixels)


def convolutions(model, is_one):
    found = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and is_one(m)]
    assert found
    return found


def pad_in_circles(model):
    for conv in convolutions(model, lambda conv: conv.groups > 1):
        conv.padding_mode = "circular"


def dilate(model):
    for conv in convolutions(model, lambda conv: conv.groups > 1):
        conv.dilation = conv.padding = (2, 2)


def pad_less(model):
    convolutions(model, lambda conv: conv.kernel_size == (7, 7))[0].padding = (2, 2)


def take_all_pixels(model):
    convolutions(model, lambda conv: conv.stride == (2, 2) and conv.groups == 1)[1].stride = (1, 1)


def reduce_in_groups(model):
    for conv in convolutions(model, lambda conv: conv.stride == conv.kernel_size == (4, 4)):
        conv.groups = 2
        conv.weight = torch.nn.Parameter(conv.weight[:, ::2].detach())


def split_heads(model):
    for module in model.modules():
        for name in ("num_heads", "num_attention_heads"):
            if getattr(module, name, 0) == 5:
                setattr(module, name, 10)


@pytest.mark.parametrize(
    "change", [pad_in_circles, dilate, pad_less, take_all_pixels, reduce_in_groups, split_heads]
)
@pytest.mark.parametrize("first", ["accelerated", "run"])
def test_changed_attributes_are_noticed(host, model, pixels, change, first):
    """What a layer computes by and is no tensor, before and after the first forward."""
    plain = copy.deepcopy(model)
    expected = run(host, plain, pixels)
    fastseg.accelerate(model)
    if first == "run":
        run(host, model, pixels)
    for each in (model, plain):
        change(each)
    try:
        with fastseg.plain_path():
            results = run(host, plain, pixels)
    except Exception as error:  # the host's own
        pytest.skip(f"this host cannot: {type(error).__name__}: {error}")
    same_shapes = [r.shape for r in results] == [e.shape for e in expected]
    if same_shapes and max(errors(results, expected)) < 1e-3:
        pytest.skip("this host computes by another attribute")
    assert_parity(host, model, plain, pixels)


@pytest.mark.parametrize("changed", [None, "query", "fuse"])
def test_what_has_not_changed_is_not_looked_at_twice(host, model, pixels, monkeypatch, changed):
    """The quick look settles it, also where a part stays the host's."""
    path = getattr(host, changed) if changed else ""
    fastseg.accelerate(model)
    if path:
        model.get_submodule(path).register_forward_hook(lambda *arguments: None)
    run(host, model, pixels)
    settled = []
    for module in model.modules():
        if isinstance(module, Accelerated):
            plan = module.fastseg_state().plan()
            monkeypatch.setattr(plan, "settle", lambda plan=plan: settled.append(plan))
    run(host, model, pixels)
    assert settled == []

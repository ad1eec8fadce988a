"""Parts that were replaced, hooked or overridden stay the host's, with a reason in the report."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

import fastseg

from .checks import assert_parity, run
from .host_models import BLOCKS, WHOLE


@pytest.fixture(params=WHOLE.values(), ids=WHOLE)
def host(request):
    return request.param


class Doubled(nn.Module):
    """A layer put in the place of another, as LoRA and quantisation do it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)

    def __getattr__(self, name):
        # As such wrappers pass on `weight`, `in_features` and the like.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def wrap(model, path):
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = Doubled(model.get_submodule(path))


def subclass(model, path):
    layer = model.get_submodule(path)
    layer.__class__ = DoubledConv if isinstance(layer, nn.Conv2d) else DoubledLinear


def forward_hook(model, path):
    def double(module, arguments, output):
        return 2 * output

    model.get_submodule(path).register_forward_hook(double)


def pre_hook(model, path):
    def double(module, arguments):
        return tuple(2 * argument for argument in arguments)

    model.get_submodule(path).register_forward_pre_hook(double)


def doubled_forward(layer, x):
    return 2 * type(layer).forward(layer, x)


def own_forward(model, path):
    layer = model.get_submodule(path)
    layer.forward = types.MethodType(doubled_forward, layer)  # which deepcopy follows


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrize(model, path):
    nn.utils.parametrize.register_parametrization(model.get_submodule(path), "weight", Twice())


def weight_norm(model, path):
    layer = model.get_submodule(path)
    nn.utils.parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


CHANGES = [wrap, subclass, forward_hook, pre_hook, own_forward, parametrize, weight_norm]
# The op that does not run where a layer is the host's: one of five, or the only one.
LOST = {"query": "sr_attention", "ffn": "mix_ffn", "fuse": "decode_head"}


# A layer's halves one by one; the head has nothing to do with them.
@pytest.mark.parametrize("roles", [("query", "fuse"), ("ffn",)], ids=" and ".join)
@pytest.mark.parametrize("first", ["changed", "accelerated"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layer_is_not_left_out(host, model, pixels, calls, roles, change, first):
    paths = {role: getattr(host, role) for role in roles if getattr(host, role)}
    if host.name.startswith("mmseg"):
        paths.pop("query", None)  # of torch's own attention, which never calls a layer

    def change_all(model):
        for path in paths.values():
            change(model, path)

    plain = copy.deepcopy(model)
    change_all(plain)
    if first == "changed":
        change_all(model)
        fastseg.accelerate(model)
    else:
        fastseg.accelerate(model)
        run(host, model, pixels)
        change_all(model)
    for each in (model, plain):
        each.eval()  # parametrisations come in training mode
    calls.clear()
    assert_parity(host, model, plain, pixels)
    counts = calls.count_and_clear()
    with torch.no_grad():
        report = fastseg.report(model)
    expected = host.calls()
    for role, path in paths.items():
        expected[LOST[role]] -= 1
        own = host.name == "fastseg"  # which is not tried out
        if change is subclass and first == "changed" and role != "fuse" and not own:
            # Tried out as a layer, which does not tell its halves apart.
            expected["sr_attention"] = expected["mix_ffn"] = host.layers - 1
        blocks = [name for name in blocks_of(model) if path.startswith(name)]  # none for the head
        lines = [line for line in report.splitlines() if ": plain: " in line or "own: " in line]
        assert any(all(name in line for name in blocks) for line in lines), report
    assert {op: counts.get(op, 0) for op in expected} == expected


@pytest.mark.parametrize("role", ["query", "fuse"])
def test_removed_again(host, model, pixels, calls, role):
    """What comes back to be what it was is fast again."""
    path = getattr(host, role)
    if not path:
        pytest.skip("no such layer in this host")
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    handle = model.get_submodule(path).register_forward_hook(lambda *arguments: None)
    run(host, model, pixels)
    handle.remove()
    calls.clear()
    assert_parity(host, model, plain, pixels)
    assert calls.count_and_clear() == host.calls()


def test_replaced_classifier(host, model, pixels, calls):
    """A head of one's own behind the fused map."""
    if not host.classifier:
        pytest.skip("no classifier in this host")
    classifier = model.get_submodule(host.classifier)
    own = nn.Sequential(
        nn.Conv2d(classifier.in_channels, 12, 3, padding=1), nn.GELU(), nn.Conv2d(12, 7, 1)
    )
    parent, _, name = host.classifier.rpartition(".")
    model.get_submodule(parent)._modules[name] = own
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    assert_parity(host, model, plain, pixels)
    assert model.get_submodule(host.classifier) is own
    assert calls.count_and_clear() == host.calls()  # the fused map is made by the op


def test_frozen_encoder_trains_a_head(host, model, pixels, calls):
    """The encoder runs fast where only the head asks for gradients, which are right."""
    if not host.classifier:
        pytest.skip("no head in this host")
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    gradients = []
    for each in (model, plain):
        each.get_submodule(host.encoder).requires_grad_(False)
        host.call(each, pixels)[0].square().mean().backward()
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    counts = calls.count_and_clear()
    assert counts["mix_ffn"] == host.layers * (2 if host.name == "fastseg" else 1)
    assert "decode_head" not in counts
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def blocks_of(model):
    return {
        name: module for name, module in model.named_modules() if type(module).__name__ in BLOCKS
    }


def test_overridden_block(host, pixels):
    """A user's subclass with a layer scale in it stays as it is, and the rest is right."""
    # Behind layers that differ from it in their class alone.
    model = host.build(**({} if host.multiple > 1 else {"depths": (3, 1, 1, 1)}))
    name, block = list(blocks_of(model).items())[2 if host.multiple == 1 else 1]

    def scale(output):
        if isinstance(output, tuple):
            return (scale(output[0]), *output[1:])
        size = [1] * output.ndim
        size[1 if output.ndim == 4 else -1] = -1  # smp's blocks map maps to maps
        channels = output.shape[1 if output.ndim == 4 else -1]
        return output * torch.linspace(0.5, 1.5, channels, dtype=output.dtype).view(size)

    class Scaled(type(block)):
        def forward(self, *args, **kwargs):
            return scale(super().forward(*args, **kwargs))

    block.__class__ = Scaled
    if host.name == "fastseg":
        Scaled.__module__ = "user"  # which is not fastseg's
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    assert_parity(host, model, plain, pixels)
    with torch.no_grad():
        assert "Scaled" in fastseg.report(model) or name in fastseg.report(model)


@pytest.mark.parametrize("kind", ["the same", "another"])
def test_layer_exchanged_afterwards(host, model, pixels, calls, kind):
    """For one of the same kind it stays fast; another was never tried out."""
    fastseg.accelerate(model)
    plain = copy.deepcopy(model)
    fastseg.restore(plain)
    run(host, model, pixels)
    for each in (model, plain):
        name, block = list(blocks_of(each).items())[1]
        new = copy.deepcopy(block)
        if kind == "another":

            class Masked(type(block)):
                def forward(self, *args, **kwargs):
                    output = super().forward(*args, **kwargs)
                    if isinstance(output, tuple):
                        return (output[0].relu(), *output[1:])
                    return output.relu()

            new.__class__ = Masked
            Masked.__module__ = "user"
        else:
            with torch.no_grad():
                next(new.parameters()).mul_(-1)
        parent, _, leaf = name.rpartition(".")
        each.get_submodule(parent)._modules[leaf] = new
    calls.clear()
    assert_parity(host, model, plain, pixels)
    lost = {"sr_attention": 1, "mix_ffn": 1} if kind == "another" else {}
    counts = calls.count_and_clear()
    assert counts == {op: n - lost.get(op, 0) for op, n in host.calls().items()}
    with torch.no_grad():
        report = fastseg.report(model)
    assert ("is a Masked" in report or "since it was tried out" in report) == bool(lost)


def test_overridden_attention(host, model, pixels):
    """An overridden forward deeper inside."""
    block = list(blocks_of(model).values())[2]
    attention = next(
        part for part in block.modules() if "Attention" in type(part).__name__ and part is not block
    )

    class Shifted(type(attention)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if isinstance(output, tuple):
                return (output[0] + output[0].tanh(), *output[1:])
            return output + output.tanh()

    attention.__class__ = Shifted
    Shifted.__module__ = "user"
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    assert_parity(host, model, plain, pixels)


@pytest.mark.parametrize("which", ["model", "encoder", "stage"])
def test_hooks_on_whole_modules_fire(host, model, pixels, which):
    path = {"model": "", "encoder": host.encoder, "stage": host.stage}[which]
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    fired = []
    module = model.get_submodule(path)
    module.register_forward_pre_hook(lambda module, arguments: fired.append("before"))
    module.register_forward_hook(lambda module, arguments, output: fired.append("after"))
    assert_parity(host, model, plain, pixels)
    assert fired == ["before", "after"]


def test_hooks_on_all_inner_modules_fire_as_in_the_host(host, model, pixels):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    orders = []
    for each in (model, plain):
        fired = []
        for name, module in each.named_modules():
            module.register_forward_hook(
                lambda *arguments, name=name, fired=fired: fired.append(name)
            )
        run(host, each, pixels)
        orders.append(fired)
    assert orders[0] == orders[1]


def test_global_hooks_fire(host, model, pixels):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    seen = [[], []]
    for each, names in zip((model, plain), seen, strict=True):
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *arguments, names=names: names.append(type(module).__name__)
        )
        try:
            run(host, each, pixels)
        finally:
            handle.remove()
    assert seen[0] == seen[1]


def test_activations(host, pixels, calls):
    """Those that the op knows run in it; another one stays the host's."""
    for activation in (nn.ReLU, nn.Hardswish):
        key = "hidden_act" if host.name.startswith(("transformers", "fastseg")) else "act"
        if host.multiple > 1 or (host.classifier and key == "act"):
            pytest.skip("the activation of this host is fixed")
        if key == "hidden_act" and activation is nn.Hardswish:
            continue
        model = host.build(**{key: "relu" if key == "hidden_act" else activation})
        plain = copy.deepcopy(model)
        fastseg.accelerate(model)
        assert_parity(host, model, plain, pixels)
        ran = calls.count_and_clear().get("mix_ffn", 0)
        assert ran == (host.layers if activation is nn.ReLU else 0)


def test_strict(host, model):
    fastseg.accelerate(copy.deepcopy(model), strict=True)
    fastseg.accelerate(copy.deepcopy(model).train(), strict=True)  # modes come and go
    if host.name == "fastseg":
        return
    wrap(model, host.ffn)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="is a Doubled") as raised:
        fastseg.accelerate(model, strict=True)
    assert str(raised.value).startswith("model: ")
    assert [type(module) for module in model.modules()] == before  # nothing is half done


def test_report(host, model):
    """Before, in between, and with gradients on."""
    if host.name != "fastseg":
        with pytest.raises(ValueError, match="model: .*accelerate"):
            fastseg.report(model)
    fastseg.accelerate(model)
    with torch.no_grad():
        lines = fastseg.report(model).splitlines()
    assert lines
    assert all("folded, eager" in line for line in lines)
    assert "gradients are on" in fastseg.report(model)
    with torch.no_grad():
        assert "training mode" in fastseg.report(model.train())


SCALES = {"nvlabs": "attn.scale", "smp": "attn.scale", "transformers": "attention.scaling"}


def test_attention_scale_of_ones_own(host, model, pixels):
    """NVlabs' `qk_scale`, in a layer that is not the first of its stage."""
    path = SCALES.get(host.name.partition("-")[0])
    block = list(blocks_of(model).values())[1]
    owner, _, leaf = (path or ".").rpartition(".")
    if path is None or not hasattr(block.get_submodule(owner), leaf):
        pytest.skip("no scale in this host")
    attention = block.get_submodule(owner)
    setattr(attention, leaf, 3 * getattr(attention, leaf))
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    assert_parity(host, model, plain, pixels)

"""An accelerated model is still the model that it was: names, copies, dtypes, and undoing it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import fastseg
from fastseg.folding import swap
from tests.half_precision import half_limit

from .checks import (
    assert_parity,
    assert_same_state,
    fresh,
    reference,
    relative_error,
    run,
    same_bits,
    snapshot,
)


def classes(model):
    return [(name, type(module)) for name, module in model.named_modules()]


def attributes(model):
    """What every module has beside parameters, buffers and modules."""
    return [sorted(module.__dict__) for module in model.modules()]


def test_state_dict_before_during_and_after(host, model, pixels):
    state = snapshot(model)
    parameters = dict(model.named_parameters())
    buffers = [name for name, _ in model.named_buffers()]
    modules = dict(model.named_modules())

    def assert_untouched():
        assert_same_state(model, state)
        assert list(dict(model.named_parameters())) == list(parameters)
        assert all(p is parameters[name] for name, p in model.named_parameters())
        assert [name for name, _ in model.named_buffers()] == buffers
        assert list(dict(model.named_modules())) == list(modules)
        assert all(module is modules[name] for name, module in model.named_modules())

    fastseg.accelerate(model)
    assert_untouched()
    run(host, model, pixels)
    assert_untouched()
    fastseg.restore(model)
    assert_untouched()


def test_classes_and_names(host, model):
    before = classes(model)
    representation = repr(model)
    fastseg.accelerate(model)
    for (name, now), (_, was) in zip(classes(model), before, strict=True):
        assert issubclass(now, was), name
        assert (now.__name__, now.__qualname__) == (was.__name__, was.__qualname__)
        assert now.__module__ == was.__module__
    assert repr(model) == representation


def test_restore_gives_back_what_was(host, model, pixels, calls):
    plain = copy.deepcopy(model)
    before = classes(model)
    expected = run(host, plain, pixels)
    fastseg.accelerate(model)
    run(host, model, pixels)
    assert fastseg.restore(model) is model
    assert classes(model) == before
    calls.clear()
    if host.name != "fastseg":  # whose own forward is the fast one
        assert attributes(model) == attributes(plain)
        assert same_bits(run(host, model, pixels), expected)
        assert calls == []
    assert fastseg.restore(model) is model  # nothing more to undo
    assert classes(model) == before
    fastseg.accelerate(model)
    calls.clear()
    assert_parity(host, model, plain, pixels)
    assert calls.count_and_clear() == host.calls()


def test_idempotent(host, model, pixels, calls):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    once = classes(model)
    assert fastseg.accelerate(model) is model
    assert classes(model) == once
    assert_parity(host, model, plain, pixels)
    assert calls.count_and_clear() == host.calls()
    fastseg.restore(model)
    assert classes(model) == classes(plain)


def test_inner_then_outer(host, model, pixels, calls):
    plain = copy.deepcopy(model)
    inner = model.get_submodule(host.encoder)
    assert fastseg.accelerate(inner) is inner
    first = dict(classes(inner))
    fastseg.accelerate(model)
    assert dict(classes(inner)) == first
    assert_parity(host, model, plain, pixels)
    assert calls.count_and_clear() == host.calls()
    fastseg.restore(inner)
    assert classes(inner) == classes(plain.get_submodule(host.encoder))
    fastseg.restore(model)
    assert classes(model) == classes(plain)


def test_one_model_leaves_others_alone(host, model, pixels, calls):
    other = host.build()
    before = classes(other)
    fastseg.accelerate(model)
    assert classes(other) == before
    assert classes(host.build()) == before
    calls.clear()
    run(host, other, pixels)
    assert calls == [] or host.name == "fastseg"


def by_torch_save(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def can_be_pickled(host, plain, pixels):
    """Whether the plain host can be, after a forward. Others than transformers 5 have to."""
    run(host, plain, pixels)
    try:
        pickle.dumps(plain)
    except AttributeError:
        assert host.name.startswith("transformers")
        return False
    return True


@pytest.mark.parametrize(
    ("duplicate", "has_run"),
    [
        (copy.deepcopy, False),
        (copy.deepcopy, True),
        (lambda model: pickle.loads(pickle.dumps(model)), True),  # unused: in the last test
        (by_torch_save, False),
    ],
    ids=["deepcopy, unused", "deepcopy, used", "pickle, used", "torch.save, unused"],
)
def test_copies_are_accelerated_and_fold_for_themselves(
    host, model, pixels, calls, duplicate, has_run
):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    if has_run:
        size = len(pickle.dumps(model))
        run(host, model, pixels)
        if duplicate is not copy.deepcopy and not can_be_pickled(host, plain, pixels):
            pytest.skip("transformers 5 models cannot be pickled after a forward")
        if duplicate is not copy.deepcopy:
            # No folded tensor travels. Some hosts keep a flag or two of their own.
            assert abs(len(pickle.dumps(model)) - size) < 500
    twin = duplicate(model)
    assert [name for name, _ in classes(twin)] == [name for name, _ in classes(model)]
    calls.clear()
    assert_parity(host, twin, plain, pixels)
    assert calls.count_and_clear() == host.calls()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.2)
    assert_parity(host, twin, fresh(host, twin), pixels)
    assert_parity(host, model, plain, pixels)
    fastseg.restore(twin)
    assert classes(twin) == classes(plain)
    calls.clear()
    run(host, model, pixels)
    assert calls.count_and_clear() == host.calls()


def test_shallow_copy(host, model, pixels):
    """`copy.copy` shares modules, as DataParallel's replicas begin."""
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    assert_parity(host, copy.copy(model), plain, pixels)
    assert_parity(host, model, plain, pixels)


def test_dtypes_and_back(host, model, pixels):
    fastseg.accelerate(model)
    run(host, model, pixels)
    model.half()
    assert run(host, model, pixels.half())[0].dtype == torch.float16
    model.to(torch.bfloat16)
    low = run(host, model, pixels.bfloat16())
    assert low[0].dtype == torch.bfloat16
    expected = reference(host, fresh(host, model), pixels.bfloat16())
    assert relative_error(low[0], expected[0]) <= half_limit(torch.bfloat16)
    model.float()
    assert_parity(host, model, fresh(host, model), pixels)


def test_to_meta_and_materialised(host, model, pixels, calls):
    """What `from_pretrained` does: a model without memory that gets its weights later."""
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    model.to("meta")
    if host.multiple == 1:
        shapes = [tuple(t.shape) for t in run(host, model, pixels.to("meta"))]
        assert shapes == [tuple(t.shape) for t in run(host, plain, pixels)]
    model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    for name, buffer in plain.named_buffers():  # those that no state_dict holds
        model.get_buffer(name).copy_(buffer)
    calls.clear()
    assert_parity(host, model, plain, pixels)
    assert calls.count_and_clear() == host.calls()


@pytest.mark.parametrize("assign", [False, True])
def test_accelerated_before_weights_are_loaded(host, pixels, calls, assign):
    plain = host.build()
    model = host.make().eval()
    if assign:
        model.to("meta")
    fastseg.accelerate(model)
    if not assign:
        run(host, model, pixels)
        calls.clear()
    # smp's encoder has a load_state_dict of its own that knows no `assign`; the model's is torch's.
    model.load_state_dict(plain.state_dict(), assign=assign)
    assert_parity(host, model.eval(), plain, pixels)
    assert calls.count_and_clear() == host.calls()


def test_a_pickle_names_its_host(host, model, pixels, monkeypatch):
    """It does not count places in a list, to which other hosts may come."""
    if host.name.startswith("fastseg"):
        pytest.skip("fastseg's own models are of no host")
    content = pickle.dumps(fastseg.accelerate(model))  # before a forward, for transformers 5
    expected = run(host, model, pixels)
    monkeypatch.setattr(swap, "_hosts", dict(reversed(swap._hosts.items())))
    assert same_bits(run(host, pickle.loads(content), pixels), expected)
    monkeypatch.setattr(swap, "_hosts", {})
    with pytest.raises(ValueError, match="accelerated model of the host '.*': expected one of"):
        pickle.loads(content)

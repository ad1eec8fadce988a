"""Each module of a host, changed after the host was accelerated: nothing of it is left out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._pytree import tree_map

import fastseg

from .checks import errors, run


def louder(value):
    is_map = isinstance(value, torch.Tensor) and value.is_floating_point()
    return 1.5 * value if is_map else value


def by_a_hook(module):
    return module.register_forward_hook(lambda *call: tree_map(louder, call[-1])).remove


def by_its_class(module):
    kind = type(module)

    def forward(self, *args, **kwargs):
        return tree_map(louder, kind.forward(self, *args, **kwargs))

    names = {"forward": forward, "__module__": kind.__module__}
    module.__class__ = type(kind)(kind.__name__, (kind,), names)
    return lambda: setattr(module, "__class__", kind)


SLOW_HOOK = pytest.param(by_a_hook, marks=pytest.mark.slow)


@pytest.mark.parametrize("change", [SLOW_HOOK, by_its_class])
def test_each_module_counts(host, model, pixels, change):
    """One after the other, containers too: what it does otherwise is never left out."""
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    for name, module in plain.named_modules():
        if name:
            undo = change(model.get_submodule(name)), change(module)
            try:
                expected = run(host, plain, pixels)
            except TypeError:  # transformers asks for the class of its models
                expected = None
            if expected is not None:
                worst = max(errors(run(host, model, pixels), expected))
                assert worst < 1e-4, name
            for back in undo:
                back()

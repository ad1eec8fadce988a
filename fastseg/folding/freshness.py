"""Whether modules still are what they were: the one look at that, for whatever is derived of them.

Folded weights and captured graphs are derived. An optimizer step, a replaced parameter or layer, a
hook, another `padding_mode`, an attribute that chooses another LoRA adapter would all pass them
unnoticed. So a `ModelWatch` remembers modules and what they hold: classes, attributes, hooks,
parameters and buffers, by identity, and tensors by version counter and address too.

What it cannot see: edits in place through `parameter.data`, which PyTorch does not count; variables
outside of modules, and attributes of objects of other libraries but for `config`.

The look runs in C loops, as it is made in every call.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from .conditions import has_forward_hooks

_END = object()  # after the last item, so that more or fewer items differ
_BASE_NAMES = frozenset(vars(nn.Module()))
_WATCHED_BASE = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
# Of these an equal value is as good as the same one.
_PLAIN_TYPES = (type(None), bool, int, float, str, type, torch.dtype, torch.device)

# Attributes that tell kinds of modules apart, and those that do not change what one computes in
# eval mode.
_KIND_TYPES = (bool, int, float, str, tuple, list, FunctionType)
_NOT_OF_A_KIND = ("training", "p", "drop_prob", "layer_idx")

_version = operator.attrgetter("_version")
_address = torch.Tensor.data_ptr


class Runner:
    """Base of objects that run a model and are no modules: a `GraphedModel`."""

    model: nn.Module


class Derived:
    """Base of what a module keeps that was made of it; graphs of a model count it as a part."""


def kind_of(
    module: nn.Module,
    *,
    root_class: bool = True,
    inside: bool = True,
    without: Sequence[str] = (),
) -> Hashable:
    """A key that is equal for modules that differ in weights or rates of dropout alone.

    Args:
        root_class: whether the class of `module` itself counts.
        inside: whether the modules in it count.
        without: names of attributes that do not.
    """
    left_out = {*_NOT_OF_A_KIND, *without}
    return tuple(
        (
            name,
            type(part) if name or root_class else None,
            tuple((n, tuple(p.shape)) for n, p in part._parameters.items() if p is not None),
            tuple(
                (key, repr(value))
                for key, value in sorted(part.__dict__.items(), key=lambda item: item[0])
                if isinstance(value, _KIND_TYPES) and key[0] != "_" and key not in left_out
            ),
            tuple(sorted(part.__dict__.keys() & {"forward"})),
        )
        for name, part in (module.named_modules() if inside else [("", module)])
    )


class _Items(NamedTuple):
    """A dict or list, and what was in it."""

    label: str
    container: dict[Any, Any] | list[Any]
    keys: list[Any]
    values: list[Any]

    @classmethod
    def of(cls, label: str, container: dict[Any, Any] | list[Any]) -> _Items:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        return cls(label, container, keys, list(_values(container)))

    @property
    def plain(self) -> bool:
        """Return whether equal values will do: these are the attributes of a module, all simple."""
        return "_parameters" in self.keys and all(
            key in _BASE_NAMES or _is_plain(value)
            for key, value in zip(self.keys, self.values, strict=True)
        )

    def change(self) -> str | None:
        """The name of the first item that is another one now."""
        now = _Items.of(self.label, self.container)
        before = dict(zip(self.keys, self.values, strict=True))
        after = dict(zip(now.keys, now.values, strict=True))
        for key in {**before, **after}:
            if not _same(before.get(key, _END), after.get(key, _END)):
                return self.name(key)
        return None

    def name(self, key: Any) -> str:
        return _join(self.label, key)


def _join(label: str, key: Any) -> str:
    return f"{label}.{key}" if label else str(key)


def _values(container: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN_TYPES) or (
        isinstance(value, tuple) and all(map(_is_plain, value))
    )


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    return type(before) is type(after) and _is_plain(before) and before == after


def _walk(models: Sequence[nn.Module], derived: bool) -> Iterator[tuple[str, Any, list[_Items]]]:
    """All modules, dicts, lists and configurations that `models` hold, and their items."""
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", model) for model in models]
    while todo:
        name, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Derived):
            if derived:
                yield name, value, [_Items.of(name, vars(value))]
            continue
        items = _items(name, value)
        if items:
            yield name, value, items
        for item in items:
            for key, inner in zip(item.keys, item.values, strict=True):
                if key not in _BASE_NAMES and not _is_plain(inner):
                    inner = inner.model if isinstance(inner, Runner) else inner
                    todo.append((item.name(key), inner))


def _items(name: str, value: Any) -> list[_Items]:
    """Dicts and lists to look at in one object; none in a simple value."""
    if isinstance(value, nn.Module):
        attributes = vars(value)
        parts = [_Items.of(name, attributes)]
        for key in _WATCHED_BASE:
            # Parameters, buffers and modules are called by their names in the module.
            label = _join(name, key) if key.endswith("hooks") else name
            if isinstance(attributes.get(key), dict):
                parts.append(_Items.of(label, attributes[key]))
        return parts
    if isinstance(value, dict | list):
        return [_Items.of(name, value)]
    is_config = name.rpartition(".")[2] == "config" and not isinstance(value, type)
    return [_Items.of(name, vars(value))] if is_config and hasattr(value, "__dict__") else []


class ModelWatch:
    """Modules as they are now.

    It holds what it looks at, memory too, so that nothing else can take an object's identity or a
    tensor's address.

    Args:
        models: with all that is in them.
        derived: look at what was made of them too, such as folded weights.

    Attributes:
        reason: why no graph of this model would be right; None where graphs are fine.
        tensors: the parameters, buffers and other tensors that modules hold.
        devices: where they are.
    """

    def __init__(self, *models: nn.Module, derived: bool) -> None:
        self._models = models
        self._derived = derived
        self._look()

    def _look(self) -> None:
        self.reason: str | None = None
        self._names: list[str] = []
        self._modules: list[nn.Module] = []
        self._by_identity: list[_Items] = []
        self._by_value: list[_Items] = []  # a comparison of lists is quicker
        for name, value, held in _walk(self._models, self._derived):
            if isinstance(value, nn.Module):
                self._names.append(name)
                self._modules.append(value)
                self.reason = self.reason or _module_reason(name, value)
            for items in held:
                (self._by_value if items.plain else self._by_identity).append(items)
        self._types = list(map(type, self._modules))
        self._identity_views = [_values(items.container) for items in self._by_identity]
        self._value_views = [_values(items.container) for items in self._by_value]
        self._identities = [*chain.from_iterable(i.values for i in self._by_identity), _END]
        self._equals = [*chain.from_iterable(i.values for i in self._by_value)]
        self._look_at_tensors()

    def _look_at_tensors(self) -> None:
        self._tensor_names: list[str] = []
        self.tensors: list[torch.Tensor] = []
        for items in self._by_identity:
            for key, value in zip(items.keys, items.values, strict=True):
                if isinstance(value, torch.Tensor):
                    reason = _tensor_reason(value)
                    if reason is None:
                        self._tensor_names.append(items.name(key))
                        self.tensors.append(value)
                    else:
                        self.reason = self.reason or f"{items.name(key)} {reason}"
        self.devices = {tensor.device for tensor in self.tensors}
        self._look_at_memory()

    def _look_at_memory(self) -> None:
        self._versions = list(map(_version, self.tensors))
        self._addresses = list(map(_address, self.tensors))
        self._aliases = [tensor.detach() for tensor in self.tensors]

    def renewed(self) -> ModelWatch:
        """A watch of the modules as they are now."""
        if not self._holds_the_same():
            return ModelWatch(*self._models, derived=self._derived)
        fresh = copy.copy(self)  # only tensors were edited: a tenth of the time
        fresh._look_at_memory()
        return fresh

    def is_same(self) -> bool:
        """Return whether all is what it was, without a search for an edited tensor."""
        return self._has_same_memory() and self.change() is None

    def change(self) -> str | None:
        """The name of something that is not what it was; None where all is."""
        if self._holds_the_same() and self._has_same_memory():
            return None
        change = self._name_change()
        if change is None:  # new objects that are equal to the old ones: look at these from now on
            fresh = ModelWatch(*self._models, derived=self._derived)
            change = self._name_change()  # again, for what others have edited meanwhile
            if change is None:
                self.__dict__.update(fresh.__dict__)
        return change

    def _has_same_memory(self) -> bool:
        return (
            list(map(_version, self.tensors)) == self._versions
            and list(map(_address, self.tensors)) == self._addresses
        )

    def _holds_the_same(self) -> bool:
        try:
            live = chain(chain.from_iterable(self._identity_views), (_END,))
            return (
                all(map(operator.is_, live, self._identities))
                and list(map(type, self._modules)) == self._types
                and list(chain.from_iterable(self._value_views)) == self._equals
            )
        except Exception:  # of a comparison, or a dict that another thread edits
            return False

    def _name_change(self) -> str | None:
        for items in (*self._by_identity, *self._by_value):
            change = items.change()
            if change is not None:
                return change
        for name, module, kind in zip(self._names, self._modules, self._types, strict=True):
            if type(module) is not kind:
                return f"the class of {name or 'the model'}"
        for name, tensor, version, address in zip(
            self._tensor_names, self.tensors, self._versions, self._addresses, strict=True
        ):
            if _version(tensor) != version or _address(tensor) != address:
                return name
        return None


def _module_reason(name: str, module: nn.Module) -> str | None:
    label = name or "the model"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{label} is a ScriptModule, whose weights cannot be watched"
    if module.training:
        return f"{label} is in training mode"
    if has_forward_hooks(module):
        return f"{label} has forward hooks, which a graph would leave out"
    return None


def _tensor_reason(tensor: torch.Tensor) -> str | None:
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return f"is a {type(tensor).__name__} of layout {tensor.layout}"
    if tensor.is_inference():
        return "was made in inference mode, where edits are not counted"
    return None

"""Whether modules still are what they were: the one look at that, for whatever is derived of them.

Folded weights and captured graphs are derived. An optimizer step, a replaced parameter or layer, a
hook, another `padding_mode`, an attribute that chooses another LoRA adapter would all pass them
unnoticed. So a `ModelWatch` remembers modules and what they hold, in two tiers:

- parts: parameters, buffers, modules in modules and hooks, by identity; tensors by version counter
  and address too; training modes and classes; attributes that are new, as a `forward` of a module's
  own; how often something was folded. They are looked at in each call.
- the values of all other attributes, config, lists and dicts in modules. The replay of a graph may
  let an earlier look at these count for a while.

What it cannot see: edits in place through `parameter.data`, which PyTorch does not count; variables
outside of modules, and attributes of objects of other libraries but for `config`.

The looks run in C loops.
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from .conditions import counts_edits, has_forward_hooks

ATTRIBUTES_COUNT = 0.05  # seconds for which graphs that are replayed let a look at attributes count

_END = object()  # after the last item, so that more or fewer items differ
_BASE_NAMES = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARTS = ("_parameters", "_buffers", "_modules", *_HOOKS)
# Of these an equal value is as good as the same one.
_PLAIN_TYPES = (type(None), bool, int, float, str, type, torch.dtype, torch.device)

_address = torch.Tensor.data_ptr
_folds = operator.attrgetter("folds")
_training = operator.itemgetter("training")
_version = operator.attrgetter("_version")


class Runner:
    """Base of objects that run a model and are no modules: a `GraphedModel`."""

    model: nn.Module


class Derived:
    """Base of what a module keeps that was made of it.

    Attributes:
        folds: counts what was folded anew or dropped.
    """

    folds = 0


def _join(label: str, key: Any) -> str:
    return f"{label}.{key}" if label else str(key)


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _items(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN_TYPES) or (
        isinstance(value, tuple) and all(map(_is_plain, value))
    )


def _same(before: Any, after: Any) -> bool:
    if before is after:
        return True
    return type(before) is type(after) and _is_plain(before) and bool(before == after)


def _containers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Dicts and lists to look at in one object, under the name of what is in them."""
    if isinstance(value, nn.Module):
        attributes = vars(value)
        yield name, attributes
        for key in _PARTS:
            # Parameters, buffers and modules are called by their names in the module.
            if isinstance(attributes.get(key), dict):
                yield _join(name, key) if key.endswith("hooks") else name, attributes[key]
    elif isinstance(value, dict | list):
        yield name, value
    elif name.rpartition(".")[2] == "config" and isinstance(getattr(value, "__dict__", 0), dict):
        yield name, vars(value)  # no class's, which is a mappingproxy


def _walk(models: Sequence[nn.Module]) -> Iterator[tuple[str, Any, list[tuple[str, Any]]]]:
    """What `models` hold, each thing once, by name, with the dicts and lists to look at in it."""
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", models[0])]
    if len(models) > 1:
        todo = [(str(index), model) for index, model in enumerate(models)]
    while todo:
        name, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        held = list(_containers(name, value))
        if held or isinstance(value, Derived):
            yield name, value, held
        for label, container in held:
            for key, inner in _items(container):
                if key not in _BASE_NAMES and not _is_plain(inner):
                    inner = inner.model if isinstance(inner, Runner) else inner
                    todo.append((_join(label, key), inner))


class ModelWatch:
    """Modules as they are now.

    It holds what it looks at, memory too, so that nothing else can take an object's identity or a
    tensor's address.

    Args:
        models: with all that is in them.
        derived: look at what was made of them too, such as folded weights.
        tensors: look at what is in tensors too, which is their memory and how often it was edited.

    Attributes:
        reason: why no graph of this model would be right; None where graphs are fine.
        tensors: the parameters, buffers and other tensors that modules hold.
        devices: where they are.
    """

    def __init__(self, *models: nn.Module, derived: bool, tensors: bool = True) -> None:
        self._models = models
        self._options = {"derived": derived, "tensors": tensors}
        self.reason: str | None = None
        self.tensors: list[torch.Tensor] = []
        self._tensor_names: list[str] = []
        self._named: dict[str, Any] = {}  # all that is compared, but for the contents of tensors
        self._modules: list[nn.Module] = []
        self._derived: dict[str, Derived] = {}
        parts: list[Any] = []
        others: list[Any] = []
        self._no_hooks: list[Any] = []  # empty dicts
        self._by_value: list[Any] = []  # attributes that are all plain: quicker to compare
        for name, value, held in _walk(models):
            if isinstance(value, nn.Module):
                self._modules.append(value)
                self._named[f"the class of {name or 'the model'}"] = type(value)
                self.reason = self.reason or _module_reason(name, value)
            elif isinstance(value, Derived) and derived:
                self._derived[name] = value
            for index, (label, container) in enumerate(held):
                items = [(_join(label, key), inner) for key, inner in _items(container)]
                self._named.update(items)
                if tensors:
                    self._note_tensors(items)
                if isinstance(value, nn.Module) and index > 0 and (items or label != name):
                    (parts if items else self._no_hooks).append(container)
                elif isinstance(value, nn.Module) and all(
                    _is_plain(inner) for key, inner in _items(container) if key not in _BASE_NAMES
                ):
                    self._by_value.append(container)
                else:
                    others.append(container)
        self.devices = {tensor.device for tensor in self.tensors}
        self._types = list(map(type, self._modules))
        with_modes = (vars(module) for module in self._modules if "training" in vars(module))
        self._with_modes = list(with_modes)  # all but those of torch.jit
        self._modes = list(map(_training, self._with_modes))
        self._attributes = list(map(vars, self._modules))
        self._counts = list(map(len, self._attributes))
        self._parts, self._parts_then = _as_compared(parts)
        self._others, self._others_then = _as_compared(others)
        self._values = list(map(_values, self._by_value))
        self._values_then = list(chain.from_iterable(self._values))
        self._folds_then = list(map(_folds, self._derived.values()))
        self._looked = time.monotonic()
        self._look_at_memory()

    def _note_tensors(self, items: list[tuple[str, Any]]) -> None:
        for name, value in items:
            if isinstance(value, torch.Tensor):
                reason = _tensor_reason(value)
                if reason is None:
                    self._tensor_names.append(name)
                    self.tensors.append(value)
                else:
                    self.reason = self.reason or f"{name} {reason}"

    def _look_at_memory(self) -> None:
        self._versions = list(map(_version, self.tensors))
        self._addresses = list(map(_address, self.tensors))
        self._aliases = [tensor.detach() for tensor in self.tensors]

    def renewed(self) -> ModelWatch:
        """A watch of the modules as they are now."""
        if not self._looks_same(0.0):
            return ModelWatch(*self._models, **self._options)
        fresh = copy.copy(self)  # only tensors were edited: a tenth of the time
        fresh._look_at_memory()
        return fresh

    def is_same(self, patience: float = 0.0) -> bool:
        """Return whether all is what it was, without a search for an edited tensor."""
        if not self._has_same_memory():
            return False
        return self._looks_same(patience) or self.change(patience) is None

    def change(self, patience: float = 0.0) -> str | None:
        """The name of something that is not what it was; None where all is.

        Args:
            patience: seconds for which a look at attributes counts.
        """
        if self._looks_same(patience) and self._has_same_memory():
            return None
        fresh = ModelWatch(*self._models, **self._options)
        change = self._difference(fresh)
        if change is None:  # new objects that are equal to the old ones: look at these from now on
            self.__dict__.update(fresh.__dict__)
        return change

    def _looks_same(self, patience: float) -> bool:
        if not self._has_same_parts():
            return False
        now = time.monotonic()
        if now - self._looked >= patience:
            if not self._has_same_attributes():
                return False
            self._looked = now
        return True

    def _has_same_parts(self) -> bool:
        try:
            live = chain(chain.from_iterable(self._parts), (_END,))
            return (
                all(map(operator.is_, live, self._parts_then))
                and not any(self._no_hooks)
                and list(map(type, self._modules)) == self._types
                and list(map(len, self._attributes)) == self._counts
                and list(map(_training, self._with_modes)) == self._modes
                and list(map(_folds, self._derived.values())) == self._folds_then
            )
        except (RuntimeError, KeyError):  # another thread edits a dict
            return False

    def _has_same_memory(self) -> bool:
        return (
            list(map(_version, self.tensors)) == self._versions
            and list(map(_address, self.tensors)) == self._addresses
        )

    def _has_same_attributes(self) -> bool:
        try:
            live = chain(chain.from_iterable(self._others), (_END,))
            return (
                all(map(operator.is_, live, self._others_then))
                and list(chain.from_iterable(self._values)) == self._values_then
            )
        except Exception:  # of a comparison, or a dict that another thread edits
            return False

    def _difference(self, now: ModelWatch) -> str | None:
        for name in {**self._named, **now._named}:
            if not _same(self._named.get(name, _END), now._named.get(name, _END)):
                return name
        for name, tensor, version, address in zip(
            self._tensor_names, self.tensors, self._versions, self._addresses, strict=True
        ):
            if _version(tensor) != version or _address(tensor) != address:
                return name
        for (name, derived), folds in zip(self._derived.items(), self._folds_then, strict=True):
            if derived.folds != folds:
                return f"what is folded in {name}"
        return None


def _as_compared(containers: list[Any]) -> tuple[list[Any], list[Any]]:
    """Views of what is in dicts and lists, and what is in them now."""
    views = list(map(_values, containers))
    return views, [*chain.from_iterable(views), _END]


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
    if not counts_edits(tensor):
        return "was made in inference mode, where edits are not counted"
    return None

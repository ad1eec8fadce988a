"""The names and signatures that users type, against a list that is committed.

A change here is a change for users: it goes into CHANGELOG.md as well. After one that is meant,
`python tests/test_public_api.py` writes the list anew.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastseg
import fastseg.kernels
from fastseg.kernels.core.optional_triton import HAS_TRITON

LISTED = Path(__file__).with_name("public_api.txt")


def public_api() -> Iterator[str]:
    """One line for each name: signatures without annotations, whose text depends on Python."""
    for module in (fastseg, fastseg.kernels):
        for name in sorted(module.__all__):
            yield from _described(f"{module.__name__}.{name}", getattr(module, name))


def _described(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        bases = [base.__name__ for base in value.__mro__[1:-1] if not _is_ours(base)]
        arguments = "" if issubclass(value, BaseException) else _signature(value)
        yield f"{name}{arguments}: class{f' of {bases[0]}' if bases else ''}"
        for attribute in sorted(_public_attributes(value)):
            static = inspect.getattr_static(value, attribute)
            if isinstance(static, property):
                yield f"{name}.{attribute} (property)"
            elif inspect.isclass(static):
                yield f"{name}.{attribute}: {static.__name__}"
            elif callable(getattr(value, attribute)):
                kind = type(static).__name__
                note = f" ({kind})" if kind in ("classmethod", "staticmethod") else ""
                yield f"{name}.{attribute}{_signature(getattr(value, attribute))}{note}"
    elif callable(value):
        yield f"{name}{_signature(value)}"
    else:
        yield f"{name}: {type(value).__name__} {sorted(value)}"


def _is_ours(kind: Any) -> bool:
    return kind.__module__.partition(".")[0] == "fastseg"


def _public_attributes(kind: type) -> set[str]:
    return {
        name for base in kind.__mro__ if _is_ours(base) for name in vars(base) if name[0] != "_"
    }


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters))


def test_names_and_signatures():
    now = list(public_api())
    assert now == LISTED.read_text(encoding="utf-8").splitlines(), (
        "the public API has changed; where it is meant, say so in CHANGELOG.md and run "
        "`python tests/test_public_api.py`"
    )


def test_no_signature_has_any():
    """`Any` in a signature switches type checkers off, silently."""
    found = [
        f"{name}: {annotation}"
        for name, function in _public_functions()
        for annotation in inspect.get_annotations(function).values()
        if re.search(r"\bAny\b", str(annotation))
    ]
    assert found == []


def _public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for module in (fastseg, fastseg.kernels):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                for attribute in sorted(_public_attributes(value) | {"__init__"}):
                    static = inspect.getattr_static(value, attribute)
                    static = static.fget if isinstance(static, property) else static
                    function = getattr(static, "__func__", static)
                    if inspect.isfunction(function) and _is_ours(function):
                        yield f"{name}.{attribute}", function
            elif callable(value):
                yield name, value


def test_classes_are_named_by_where_users_import_them():
    classes = [value for value in vars(fastseg).values() if inspect.isclass(value)]
    assert len(classes) >= 11
    for kind in classes:
        assert kind.__module__ == "fastseg"
        assert pickle.loads(pickle.dumps(kind)) is kind


def test_no_module_shares_a_name_with_what_is_in_its_package():
    """`fastseg.kernels.sr_attention` was the module or the function, as imports had it."""
    modules = [m.name for m in pkgutil.walk_packages(fastseg.__path__, "fastseg.")]
    assert len(modules) > 100
    for name in modules:
        needs_triton = name == "fastseg.kernels.tune.tuner" and not HAS_TRITON
        if name.endswith("__main__") or needs_triton:
            continue
        package, _, last = name.rpartition(".")
        module = importlib.import_module(name)
        assert getattr(importlib.import_module(package), last) is module, name


if __name__ == "__main__":
    LISTED.write_text("\n".join(public_api()) + "\n", encoding="utf-8")

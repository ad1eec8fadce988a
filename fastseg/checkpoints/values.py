"""Values of a configuration as people and programs write them, as plain Python's.

What is meant is taken: NumPy's numbers, 2.0 or "2" for 2, a list of names for a dictionary.
Anything else is a ValueError that names the field.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def number(name: str, value: Any) -> Any:
    """A real number, or a text of one, as int or float."""
    found = value
    if isinstance(value, str):
        try:
            found = float(value)
        except ValueError:
            found = None
    if not isinstance(found, numbers.Real) or isinstance(found, bool):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return int(found) if isinstance(found, numbers.Integral) else float(found)


def whole(name: str, value: Any) -> int:
    """An integer, in whichever form."""
    try:
        found = number(name, value)
        if int(found) == found:
            return int(found)
    except (ValueError, OverflowError):  # also of nan and inf
        pass
    raise ValueError(f"{name}: expected an integer, got {value!r}")


def flag(name: str, value: Any) -> bool:
    """True or False, NumPy's too; a text would be true whatever it says."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(f"{name}: expected true or false, got {value!r}")


def per_stage(name: str, values: Any, kind: Callable[[str, Any], Any] = whole) -> list[Any]:
    """A list of a value for each stage."""
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected one value for each encoder block, got {values!r}")
    return [kind(name, value) for value in values]


# By number, or by the number as a text, as in JSON; or in order.
ClassNames = Mapping[int, str] | Mapping[str, str] | Sequence[str] | np.ndarray


def class_names(id2label: Any) -> dict[int, str]:
    """Names by number, of a dictionary with numbers or texts of them as keys, or of a list."""
    if isinstance(id2label, list | tuple | np.ndarray):
        id2label = dict(enumerate(id2label))
    if not isinstance(id2label, Mapping) or not id2label:
        raise ValueError(
            f"id2label: expected names by number, as {{0: 'road'}}, or a list, got {id2label!r}"
        )
    return {whole("id2label", key): name for key, name in id2label.items()}


def names_of(num_labels: int, names: Mapping[int, str]) -> dict[int, str]:
    """Names of the classes 0 to `num_labels` - 1: LABEL_3 where 3 has none."""
    return {label: names.get(label, f"LABEL_{label}") for label in range(num_labels)}

"""Configurations from config.json and from arguments: which fields they have, and what counts."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from .report import CheckpointError
from .values import class_names, whole

# Names of other libraries, which are less like ours than some wrong ones.
_ELSEWHERE = {
    "in_chans": "num_channels",
    "in_channels": "num_channels",
    "num_classes": "num_labels",
    "classes": "num_labels",
    "embed_dims": "hidden_sizes",
    "num_heads": "num_attention_heads",
    "drop_rate": "hidden_dropout_prob",
    "ignore_index": "semantic_loss_ignore_index",
}


def field_names(config_class: type[Any]) -> set[str]:
    """The fields of a configuration that its constructor and those of its bases name."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name
        for constructor in (vars(base).get("__init__") for base in config_class.__mro__)
        if constructor is not None
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind in named and name != "self"
    }


def unknown_keyword(name: str, value: Any, expected: str, known: Collection[str]) -> TypeError:
    """The error for a keyword that is none of `known`, with the nearest that is one.

    Args:
        expected: what would have been right, as "a field of SegformerConfig".
    """
    likely = [_ELSEWHERE[name]] if _ELSEWHERE.get(name) in known else []
    likely += difflib.get_close_matches(name, sorted(known), n=1)
    hint = f"; did you mean {likely[0]}?" if likely else ""
    return TypeError(f"{name}: expected {expected}, got {name}={value!r}{hint}")


def check_overrides(
    config_classes: Sequence[type[Any]], overrides: Mapping[str, Any], arguments: Collection[str]
) -> None:
    """Raise TypeError unless all are fields of the classes.

    Args:
        arguments: what `from_pretrained` takes besides, to be named in the error.
    """
    known = set().union(*map(field_names, config_classes))
    names = " or ".join(dict.fromkeys(one.__name__ for one in config_classes))
    for name, value in overrides.items():
        if name not in known:
            expected = f"an argument of from_pretrained or a field of {names}"
            raise unknown_keyword(name, value, expected, known | {*arguments})


def make_config(
    config_class: type[Any],
    path: Path | str,
    fields: Mapping[str, Any],
    num_labels: int | None = None,
    id2label: Any = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """A configuration of what a config.json says and of what the caller says otherwise.

    Raises:
        CheckpointError: the fields are not valid; `path` is where they come from.
        ValueError: what the caller says is not.
    """
    overrides = overrides or {}
    try:
        config = config_class.from_dict(fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a valid configuration: {error}") from error
    fields = {**fields, **overrides}
    if id2label is not None or (num_labels is not None and num_labels != config.num_labels):
        for name in ("num_labels", "id2label", "label2id"):
            if name not in overrides:
                fields.pop(name, None)
        if id2label is not None:
            names = class_names(id2label)
            if num_labels is not None and num_labels != len(names):
                raise ValueError(
                    "num_labels and id2label: expected the same number of classes, got "
                    f"{num_labels} and {len(names)}"
                )
            fields["id2label"] = names
        else:
            fields["num_labels"] = num_labels
    return config_class.from_dict(fields)


def settle_labels(
    fields: MutableMapping[str, Any], rows: int | None, path: Path | str
) -> tuple[str, ...]:
    """Make `num_labels` and `id2label` of a config.json agree; return a remark where they did not.

    As in transformers 5 the number counts, but where the weights have as many classes as names.

    Args:
        rows: classes that the weights have; None where they have no classifier.

    Raises:
        CheckpointError: they are no number and no names.
    """
    if fields.get("num_labels") is None or not fields.get("id2label"):
        return ()
    try:
        count = whole("num_labels", fields["num_labels"])
        names = class_names(fields["id2label"])
    except ValueError as error:
        raise CheckpointError(f"{path}: not a valid configuration: {error}") from error
    if count == len(names):
        return ()
    said = f"num_labels in {Path(path).name} is {count}, and id2label has {len(names)} names: "
    if rows == len(names):
        del fields["num_labels"]
        return (f"{said}the weights have {rows} classes, which take these names",)
    if count > len(names):
        return (f"{said}classes without a name are called LABEL_ and their number",)
    return (f"{said}names from {count} on are left out",)

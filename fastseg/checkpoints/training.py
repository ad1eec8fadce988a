"""Finding a model's weights in what training programs store beside them.

mmengine, Lightning, timm, torchvision's and DETR's scripts, DeepSpeed and most people's own loops
write a dictionary with the weights in one of its entries, and often a second set of weights: an
average over the training (EMA, SWA) or a teacher's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .report import CheckpointError

# Words in the names of entries and modules that hold an average of the weights, or a teacher's.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow|teacher|momentum)(?:[._]|$)")
_STATE = re.compile(r"optim|sched|scaler|rng|callback", re.IGNORECASE)
# Taken whatever they hold, so that a wrong entry in them is named.
_ENTRIES = ("state_dict", "model_state_dict")
_DEPTH = 3


@dataclass(frozen=True)
class Choice:
    """What of a file is taken.

    average: an average of the weights (EMA), or a teacher's, instead of the model's own.
    strict: whether an entry that is no tensor is an error; else it is left out.
    source: the library that it is of, where the file does not tell: "keras_cv".
    """

    average: bool = False
    strict: bool = True
    source: str | None = None


DEFAULT_CHOICE = Choice()


class Found(NamedTuple):
    """A set of weights, remarks about others, and whether it is an average."""

    weights: Mapping[Any, Any]
    notes: tuple[str, ...] = ()
    averaged: bool = False


def is_averaged(name: str) -> bool:
    """Return whether a name, of words between dots or underscores, is of averaged weights."""
    return bool(_AVERAGED.search(name.lower()))


def weights_in(content: Mapping[Any, Any], average: bool = False) -> Found:
    """The model's own set of weights in what a file holds, or an average of them.

    Of several the larger goes before the smaller. Where there is nothing of the kind asked for,
    the other is taken, and where nothing looks like weights, all of it.

    Raises:
        CheckpointError: the weights are in other files.
    """
    found = dict(_sets(content, ()))
    if not found:
        entry = next((key for key in _ENTRIES if isinstance(content.get(key), Mapping)), None)
        return Found(content if entry is None else content[entry])
    averages = {place for place in found if is_averaged(place)}
    own = _traded(content)
    if own is not None:
        averages = averages - {own} | {"state_dict"}
    taken, *others = sorted(
        found, key=lambda place: (place == own, (place in averages) != average, -len(found[place]))
    )
    weights = found[taken]
    tensors = [value for value in weights.values() if isinstance(value, torch.Tensor)]
    if not any(tensor.numel() for tensor in tensors):
        raise CheckpointError(
            "expected weights, got empty tensors that stand for them, as DeepSpeed's ZeRO-3 writes "
            "them: run the zero_to_fp32.py that is beside, which makes pytorch_model.bin"
        )
    # Not a loss's class weights, but what may be meant instead.
    rivals = [place for place in others if 2 * len(found[place]) > len(weights)]
    notes = [remark(taken, rivals, "the file")] if rivals else []
    if own is not None and taken == "state_dict":
        notes.append(f"'state_dict' holds an average of the weights, {own!r} the model's own")
    return Found(weights, tuple(notes), taken in averages)


def remark(taken: str, others: list[str], where: str) -> str:
    """What is said of several sets of weights."""

    def named(place: str) -> str:
        return repr(place) if place else "those without a prefix"

    return (
        f"{where} has several sets of weights: {named(taken)} {'was' if taken else 'were'} taken, "
        f'{" and ".join(map(named, others))} left out; to take another, say weights="model" or '
        'weights="ema", or give its tensors as state_dict='
    )


def _traded(content: Mapping[Any, Any]) -> str | None:
    """The entry with the model's own weights, where an average has its place in `state_dict`.

    So write Lightning's WeightAveraging and mmengine's EMAHook, which load `state_dict` for use.
    """
    if {"state_dict", "current_model_state", "averaging_state"} <= content.keys():
        return "current_model_state"
    meta = content.get("meta")
    by_mmengine = isinstance(meta, Mapping) and "mmengine_version" in meta
    if by_mmengine and {"state_dict", "ema_state_dict"} <= content.keys():
        return "ema_state_dict"
    return None


def _sets(content: Mapping[Any, Any], place: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """State dicts in nested dictionaries, by the entries that lead to them."""
    if any(_is_weight(name, value) for name, value in content.items()):
        yield ".".join(place), content
        return
    if len(place) == _DEPTH:
        return
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Mapping) and not _STATE.search(name):
            yield from _sets(value, (*place, name))


def _is_weight(name: Any, value: Any) -> bool:
    return isinstance(name, str) and name.endswith(".weight") and isinstance(value, torch.Tensor)

"""Finding a model's weights in what training programs store beside them.

mmengine, Lightning, timm, torchvision's and DETR's scripts, DeepSpeed and most people's own loops
write a dictionary with the weights in one of its entries, and often a second set of weights: an
average over the training (EMA, SWA) or a teacher's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .report import CheckpointError

# Words in the names of entries and modules that hold an average of the weights, or a teacher's.
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow|teacher|momentum)(?:[._]|$)")
_STATE = re.compile(r"optim|sched|scaler|rng|callback", re.IGNORECASE)
# Taken whatever they hold, so that a wrong entry in them is named.
_ENTRIES = ("state_dict", "model_state_dict")
_DEPTH = 3


def is_averaged(name: str) -> bool:
    """Return whether a name, of words between dots or underscores, is of averaged weights."""
    return bool(_AVERAGED.search(name.lower()))


def weights_in(content: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """The model's own set of weights in what a file holds, and remarks about others.

    The model's own goes before averaged ones, and the larger before the smaller. Where nothing
    looks like weights, all of it is returned.

    Raises:
        CheckpointError: the weights are in other files.
    """
    found = dict(_sets(content, ()))
    if not found:
        entry = next((key for key in _ENTRIES if isinstance(content.get(key), Mapping)), None)
        return (content, ()) if entry is None else (content[entry], ())
    ranked = sorted(found, key=lambda place: (is_averaged(place), -len(found[place])))
    taken, *others = ranked
    weights = found[taken]
    tensors = [value for value in weights.values() if isinstance(value, torch.Tensor)]
    if not any(tensor.numel() for tensor in tensors):
        raise CheckpointError(
            "expected weights, got empty tensors that stand for them, as DeepSpeed's ZeRO-3 writes "
            "them: run the zero_to_fp32.py that is beside, which makes pytorch_model.bin"
        )
    # Not a loss's class weights, but what may be meant instead.
    rivals = [place for place in others if 2 * len(found[place]) > len(weights)]
    if not rivals:
        return weights, ()
    return weights, (remark(taken, rivals, "the file"),)


def remark(taken: str, others: list[str], where: str) -> str:
    """What is said of several sets of weights."""
    names = " and ".join(repr(name) for name in others)
    which = f"{taken!r} was taken" if taken else "those without a prefix were taken"
    return (
        f"{where} has several sets of weights: {which}, {names} left out; to take another, give "
        "its tensors as state_dict="
    )


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

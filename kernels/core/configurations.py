"""Launch configurations: committed JSON per device family, looked up by nearest size.

Nothing is tuned at run time. A file holds, per kernel, entries like

    {"dtype": "half", "sizes": {"rows": 16384, "channels": 64}, "config": {"BLOCK_M": 64, ...}}

`dtype` is "half" (float16 and bfloat16), "float32" or "any". `fastseg tune` writes such a file from
measurements on the present GPU; FASTSEG_CONFIGS names it. For a kernel that it names, that file's
entries come before the family's. Entries of the same sizes differ in what their blocks divide.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "configs"
FAMILIES = ("sm_80", "sm_90", "sm_100", "sm_120")

# Sizes that an image and a batch decide. The others are widths of a layer, which decide what fits
# into registers: twice the width is further away than any number of rows.
_AMOUNTS = ("rows", "tokens", "keys", "outputs", "positions")
_WIDTH_WEIGHT = 100

Config = dict[str, Any]
# (half precision?, sizes) -> what a tuner tries, all of it right by design. One may still ask for
# more registers or shared memory than a GPU has, or not divide a size: the tuner leaves it out.
Candidates = Callable[[bool, dict[str, int]], list[Config]]


def product(**values: tuple[Any, ...]) -> list[Config]:
    """All configurations with one of each of `values`."""
    choices = itertools.product(*values.values())
    return [dict(zip(values, choice, strict=True)) for choice in choices]


class Query(NamedTuple):
    """Key by which a launch looks up its configuration."""

    kernel: str
    dtype: str  # "half" or "float32"
    sizes: tuple[tuple[str, int], ...]
    divides: tuple[tuple[str, int], ...]


_overrides: dict[Query, Config] = {}
_recorders: list[list[Query]] = []


@functools.cache
def device_family(device: torch.device) -> str:
    """The family whose file serves `device`: by compute capability, else "default"."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "default"
    family = f"sm_{torch.cuda.get_device_capability(device)[0]}0"
    return family if family in FAMILIES else "default"


def read_kernels(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries of a file by kernel, as it is now.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["kernels"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a file that `fastseg tune` wrote, got {error!r}"
        ) from error


_entries = functools.cache(read_kernels)  # for launches, which look up all the time


def configs_source(device: torch.device) -> str:
    """Name the files that give the configurations for `device`, in a line for people."""
    family = device_family(device)
    source = json.loads((FOLDER / f"{family}.json").read_text(encoding="utf-8"))["source"]
    user_file = os.environ.get("FASTSEG_CONFIGS")
    return f"{user_file}, then " * bool(user_file) + f"{family} ({source})"


def family_entries(family: str) -> dict[str, list[dict[str, Any]]]:
    """The committed entries of a family, by kernel."""
    return _entries(FOLDER / f"{family}.json")


def look_up(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Mapping[str, int],
    divides: Mapping[str, int] | None = None,
) -> Config:
    """The configuration for a launch: of the entries that fit, the one nearest in size.

    Args:
        sizes: what the entries are told apart by; the distance is the sum of the logarithms of
            the ratios, over the sizes that an entry names, where a layer's widths come first.
        divides: sizes that a block must divide, by the block's name.

    Raises:
        LookupError: no entry fits.
    """
    query = Query(
        kernel,
        "float32" if dtype == torch.float32 else "half",
        tuple(sizes.items()),
        tuple((divides or {}).items()),
    )
    for recorder in _recorders:
        recorder.append(query)
    return answer(query, device)


def answer(query: Query, device: torch.device) -> Config:
    """The configuration for `query` on `device`, as `look_up` gives it."""
    if query in _overrides:
        return dict(_overrides[query])
    return dict(_nearest(query, device_family(device), os.environ.get("FASTSEG_CONFIGS")))


@functools.lru_cache(maxsize=4096)  # sizes of images are endless
def _nearest(query: Query, family: str, user_file: str | None) -> Config:
    wanted = dict(query.sizes)

    def distance(entry: dict[str, Any]) -> float:
        return sum(
            (1 if name in _AMOUNTS else _WIDTH_WEIGHT)
            * abs(math.log2(max(wanted[name], 1) / max(size, 1)))
            for name, size in entry.get("sizes", {}).items()
        )

    paths = [FOLDER / f"{family}.json", FOLDER / "default.json"]
    if user_file:
        paths.insert(0, Path(user_file))
    for path in paths:
        fitting = [
            entry
            for entry in _entries(path).get(query.kernel, [])
            if entry["dtype"] in (query.dtype, "any") and fits(entry["config"], query)
        ]
        if fitting:
            # Of two as near, the one that names more sizes: a measured one names them all.
            nearest = min(fitting, key=lambda e: (distance(e), -len(e.get("sizes", {}))))
            return dict(nearest["config"])
    raise LookupError(f"no configuration for {query}")


def is_tuning() -> bool:
    """Return whether a block of `overrides` or `record_queries` is open."""
    return bool(_overrides or _recorders)


def fits(config: Config, query: Query) -> bool:
    """Return whether the blocks of `config` divide the sizes that they must."""
    return all(size % config.get(block, 1) == 0 for block, size in query.divides)


@contextlib.contextmanager
def overrides(configs: Mapping[Query, Config]) -> Iterator[None]:
    """Answer each query inside the block by its configuration here, whatever the files say.

    For the tuner; it holds for the whole process.
    """
    global _overrides
    before, _overrides = _overrides, {**_overrides, **configs}
    try:
        yield
    finally:
        _overrides = before


@contextlib.contextmanager
def record_queries() -> Iterator[list[Query]]:
    """Record what is looked up inside the block, in order. For the tuner."""
    queries: list[Query] = []
    _recorders.append(queries)
    try:
        yield queries
    finally:
        _recorders.pop()

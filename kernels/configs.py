"""Launch configurations: committed JSON per device family, looked up by nearest size.

Nothing is tuned at run time. A file holds, per kernel, entries like

    {"dtype": "half", "sizes": {"rows": 16384, "channels": 64}, "config": {"BLOCK_M": 64, ...}}

`dtype` is "half" (float16 and bfloat16), "float32" or "any". `fastseg tune` writes such a file from
measurements on the present GPU; FASTSEG_CONFIGS names it.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "configs"
FAMILIES = ("sm_80", "sm_90", "sm_100", "sm_120")

Config = dict[str, Any]


@functools.cache
def device_family(device: torch.device) -> str:
    """The family whose file serves `device`: by compute capability, else "default"."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "default"
    family = f"sm_{torch.cuda.get_device_capability(device)[0]}0"
    return family if family in FAMILIES else "default"


@functools.cache
def _read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries of a file by kernel.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["kernels"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a file that `fastseg tune` wrote, got {error!r}"
        ) from error


def _entries(kernel: str, family: str) -> list[list[dict[str, Any]]]:
    """Entries of `kernel` in the user's file, the family's and the default one, in this order."""
    paths = [FOLDER / f"{family}.json", FOLDER / "default.json"]
    if user_file := os.environ.get("FASTSEG_CONFIGS"):
        paths.insert(0, Path(user_file))
    return [_read(path).get(kernel, []) for path in paths]


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
            the ratios, over the sizes that an entry names.
        divides: sizes that a block must divide, by the block's name.

    Raises:
        LookupError: no entry fits.
    """
    return _look_up(
        kernel,
        device_family(device),
        "float32" if dtype == torch.float32 else "half",
        tuple(sizes.items()),
        tuple((divides or {}).items()),
        os.environ.get("FASTSEG_CONFIGS"),
    )


@functools.cache
def _look_up(
    kernel: str,
    family: str,
    dtype: str,
    sizes: tuple[tuple[str, int], ...],
    divides: tuple[tuple[str, int], ...],
    user_file: str | None,  # part of the key
) -> Config:
    wanted = dict(sizes)

    def distance(entry: dict[str, Any]) -> float:
        return sum(
            abs(math.log2(max(wanted[name], 1) / max(size, 1)))
            for name, size in entry.get("sizes", {}).items()
        )

    for entries in _entries(kernel, family):
        fitting = [
            entry
            for entry in entries
            if entry["dtype"] in (dtype, "any")
            and all(size % entry["config"].get(block, 1) == 0 for block, size in divides)
        ]
        if fitting:
            return dict(min(fitting, key=distance)["config"])
    raise LookupError(f"{kernel}: no configuration for {dtype}, {wanted}, {dict(divides)}")

"""Colours, sizes and settings that all pictures share.

One hue a family, for people with any colour vision: greys and greyish blue for other libraries in
PyTorch, muted blue-green for other runtimes, orange to brown for fastseg. Names stand beside the
bars, so that no reader needs the colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.colors import to_hex, to_rgb

from ..shown import OURS

WIDTH = 8.2  # inches: some 790 pixels where a page shows an SVG at its own size
FONT_SIZE = 8.0
TEXT = "#1f2328"
QUIET = "#6e7781"  # of notes and of what is missing
GRID = "#e4e7ea"

COLOURS = {
    "transformers eager": "#5b6168",
    "transformers compiled": "#8b9198",
    "transformers max-autotune": "#9db4d3",
    "transformers CUDA graph": "#6c8ebf",
    "smp": "#a4a1b8",
    "torch-tensorrt": "#4f8a8b",
    "ONNX Runtime": "#9cc4c4",
    "OpenVINO fp32": "#79adae",
    "OpenVINO default": "#5f9c9d",
    "fastseg eager": "#d55e00",
    "fastseg accelerate": "#e8822e",
    "fastseg compiled": "#b34d00",
    "fastseg Triton": "#ee7733",
    "fastseg CUDA graph": "#8c3b00",
    "fastseg ONNX Runtime": "#f2ab5e",
    "fastseg OpenVINO fp32": "#e69f00",
    "fastseg OpenVINO default": "#c98a00",
}
FUSED = "fused label map"  # the last step of the waterfall
_OTHER_OURS = "#8c3b00"
_OTHER = "#8b949e"
_MARKERS = "osD^vP*X<>hp"

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "fastseg",  # else names inside a file are drawn by chance
    "svg.fonttype": "none",  # text stays text; with paths files are four times as large
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the first comes with matplotlib
    "font.size": FONT_SIZE,
    "text.color": TEXT,
    "axes.edgecolor": GRID,
    "axes.labelcolor": QUIET,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": TEXT,
    "xtick.labelsize": 7.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def settings() -> Iterator[None]:
    """matplotlib as all pictures need it, whatever the user's own settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def is_ours(name: str) -> bool:
    """Whether `name` is a provider of fastseg, or a step of it."""
    return name.startswith(OURS) or name == FUSED


def colour(name: str, part: int = 0) -> str:
    """Of a provider, with or without its star, or of a step; parts after the first are light."""
    known = COLOURS.get(name.removesuffix(" *"), _OTHER_OURS if is_ours(name) else _OTHER)
    return known if part == 0 else lighter(known)


def lighter(colour: str) -> str:
    """What `colour` is at a third of its strength on white."""
    red, green, blue = to_rgb(colour)
    return str(to_hex((1 - (1 - red) / 3, 1 - (1 - green) / 3, 1 - (1 - blue) / 3)))


def marker(name: str) -> str:
    """Tells lines of one family apart without their colours."""
    known = list(COLOURS)
    base = name.removesuffix(" *")
    return _MARKERS[(known.index(base) if base in known else len(known)) % len(_MARKERS)]

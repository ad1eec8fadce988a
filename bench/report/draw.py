"""Draws pictures with matplotlib. An SVG of the same rows is the same file, and has its figures.

Names stand beside the bars, so that no reader needs the colours.
"""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..providers import PROVIDERS
from .pictures import Picture

WIDTH = 8.2  # inches: some 790 pixels where a page shows an SVG at its own size
TEXT = "#1f2328"
QUIET = "#6e7781"  # of notes and of what is missing
GRID = "#e4e7ea"
_MARKERS = "osD^vP*X<>hp"

# Whatever the user's own settings are.
_SETTINGS: dict[Any, Any] = {
    **mpl.rcParamsDefault,
    "svg.hashsalt": "fastseg",  # else names inside a file are drawn by chance
    "svg.fonttype": "none",  # text stays text; with paths files are four times as large
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the first comes with matplotlib
    **{"font.size": 8.0, "text.color": TEXT, "xtick.color": QUIET, "ytick.color": TEXT},
    **{"axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRID},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": GRID},
}


def save(picture: Picture, folder: Path) -> Path:
    """Write `picture` as an SVG into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{picture.name}.svg"
    figures = json.dumps(picture.data(), sort_keys=True)
    metadata = {"Title": picture.title, "Description": figures, "Date": None}
    metadata["Creator"] = "python -m bench plots"
    with mpl.rc_context(_SETTINGS):
        figure_of(picture).savefig(path, metadata=metadata)
    return path


def figure_of(picture: Picture) -> Figure:
    """`picture`, drawn."""
    panels, on_lines = picture.panels, picture.kind == "lines"
    names = list(dict.fromkeys(name for one in panels.values() for name in one["name"]))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    notes = "\n".join(textwrap.wrap(picture.note, 140))
    inner = 2.2 if on_lines else 0.55 + 0.175 * len(names)
    height = 0.9 + rows * inner + 0.16 * (notes.count("\n") + 2)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = list(figure.subplots(rows, columns, sharey=not on_lines, squeeze=False).flat)
    for axes, (title, panel) in zip(all_axes, panels.items(), strict=False):
        axes.set_title(title)
        axes.tick_params(length=0)
        (lines if on_lines else bars)(axes, panel, names, picture.limit)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    figure.suptitle(f"{picture.title}\n", x=0.01, ha="left", size=11)
    figure.text(0.01, 1 - 0.42 / height, f"{picture.axis}. {picture.machine}", color=QUIET)
    figure.supxlabel(notes, x=0.01, ha="left", size=7, color=QUIET)
    if on_lines:
        known: dict[str, Any] = {}
        for axes in all_axes[: len(panels)]:
            handles, labels = axes.get_legend_handles_labels()
            known |= dict(zip(labels, handles, strict=True))
        handles = [known[name] for name in names]
        figure.legend(handles, names, loc="outside right upper", frameon=False)
    return figure


def bars(axes: Any, panel: pd.DataFrame, names: list[str], limit: float) -> None:
    """Horizontal bars, a place for each of `names`."""
    panel = panel.set_index("name")
    for place, name in enumerate(names):
        if name not in panel.index:
            axes.text(0, place, " not measured", size=7, color=QUIET, va="center")
            continue
        bar = panel.loc[name]
        axes.barh(place, bar["value"], height=0.72, color=_colour(name))
        if not pd.isna(bar["low"]):
            whisker = [[bar["value"] - bar["low"]], [bar["high"] - bar["value"]]]
            line = {"ecolor": TEXT, "elinewidth": 0.9, "capsize": 2}
            axes.errorbar(bar["value"], place, xerr=whisker, **line)
        end = np.nanmax([bar["value"], bar["high"]]), place
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # over lines of the grid
        style = {"va": "center", "weight": _weight(name), "bbox": ground}
        axes.annotate(bar["text"], end, (3, 0), textcoords="offset points", **style)
    room = 1 + 0.09 * panel["text"].str.len().max()  # for the text
    axes.set_xlim(0, max(limit, room * np.nanmax(panel[["value", "high"]])))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks(range(len(names)), names)
    for tick, name in zip(axes.get_yticklabels(), names, strict=False):
        tick.set_weight(_weight(name))


def lines(axes: Any, panel: pd.DataFrame, names: list[str], limit: float) -> None:
    """Lines over a logarithmic x axis."""
    for name, points in panel.groupby("name", sort=False):
        below, above = points["value"] - points["low"], points["high"] - points["value"]
        marker = _MARKERS[names.index(name) % len(_MARKERS)]
        style = {"color": _colour(name), "marker": marker, "markersize": 4.5, "capsize": 2}
        axes.errorbar(points["at"], points["value"], yerr=[below, above], label=name, **style)
    axes.set_xscale("log", base=2)
    places = sorted(panel["at"].unique())
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)


def _weight(name: str) -> str:
    return "bold" if name.startswith("fastseg") else "normal"


def _colour(name: str) -> str:
    """Of a provider, with or without its star."""
    provider = PROVIDERS.get(name.removesuffix(" *"))
    return provider.colour if provider else QUIET

"""Draws pictures: panels of horizontal bars, or of lines, with notes below."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .. import shown
from . import style
from .model import Bar, Panel, Picture

# All in inches.
_TOP = 0.56  # the title of the picture and what it measures
_PANEL_TOP = 0.28  # the title of a panel
_PANEL_BOTTOM = 0.36  # its ticks
_BAR = 0.175
_LINES_HEIGHT = 1.7
_NOTE = 0.155
_NOTE_BOTTOM = 0.12
_CHARACTER = 0.071  # a generous mean
_GAP = 0.22
_RIGHT = 0.2
_NOTE_CHARACTERS = 140
_MOST_COLUMNS = 3


def figure_of(picture: Picture) -> Figure:
    """`picture`, drawn."""
    names = _names(picture.panels)
    columns = min(_MOST_COLUMNS, len(picture.panels))
    lines = math.ceil(len(picture.panels) / columns)
    notes = [line for note in picture.notes for line in textwrap.wrap(note, _NOTE_CHARACTERS)]
    on_lines = picture.kind == "lines"
    left = 0.5 if on_lines else 0.15 + _CHARACTER * max(map(len, names))
    gap = 0.5 if on_lines else _GAP
    inner = _LINES_HEIGHT if on_lines else _BAR * (len(names) + 0.4)
    legend = _legend_lines(picture, names) * 0.19
    bottom = _NOTE_BOTTOM + _NOTE * len(notes) + legend
    height = _TOP + lines * (_PANEL_TOP + inner + _PANEL_BOTTOM) + bottom
    figure = Figure(figsize=(style.WIDTH, height))
    FigureCanvasAgg(figure)
    width = (style.WIDTH - left - _RIGHT - gap * (columns - 1)) / columns
    for index, panel in enumerate(picture.panels):
        line, column = divmod(index, columns)
        x = left + column * (width + gap)
        y = height - _TOP - (line + 1) * (_PANEL_TOP + inner) - line * _PANEL_BOTTOM
        axes: Any = figure.add_axes(
            (x / style.WIDTH, y / height, width / style.WIDTH, inner / height)
        )
        axes.set_title(panel.title)
        axes.tick_params(length=0)
        if on_lines:
            _draw_lines(axes, panel, names)
        else:
            _draw_bars(axes, panel, names, width, picture, labels=column == 0)
    figure.text(0.12 / style.WIDTH, 1 - 0.2 / height, picture.title, size=11, va="center")
    said = f"{picture.axis}. {picture.machine}"
    figure.text(0.12 / style.WIDTH, 1 - 0.41 / height, said, color=style.QUIET, va="center")
    for number, note in enumerate(reversed(notes)):
        figure.text(
            0.12 / style.WIDTH,
            (_NOTE_BOTTOM + number * _NOTE) / height,
            note,
            size=7,
            color=style.QUIET,
            va="baseline",
        )
    _draw_legend(figure, picture, names, (_NOTE_BOTTOM + _NOTE * len(notes) + 0.04) / height)
    return figure


def _names(panels: Sequence[Panel]) -> list[str]:
    """Of all bars, in the order of providers; others, as steps, in the order of their coming."""
    names = dict.fromkeys(bar.name for panel in panels for bar in panel.bars)
    known = shown.PROVIDERS

    def rank(name: str) -> int:
        base = name.removesuffix(" *")
        return known.index(base) if base in known else len(known)

    return sorted(names, key=rank)


def _draw_bars(
    axes: Any, panel: Panel, names: Sequence[str], width: float, picture: Picture, labels: bool
) -> None:
    by_name = {bar.name: bar for bar in panel.bars}
    end = picture.limit
    for place, name in enumerate(names):
        bar = by_name.get(name)
        if bar is None:
            axes.text(0, place, " not measured", size=7, color=style.QUIET, va="center")
            continue
        start = 0.0
        for number, part in enumerate(bar.parts):
            colour = style.colour(name, number)
            axes.barh(place, part, left=start, height=0.72, color=colour, linewidth=0)
            start += part
        reach = start if bar.high is None else max(start, bar.high)
        if bar.low is not None and bar.high is not None:
            whisker = [[bar.parts[0] - bar.low], [bar.high - bar.parts[0]]]
            axes.errorbar(
                bar.parts[0], place, xerr=whisker, ecolor=style.TEXT, elinewidth=0.9, capsize=2
            )
        # The text has a white ground, for the lines of the grid behind it.
        axes.annotate(
            bar.text,
            (reach, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            weight="bold" if style.is_ours(name) else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
        room = (0.08 + _CHARACTER * len(bar.text)) / width
        end = max(end, reach / (1 - min(room, 0.7)))
    axes.set_xlim(0, end)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.locator_params(axis="x", nbins=4)
    # A number at the very end would touch the panel beside it.
    last = max(picture.limit, 0.93 * end)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    axes.set_yticks(range(len(names)), names if labels else [""] * len(names))
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_weight("bold" if style.is_ours(name) else "normal")


def _draw_lines(axes: Any, panel: Panel, names: Sequence[str]) -> None:
    places = sorted({bar.at for bar in panel.bars if bar.at is not None})
    for name in names:
        bars = [bar for bar in panel.bars if bar.name == name]
        if not bars:
            continue
        values = [bar.parts[0] for bar in bars]
        axes.errorbar(
            [bar.at for bar in bars],
            values,
            yerr=_errors(bars),
            color=style.colour(name),
            marker=style.marker(name),
            markersize=4.5,
            linewidth=2.0 if style.is_ours(name) else 1.3,
            elinewidth=0.9,
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.tick_params(axis="y", colors=style.QUIET, labelsize=7.5)


def _errors(bars: Sequence[Bar]) -> list[list[float]]:
    """Below and above the points."""
    below = [0.0 if bar.low is None else bar.parts[0] - bar.low for bar in bars]
    above = [0.0 if bar.high is None else bar.high - bar.parts[0] for bar in bars]
    return [below, above]


def _legend_columns(names: Sequence[str]) -> int:
    return max(1, int((style.WIDTH - 0.3) / (0.55 + _CHARACTER * max(map(len, names)))))


def _legend_lines(picture: Picture, names: Sequence[str]) -> int:
    if picture.kind == "lines":
        return math.ceil(len(names) / _legend_columns(names))
    return 1 if picture.parts else 0


def _draw_legend(figure: Figure, picture: Picture, names: Sequence[str], y: float) -> None:
    """Below all panels, where it covers nothing."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any]
    if picture.kind == "lines":
        handles = [
            Line2D([], [], color=style.colour(name), marker=style.marker(name), label=name)
            for name in names
        ]
        columns = _legend_columns(names)
    elif picture.parts:
        handles = [
            Patch(color=style.lighter(style.TEXT) if number else style.TEXT, label=part)
            for number, part in enumerate(picture.parts)
        ]
        columns = len(handles)
    else:
        return
    figure.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, y),
        ncols=columns,
        frameon=False,
        fontsize=style.FONT_SIZE,
        borderaxespad=0,
        borderpad=0.2,
    )

"""What a picture shows, as plain data: what is drawn of it, and kept in its file for checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .. import shown
from ..rows import Row
from ..shown import RowGroup

# More of them nobody sees on a screen.
_DIGITS = 6


@dataclass(frozen=True)
class Bar:
    """One bar, or one point of a line.

    Attributes:
        name: of the provider or of the step.
        parts: lengths from left to right; of most bars there is one.
        low, high: p20 and p80; None without error bars.
        text: beside it.
        at: the place of a point on the x axis; None of bars.
    """

    name: str
    parts: tuple[float, ...]
    low: float | None = None
    high: float | None = None
    text: str = ""
    at: float | None = None


@dataclass(frozen=True)
class Panel:
    """Bars under one title."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Picture:
    """One file.

    Attributes:
        kind: how it is drawn: "bars" or "lines".
        name: of the file, without its ending.
        axis: what the values are, with the unit.
        machine: where they were measured.
        limit: the least end of a value axis that all panels share; 0 where each has its own.
        parts: what the parts of bars are, where there are several.
        notes: the lines below.
    """

    kind: str
    name: str
    title: str
    axis: str
    machine: str
    panels: tuple[Panel, ...]
    notes: tuple[str, ...]
    limit: float = 0.0
    parts: tuple[str, ...] = ()

    def data(self) -> dict[str, Any]:
        """All that is in the picture, as JSON has it, figures rounded to six digits."""
        return _rounded(asdict(self))


@dataclass(frozen=True)
class Skipped:
    """A picture that there is not, and why."""

    name: str
    reason: str


Found = Sequence[Picture | Skipped]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value


def file_name(plot: str, setting: RowGroup, row: Row, batch: bool = True) -> str:
    """Of CPUs only one machine is shown, and its name is in the picture."""
    device = "cpu" if shown.on_cpu(row) else re.sub(r"\W+", "-", setting.device.lower()).strip("-")
    height, width = setting.size
    parts = [plot, device, setting.dtype, f"{height}x{width}"]
    if batch:
        parts.append(f"batch{setting.batch}")
    if setting.cache != "warm":
        parts.append(setting.cache)
    return "-".join(parts)


def lower_precision_note(cases: Sequence[shown.Case]) -> str:
    """A sentence on providers marked with a star; "" where there are none."""
    lower = shown.lower_precision(cases)
    said = ", ".join(f"{name} (error {error:.2g})" for name, error in lower.items())
    return f" * lower precision than asked for: {said}." if said else ""


def marked(name: str, cases: Sequence[shown.Case]) -> str:
    """`name`, with a star where it computes in a lower precision."""
    return f"{name} *" if name in shown.lower_precision(cases) else name

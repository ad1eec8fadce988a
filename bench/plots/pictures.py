"""All pictures of a set of rows."""

from __future__ import annotations

from collections.abc import Sequence

from ..rows import Row
from . import latency, memory, share, throughput, waterfall
from .model import Picture, Skipped

PLOTS = (latency, waterfall, share, memory, throughput)


def all_pictures(rows: Sequence[Row]) -> tuple[list[Picture], list[Skipped]]:
    """What the newest of `rows` give, and what they do not."""
    found = [one for plot in PLOTS for one in plot.pictures(rows)]
    pictures = [one for one in found if isinstance(one, Picture)]
    return pictures, [one for one in found if isinstance(one, Skipped)]

"""How right the embedded model is in each precision, and how far from float64, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ..rows import Row
from . import frames
from .frames import frame_of
from .tables import NO_ROWS, markdown_table, of_rows

# By part, which old rows have not all: the title and the format.
_PARTS = {
    "mIoU": ("mIoU", "{:.2%}"),
    "differing": ("other class", "{:.4%}"),
    "error": ("error of the logits", "{:.1e}"),
    "shortfall": ("shortfall", "{:.1e}"),
}


def numerics(rows: Sequence[Row]) -> str:
    """A line for each dtype and provider; the reference, float64, comes first."""
    frame = frame_of(rows, "numerics")
    if frame.empty:
        return NO_ROWS
    frame = frame.sort_values("dtype", key=lambda dtype: dtype != "float64", kind="stable")
    keys = ["dtype", "provider", "device"]
    order = pd.MultiIndex.from_frame(frame[keys].drop_duplicates())
    figures = frame.pivot(index=keys, columns="part", values="p50").loc[order]
    figures = figures.reindex(columns=[*_PARTS])
    cells = pd.DataFrame(
        {
            title: figures[part].map(text.format, na_action="ignore").fillna("-")
            for part, (title, text) in _PARTS.items()
        }
    )
    cells = cells.reset_index().replace({row.device: "CPU" for row in rows if row.on_cpu})
    height, width = frame["size"].iloc[0]
    text = f"{frames.all_of(frame, 'repeats')} scenes of {height}x{width}. "
    return f"{markdown_table(cells, left=3)}\n\n{text}{of_rows(frame)}"

"""Forwards by PyTorch and by OpenVINO on the same folded weights, by threads, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from ..rows import Row
from . import frames
from .frames import frame_of, geometric_mean, number, times
from .tables import NO_ROWS, markdown_table

_SETTING = ((512, 512), 1)
_OURS = "fastseg eager"
# By dtype; of OpenVINO's default, bfloat16 where that is quicker, rows say float32.
_THEIRS = {"float32": "fastseg OpenVINO fp32", "bfloat16": "fastseg OpenVINO default"}


def by_threads(rows: Sequence[Row]) -> str:
    """Two lines for each number of threads and dtype, a column a variant."""
    rows = [row for row in rows if row.on_cpu and (row.size, row.batch) == _SETTING]
    last = max(((row.date, row.cpu) for row in rows), default=("", ""))
    rows = [row for row in rows if row.cpu == last[1]]
    lines, shown = [], []
    for threads in sorted({row.threads for row in rows}):
        frame = frame_of([row for row in rows if row.threads == threads], "forward")
        if frame.empty:
            continue
        frame = frame.assign(dtype=frame["dtype"].where(~frame["lower"], "bfloat16"))
        for dtype, provider in _THEIRS.items():
            part = frame[(frame["dtype"] == dtype) & frame["provider"].isin((_OURS, provider))]
            medians = part.pivot(index="provider", columns="case", values="p50")
            if len(medians) < 2:
                continue
            shown.append(part)
            share = geometric_mean(medians.loc[_OURS] / medians.loc[provider])
            for name, said in ((_OURS, "fastseg"), (provider, "fastseg in OpenVINO")):
                cells = {case.upper(): number(value) for case, value in medians.loc[name].items()}
                mean = times(share if name == _OURS else 1)
                lines.append({"threads": threads, "dtype": dtype, "": said, **cells, "mean": mean})
    if not lines:
        return NO_ROWS
    found = pd.concat(shown)
    text = (
        "Medians in ms from `pixel_values` to logits, 512x512, batch 1, and the geometric mean of "
    )
    text += (
        "the time beside that in OpenVINO. Parity was checked first, and providers of a case ran "
    )
    text += (
        f"in turn in one process. {frames.all_of(found, 'device')}; {frames.versions_of(found)}; "
    )
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(found["command"]))
    return f"{markdown_table(pd.DataFrame(lines), left=3)}\n\n{text}by {commands}."

"""What an engine of many machines costs, and what follows for a hundred million pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from ..options import ACTOR, DRIVER, ENGINE, LOOP, RAY_ACTORS
from ..rows import Row
from .frames import frame_of, number
from .tables import NO_ROWS, markdown_table, of_rows

PICTURES, GPUS = 100_000_000, 100
_BLOCK = 256  # pictures of a receipt
_IN_FLIGHT = 3  # blocks of an actor: two that it has, and one on its way back
_ROUND = 1_000_000


def engines(rows: Sequence[Row]) -> str:
    """A line a provider: time, processor time, start and memory; then the reckoning on paper."""
    frame = frame_of(rows, "engine")
    if frame.empty:
        return NO_ROWS
    columns = {
        "ms a picture": _by_provider(rows, "engine"),
        "processor ms": _by_provider(rows, "engine processor"),
        "start, s": _by_provider(rows, "engine start"),
    }
    memory = _by_provider(rows, "engine memory")
    for kind in (DRIVER, ACTOR, ENGINE):
        ending = f": {kind}"
        columns[f"{kind}, MB"] = {
            name.removesuffix(ending): value
            for name, value in memory.items()
            if name.endswith(ending)
        }
    lines = [
        {"": name} | {title: _text(values.get(name)) for title, values in columns.items()}
        for name in frame["provider"]
    ]
    text = (
        "Label maps alone of photographs of 2.4 megapixels, each model on one thread of one "
        "machine, providers in turn: what one more picture takes, in all processes; what a run "
        "takes before its first picture; the highest resident sets, of Ray's own processes "
        "together. Label maps are equal in every byte. "
    )
    reckoned = "\n".join(f"- {line}" for line in _reckoned(rows))
    title = f"For {PICTURES:,} pictures and {GPUS} GPUs follows from these figures, on paper:"
    return (
        f"{markdown_table(pd.DataFrame(lines))}\n\n{text}{of_rows(frame)}\n\n{title}\n\n{reckoned}"
    )


def _reckoned(rows: Sequence[Row]) -> Iterator[str]:
    processor = _by_provider(rows, "engine processor")
    size = _by_provider(rows, "engine bytes")
    driver = _by_provider(rows, "engine driver")
    memory = _by_provider(rows, "engine driver memory")
    one = next(iter(RAY_ACTORS))
    more = processor[one] - processor[LOOP]
    hours = max(more, 0) * PICTURES / 3.6e6
    yield (
        f"Ray's own work is {more:.1f} ms of a processor a picture, the difference of two lines of "
        f"the table: {hours:,.0f} core hours in all, beside those of decoding and writing, which "
        "are there without it."
    )
    found, read = driver["1,000 found and named"], driver["receipts of 1,000 read"]
    yield (
        f"To find and name them takes the driver {_hours(found)} h on a local disk, in rounds of "
        f"{_ROUND:,}: {found * _ROUND / 6e7:.1f} minutes before each, in which actors wait."
    )
    round_memory = memory["a picture of a round"] * _ROUND / 1e9
    done = memory["a picture that is done"] * PICTURES / 1e9
    yield (
        f"The driver holds {round_memory:.1f} GB for a round. With --resume it holds the paths of "
        f"all that is done, up to {done:.0f} GB, after reading receipts for {_hours(read)} h."
    )
    parts = PICTURES // _BLOCK
    yield (
        f"Receipts are {size['a row'] * PICTURES / 1e9:.0f} GB in {parts:,} files; with label maps "
        f"in them {size['a row with labels as zlib'] * PICTURES / 1e12:.1f} TB (zlib) or "
        f"{size['a row with labels as rle'] * PICTURES / 1e12:.1f} TB (rle), for such pictures, "
        f"where PNGs would be {PICTURES:,} files."
    )
    flight = GPUS * _IN_FLIGHT * _BLOCK * memory["a picture in the object store"]
    waiting = _ROUND * memory["a picture in the object store"]
    yield (
        f"The object store holds paths and rows: {waiting / 1e6:.0f} MB for a round that waits in "
        f"the driver's node, {flight / 1e6:.0f} MB on their way; no pixel is in it."
    )
    yield (
        "So the driver breaks first, in time and memory and when a run goes on: beyond some ten "
        "millions give each run a part, by --shard or by folders. Next is the file system, by the "
        "number of its files: --labels zlib or rle."
    )


def _hours(milliseconds: float) -> str:
    """Of all pictures, from the milliseconds of a thousand."""
    return f"{milliseconds * PICTURES / 1000 / 3.6e6:.1f}"


def _by_provider(rows: Sequence[Row], kind: str) -> dict[str, float]:
    frame = frame_of(rows, kind)
    return dict(zip(frame["provider"], frame["p50"], strict=True))


def _text(value: float | None) -> str:
    return "" if value is None else number(value)

"""Tables of Hugging Face `datasets`: Arrow files as `save_to_disk` writes them, and parquet.

pyarrow reads them, with nothing of `datasets`. A row has a picture and a mask, as files in bytes.
"""

from __future__ import annotations

import bisect
import functools
import io
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .splits import choose_split, listed

INSTALL_PYARROW = 'pip install "fastseg-segformer[datasets]"'

# What the columns are called in data sets of the hub.
_IMAGE = ("image", "pixel_values", "img", "picture")
_LABEL = ("label", "annotation", "mask", "labels", "segmentation_mask", "segmentation_map")


class Rows(NamedTuple):
    """What `LabelledPictures` is made of."""

    kind: str
    names: Sequence[tuple[str, str]]
    sources: Callable[[int], tuple[io.BytesIO | Path, io.BytesIO | Path]]


class _Part(NamedTuple):
    """Some rows of a file, a pyarrow.Table, which is read when it is asked for."""

    file: Path
    rows: int
    table: Callable[[], Any]


def find_tables(
    root: Path, split: str | None, image_column: str | None, label_column: str | None
) -> Rows | None:
    """The rows of the tables in a folder, or of one file; None where there are none.

    Raises:
        FileNotFoundError: there is no such split.
        ImportError: pyarrow is not installed.
        ValueError: there are no such columns.
    """
    files = _files(root, split)
    if not files:
        return None
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{root}: reading {files[0].name} needs pyarrow: {INSTALL_PYARROW}"
        ) from error
    parts = [part for file in files for part in _parts(file)]
    ends = list(itertools.accumulate(part.rows for part in parts))
    columns = parts[0].table().column_names if parts else []
    image = _column("image_column", image_column, _IMAGE, columns, root)
    label = _column("label_column", label_column, _LABEL, columns, root)
    names = []
    for file, of_file in itertools.groupby(parts, key=lambda part: part.file):
        for row in range(sum(part.rows for part in of_file)):
            name = f"{file}, row {row}"
            names.append((f"{name}, {image}", f"{name}, {label}"))

    def sources(index: int) -> tuple[io.BytesIO | Path, io.BytesIO | Path]:
        number = bisect.bisect_right(ends, index)
        part = parts[number]
        row = part.table().slice(index - ends[number] + part.rows, 1).to_pylist()[0]
        folder = part.file.parent
        return (
            _source(row[image], folder, names[index][0]),
            _source(row[label], folder, names[index][1]),
        )

    kind = "Hugging Face datasets" if root.is_dir() else "a table"
    return Rows(f"{kind} ({files[0].suffix[1:]})", names, sources)


def _files(root: Path, split: str | None) -> list[Path]:
    """The files of a split, in order."""
    if root.is_file():
        return [root] if root.suffix in (".parquet", ".arrow") else []
    if (root / "dataset_dict.json").is_file():
        splits = json.loads((root / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        root = root / choose_split(root, dict(zip(splits, splits, strict=True)), split)
    if (root / "state.json").is_file():
        state = json.loads((root / "state.json").read_text(encoding="utf-8"))
        return [root / file["filename"] for file in state["_data_files"]]
    by_split: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("*.parquet"), *root.glob("*/*.parquet")]):
        # validation-00000-of-00002.parquet, or validation/0000.parquet
        name = path.stem.split("-")[0]
        name = path.parent.name if name.isdecimal() and path.parent != root else name
        by_split.setdefault(name, []).append(path)
    return choose_split(root, by_split, split) if by_split else []


def _parts(file: Path) -> list[_Part]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        parquet = pyarrow.parquet.ParquetFile(file)
        lock = threading.Lock()

        @functools.lru_cache(maxsize=2)  # threads that read ahead may be in the next one
        def read(group: int) -> Any:
            return parquet.read_row_group(group)

        def table(group: int) -> Any:
            with lock:
                return read(group)

        groups = range(parquet.num_row_groups)
        sizes = [parquet.metadata.row_group(group).num_rows for group in groups]
        return [
            _Part(file, rows, functools.partial(table, group))
            for group, rows in zip(groups, sizes, strict=True)
        ]
    import pyarrow

    mapped = pyarrow.memory_map(str(file))  # nothing is read until a row is asked for
    whole = pyarrow.ipc.open_stream(mapped).read_all()
    return [_Part(file, whole.num_rows, lambda: whole)]


def _column(
    argument: str, name: str | None, usual: Sequence[str], there: Sequence[str], root: Path
) -> str:
    found = [one for one in ([name] if name else usual) if one in there]
    if not found:
        option = f"--{argument.replace('_', '-')}"
        raise ValueError(
            f"{argument}: {root} has no column {name or ' or '.join(map(repr, usual))}; "
            f"it has {listed(there)}: name one by {option}"
        )
    return found[0]


def _source(value: Any, folder: Path, name: str) -> io.BytesIO | Path:
    """The file in a row: bytes, or `datasets`' {"bytes", "path"}, of which one may be None."""
    content, path = value, None
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
    if isinstance(content, bytes):
        return io.BytesIO(content)
    if path:
        return folder / path
    raise ValueError(f"{name}: expected a picture as a file in bytes, got {type(content).__name__}")

"""Rows of `Segmenter`: what comes in of any kind of batch, and what goes out, with types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

COLUMNS = ("path", "width", "height", "classes", "pixels", "labels", "file", "error")
_COLUMNS_IN = ("path", "bytes", "file")


class RowIn(NamedTuple):
    """A picture to segment: its path or URL, its bytes where they are known, its label file."""

    path: str | None
    content: bytes | None
    file: str | None


def rows_of(batch: Any) -> list[RowIn]:
    """The rows of a batch: a mapping of columns, a pandas DataFrame or an Arrow table.

    Raises:
        KeyError: there is no column `path`.
    """
    names = set(batch.column_names if hasattr(batch, "column_names") else batch.keys())
    if "path" not in names:
        raise KeyError(f"path: expected a column of that name, got {sorted(map(str, names))}")
    columns = {name: _values(batch[name]) for name in _COLUMNS_IN if name in names}
    nothing = [None] * len(columns["path"])
    given = (columns.get(name, nothing) for name in _COLUMNS_IN)
    return [
        RowIn(
            None if path is None else str(path),
            None if content is None else bytes(content),
            None if file is None else str(file),
        )
        for path, content, file in zip(*given, strict=True)
    ]


def _values(column: Any) -> list[Any]:
    values = column.to_pylist() if hasattr(column, "to_pylist") else list(column)
    # Where pandas has nothing it has nan, or NA.
    return [
        None if isinstance(value, float) or type(value).__name__ == "NAType" else value
        for value in values
    ]


def schema() -> Any:
    """The Arrow schema of `Segmenter.schema`."""
    pa = import_pyarrow()
    kinds = {"path": pa.string(), "width": pa.int32(), "height": pa.int32()}
    kinds |= {"classes": pa.list_(pa.int32()), "pixels": pa.list_(pa.int64())}
    kinds |= {"labels": pa.binary(), "file": pa.string(), "error": pa.string()}
    return pa.schema(kinds)


def table_of(rows: Iterable[Mapping[str, Any]]) -> Any:
    """An Arrow table of rows, in `schema`.

    Bytes of paths that are no UTF-8, which Arrow's strings cannot hold, become U+FFFD.
    """
    told = [{name: _utf_8(value) for name, value in row.items()} for row in rows]
    return import_pyarrow().Table.from_pylist(told, schema=schema())


def _utf_8(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return value


def rows_like(batch: Any, rows: Sequence[Mapping[str, Any]], arrow: bool) -> Any:
    """Rows in the kind of table that `batch` is; for a mapping with `arrow` an Arrow table."""
    if hasattr(batch, "iloc"):  # of pandas, whose integers know no null
        return table_of(rows).to_pandas(integer_object_nulls=True)
    if arrow or hasattr(batch, "schema"):
        return table_of(rows)
    return {name: [row[name] for row in rows] for name in COLUMNS}


def import_pyarrow() -> Any:
    """pyarrow.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        import pyarrow
    except ImportError:
        raise ImportError(
            'rows in Arrow tables need pyarrow: pip install "fastseg-segformer[datasets]"'
        ) from None
    return pyarrow

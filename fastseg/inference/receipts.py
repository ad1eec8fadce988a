"""Receipts: parquet files that say what became of every picture, for runs on many machines.

A batch of pictures has a file, named by a hash of their paths: whoever does a batch again, as after
the death of a machine, replaces what it has written, and no picture has two rows.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Collection
from typing import Any

from fastseg.images.reasons import first_line
from fastseg.images.storage import Item, Storage

from .rows import import_pyarrow

ENDING = ".parquet"
_BROKEN = "_{}.broken"  # readers of a folder of parquet pass by what begins with a line


class Receipts:
    """The receipts in a folder, or behind a URL that pyarrow reaches.

    Raises:
        ImportError: pyarrow is not installed.
    """

    def __init__(self, where: str) -> None:
        import_pyarrow()
        self.storage = Storage(where)

    def write(self, table: Any) -> None:
        """Write the rows of a batch, a table with a column `path`, in place of earlier ones.

        Raises:
            OSError: they cannot be written.
        """
        paths = "\n".join(str(path) for path in table["path"].to_pylist())
        name = hashlib.sha256(paths.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._write(name + ENDING, table)

    def settle(self, tell: Callable[[str], object]) -> set[str]:
        """The paths that have a row without an error, after which no path has more than one row.

        A row with an error goes where the picture has one without, and the older of two. Files
        that are no whole parquet, as of a machine that lost its disk, are set aside.

        Args:
            tell: called with a message on each of these.

        Raises:
            OSError: receipts cannot be read or written.
        """
        done: dict[str, str] = {}  # the file of each path
        failed: dict[str, str] = {}
        superseded: dict[str, set[str]] = {}  # paths by the file
        for item in sorted(self.storage.files(ENDING), key=_age):
            for path, error in self._read(item.name, tell):
                before = done.get(path) or failed.get(path)
                if before == item.name and path in done:
                    continue
                if before is not None and before != item.name:
                    if path in done and error is not None:
                        superseded.setdefault(item.name, set()).add(path)
                        continue
                    superseded.setdefault(before, set()).add(path)
                    done.pop(path, None)
                    failed.pop(path, None)
                (done if error is None else failed)[path] = item.name
        for name, paths in superseded.items():
            self._leave_out(name, paths)
        return set(done)

    def are_there(self) -> bool:
        """Return whether there are any."""
        return next(self.storage.files(ENDING), None) is not None

    def _read(self, name: str, tell: Callable[[str], object]) -> list[tuple[str, str | None]]:
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            with self.storage.open(name) as file:
                table = parquet.read_table(file, columns=["path", "error"])
            return list(zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True))
        except FileNotFoundError:  # replaced just now
            return []
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            # What is no parquet can be read as bytes; else it is the storage that fails.
            with self.storage.open(name) as file:
                content = file.read()
            aside = _BROKEN.format(name)
            self.storage.write(aside, content)
            self.storage.remove(name)
            tell(
                f"{self.storage.place(name)}: no whole parquet file ({first_line(error)}); "
                f"its pictures count as not done, and it is called {aside} now"
            )
            return []

    def _leave_out(self, name: str, paths: Collection[str]) -> None:
        import pyarrow
        import pyarrow.parquet as parquet

        with self.storage.open(name) as file:
            table = parquet.read_table(file)
        stays = [path not in paths for path in table["path"].to_pylist()]
        if any(stays):
            self._write(name, table.filter(pyarrow.array(stays)))
        else:
            self.storage.remove(name)

    def _write(self, name: str, table: Any) -> None:
        import pyarrow.parquet as parquet

        content = io.BytesIO()
        parquet.write_table(table, content, compression="zstd")
        self.storage.write(name, content.getvalue())


def _age(item: Item) -> tuple[float, str]:
    return item.written, item.name

"""`Segmenter`: the label maps of batches of rows, for any engine that hands rows to a callable."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, SupportsInt

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastseg.images.inputs import CHANNELS_LAST
from fastseg.images.marked import mark_of
from fastseg.images.overlay import MAX_INDEXED
from fastseg.images.packed import FORMS, GREY, PNG, pack, unpack
from fastseg.images.pages import count_pixels, read_pages
from fastseg.images.palettes import config_palette, palette
from fastseg.images.reasons import first_line
from fastseg.images.storage import Storage, is_url, open_place
from fastseg.images.types import ImageProcessor
from fastseg.models.auto import from_pretrained
from fastseg.models.seggpt.prompts import SegGptPrompt, is_seggpt

from .pipeline import MODEL, Outcome, Pipeline, Place
from .prompted import PromptedSteps, keep_prompts
from .receipts import Receipts
from .rows import COLUMNS, RowIn, import_pyarrow, rows_like, rows_of, schema, table_of
from .scores import Wanted
from .segment import saved_processor
from .steps import Steps
from .workers import worker_count

if TYPE_CHECKING:
    import pyarrow

LABELS_ENDING = "_labels.png"

_LONGEST_ERROR = 300


class Segmenter:
    """Segments batches of rows, one row out for one row in: made in a worker, called there.

    An engine hands it batches with a column `path`: of files, or of URLs that pyarrow reaches; or
    of names, where a column `bytes` has the files. It reads the pictures, upright, several at once,
    segments those of one shape together, and gives a row for each in the same order: `path`,
    `width`, `height`, `classes` (the numbers in it), `pixels` (how many of each), and either
    `labels`, the label map as bytes, or `file`, the PNG that was written; else `error`, a line with
    the reason. A picture that cannot be read, that is too large for the memory, or whose label map
    cannot be written is such a row. All columns have types: `Segmenter.schema()`.

    What comes out is of the kind that went in: a dictionary of lists, a pandas DataFrame or an
    Arrow table. It is not pickled: engines take the class and its arguments.

    Args:
        model: a folder, a file or a hub id, as `fastseg.from_pretrained` takes it; or a model.
        processor: prepares the pictures; None takes the one saved beside the checkpoint.
        output: a folder, or a URL that pyarrow reaches, to write label maps to as PNG. None keeps
            them in the rows.
        root: the folder, or the URL, that pictures lie below, for the names of these PNGs:
            `root/x/a.jpg` becomes `output/x/a.jpg_labels.png`. Not needed where a column `file` has
            their names below `output`.
        labels: "png", indexed with the classes' colours; "grey", a PNG of the same numbers; in rows
            also "zlib" and "rle". `Segmenter.label_map` reads all of them.
        receipts: a folder, or a URL, that each batch's rows are written to before they are
            returned, as one parquet file, in place of that of an earlier attempt at the batch. The
            rows that are returned have no `labels` then.
        batch_size: pictures, or windows of one, in one forward.
        device: None is a CUDA GPU where there is one, else the CPU.
        dtype: of the model: torch's, its name, or "fast"; None as `from_pretrained` chooses.
        slide, tta, threshold: as of `fastseg.segment`.
        prompts: of a SegGPT: pairs (picture, mask), each a path or as `fastseg.keep_prompt` takes
            it; or, beside a model, what that made of them.
        threads: how many pictures are read and written at once.
        arrow: give an Arrow table for a dictionary too, as Ray Data needs it: in a batch without
            errors a list of None would have no type.

    Raises:
        FileNotFoundError, ImportError: as `from_pretrained`; or pyarrow is missing, for URLs,
            `receipts` and `arrow`.
        TypeError, ValueError: an argument is wrong, or the model does not segment.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        processor: ImageProcessor | None = None,
        output: str | os.PathLike[str] | None = None,
        root: str | os.PathLike[str] | None = None,
        labels: str = PNG,
        receipts: str | os.PathLike[str] | None = None,
        batch_size: int = 8,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        slide: Sequence[int | Sequence[int]] | None = None,
        tta: Sequence[str | float] | None = None,
        threshold: float | None = None,
        prompts: Sequence[object] | None = None,
        threads: int = 4,
        arrow: bool = False,
    ) -> None:
        if labels not in FORMS:
            raise ValueError(f"labels: expected one of {', '.join(FORMS)}, got {labels!r}")
        if output is not None and labels not in (PNG, GREY):
            raise ValueError(f"labels: expected png or grey with an output, got {labels!r}")
        for name, value in (("batch_size", batch_size), ("threads", threads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        self._form, self._batch_size, self._threads = labels, batch_size, threads
        self._output = None if output is None else Storage(output)
        self._root = None if root is None else os.fspath(root)
        self._receipts = None if receipts is None else Receipts(os.fspath(receipts))
        self._arrow = arrow
        if arrow:
            import_pyarrow()
        self._model = _loaded(model, device, dtype)
        if processor is None:
            processor = saved_processor(self._model)
        config = getattr(self._model, "config", None)
        self._reading: dict[str, Any] = {
            "channels": getattr(config, "num_channels", None),
            "raw": not processor.do_rescale,
        }
        options: dict[str, Any] = {"slide": slide, "tta": tta, "threshold": threshold}
        self._steps: Steps | PromptedSteps
        if prompts is not None:
            given = [name for name, value in options.items() if value is not None]
            if given:
                raise ValueError(f"{given[0]}: expected None with prompts")
            kept = keep_prompts(self._model, [_prompt(one) for one in prompts], processor)
            self._colours = palette((kept[0].num_labels or 0) + 1)
            options = {"processor": processor, "prompts": kept, "dtype": self._label_dtype}
            self._steps = PromptedSteps(self._model, **options)
            return
        if is_seggpt(self._model):
            raise ValueError("prompts: expected [(picture, mask), ...] for a SegGPT, got None")
        self._colours = _colours(config)
        wanted = Wanted.of(self._model, False, torch.uint8, threshold, self._label_dtype)
        del options["threshold"]
        options |= {"batch_size": batch_size, "input_data_format": CHANNELS_LAST}
        self._steps = Steps(self._model, processor, wanted, **options)

    @property
    def _label_dtype(self) -> torch.dtype:
        return torch.uint8 if len(self._colours) <= MAX_INDEXED else torch.int64

    @staticmethod
    def schema() -> pyarrow.Schema:
        """The Arrow schema of the rows.

        `path` string; `width`, `height` int32; `classes` list of int32; `pixels` list of int64;
        `labels` binary; `file`, `error` string. All but `path` may be null.

        Raises:
            ImportError: pyarrow is not installed.
        """
        return schema()

    @staticmethod
    def label_map(row: Mapping[str, object]) -> np.ndarray:
        """The label map (H, W), uint8 or uint16, in a row with `labels`, in whichever form.

        Raises:
            ValueError: the row has none.
        """
        content, height, width = (row.get(name) for name in ("labels", "height", "width"))
        if not isinstance(content, bytes) or not isinstance(height, SupportsInt):
            raise ValueError(f"row: expected one with labels, got one of {row.get('path')!r}")
        assert isinstance(width, SupportsInt)
        return unpack(content, int(height), int(width))

    def __call__(self, batch: Any) -> Any:
        """The rows of a batch, a mapping of columns, a pandas DataFrame or an Arrow table.

        Raises:
            KeyError: there is no column `path`.
            ValueError: with `output`, there is neither a column `file` nor `root`.
            RuntimeError: the device has failed, and computes nothing more.
        """
        rows = list(self._rows(rows_of(batch)))
        if self._receipts is not None:
            try:
                self._receipts.write(table_of(rows))
            except OSError as error:
                # No receipt, so the next run does them again; whoever watches this one is told.
                reason = _short(f"cannot write to {self._receipts.storage}: {first_line(error)}")
                rows = [{**row, "error": row["error"] or reason} for row in rows]
            rows = [{**row, "labels": None} for row in rows]
        return rows_like(batch, rows, self._arrow)

    def __reduce__(self) -> Any:
        raise TypeError(
            "Segmenter: make it in the worker, which loads the weights there; give engines the "
            "class and its arguments"
        )

    def _rows(self, items: Sequence[RowIn]) -> Iterator[dict[str, Any]]:
        if self._output is not None and self._root is None and any(i.file is None for i in items):
            raise ValueError("root: expected a folder with output, or rows with a column file")
        can_spread = not isinstance(self._steps, PromptedSteps)
        pipeline = Pipeline(
            *(self._read, self._label, self._write),
            kind=lambda given: getattr(given, "kind", None),
            workers=self._threads,
            batch_size=self._batch_size,
            model_threads=worker_count(self._model, len(items)) if can_spread else 1,
        )
        with pipeline:
            for outcome in pipeline.run(items):
                yield self._row(outcome)

    def _row(self, outcome: Outcome) -> dict[str, Any]:
        row = {**dict.fromkeys(COLUMNS), "path": outcome.item.path}
        error = outcome.error
        if error is None:
            return row | outcome.result
        if outcome.stage == MODEL and not _works(self._model):
            raise error
        return row | {"error": _short(first_line(error))}

    def _read(self, item: RowIn, place: Place) -> Any:
        if item.path is None:
            raise ValueError("path: expected a string, got None")
        with place(0):  # a URL takes its time
            if item.content is not None:
                file: Any = io.BytesIO(item.content)
            else:
                file = open_place(item.path)
        channels = self._reading["channels"]
        with place(count_pixels(file, channels, item.path)):
            page = next(read_pages(file, name=item.path, **self._reading))
            if page.image is None:
                raise ValueError(page.reason)
            return self._steps.prepare(page.image, "the picture")

    def _label(self, given: list[Any]) -> list[np.ndarray]:
        return [labels.cpu().numpy() for labels, _ in self._steps.label_maps(given)]

    def _write(self, item: RowIn, given: Any, labels: np.ndarray) -> dict[str, Any]:
        counts = _counts(labels)
        classes = np.flatnonzero(counts)
        row: dict[str, Any] = {"width": labels.shape[1], "height": labels.shape[0]}
        row |= {"classes": classes.tolist(), "pixels": counts[classes].tolist()}
        path = item.path or ""
        mark = mark_of(path if is_url(path) else os.path.abspath(path))
        content = pack(labels, self._form, self._colours, mark)
        if self._output is None:
            return row | {"labels": content}
        name = item.file or f"{_below(path, self._root)}{LABELS_ENDING}"
        try:
            self._output.write(name, content)
        except OSError as error:
            folder = self._output.place(name).rpartition("/")[0]
            raise OSError(f"cannot write to {folder}: {first_line(error)}") from error
        return row | {"file": name}


def _loaded(model: Any, device: str | torch.device | None, dtype: torch.dtype | str | None) -> Any:
    """A model in eval mode that segments, on its device."""
    if not isinstance(model, str | os.PathLike):
        if dtype is not None or device is not None:
            raise ValueError("device, dtype: expected None with a model, which has its own")
        return model
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    named = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    found = from_pretrained(model, device=device, dtype=named)
    if not found.segments and not is_seggpt(found):
        kind = type(found).__name__
        raise ValueError(f"model: expected one that segments, got a {kind} in {model}")
    if found.load_report.reinitialized:
        raise ValueError(f"model: weights are missing in {model}\n{found.load_report}")
    return found


def _colours(config: Any) -> np.ndarray:
    """Of the classes, with the background before a single one."""
    if not hasattr(config, "num_labels"):
        return palette(MAX_INDEXED)
    colours = config_palette(config)
    if config.num_labels == 1:
        return np.vstack([np.zeros((1, 3), dtype=np.uint8), colours])
    return colours


def _prompt(one: Any) -> Any:
    """A prompt whose files have been read."""
    if isinstance(one, SegGptPrompt) or not isinstance(one, Sequence) or len(one) != 2:
        return one
    image, mask = one
    if isinstance(image, str | Path):
        page = next(read_pages(Path(image), channels=3))
        if page.image is None:
            raise ValueError(f"prompts: {image}: {page.reason}")
        image = page.image
    if isinstance(mask, str | Path):
        with Image.open(mask) as file:
            file.load()
            mask = file
    return image, mask


def _counts(labels: np.ndarray) -> np.ndarray:
    """Pixels of each class, by its number."""
    if labels.dtype == np.uint8:  # PIL counts bytes four times as fast
        return np.array(Image.fromarray(labels).histogram())
    return np.bincount(labels.ravel())


def _below(path: str, root: str | None) -> str:
    """Where a picture lies below `root`, with slashes.

    Raises:
        ValueError: it does not.
    """
    assert root is not None
    base = root.partition("?")[0].rstrip("/") if is_url(root) else os.path.abspath(root)
    full = path.partition("?")[0] if is_url(path) else os.path.abspath(path)
    if is_url(path) == is_url(root) and full.startswith(base.rstrip(os.sep) + os.sep):
        return PurePosixPath(full[len(base.rstrip(os.sep)) + 1 :].replace(os.sep, "/")).as_posix()
    raise ValueError(f"path: expected one below root, {root}, got {path}")


def _works(model: Any) -> bool:
    """Return whether a model's device still computes, after an error: then it was of a picture.

    A GPU that has failed, as by a wrong address, fails at everything until its process ends.
    """
    device = next(model.parameters()).device
    try:
        return device.type == "cpu" or torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def _short(reason: str) -> str:
    return reason if len(reason) <= _LONGEST_ERROR else reason[: _LONGEST_ERROR - 3] + "..."

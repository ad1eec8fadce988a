"""Pictures with their label maps: `open_dataset` finds how a folder holds them."""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from .layouts import Pairs, find_pairs
from .masks import numbering, read_mask, read_picture
from .tables import find_tables

Source = Path | io.BytesIO
_THREADS = 4  # that read ahead: they decode while a model runs


class LabelledPictures:
    """A sequence of (picture, labels): a PIL image, upright, and integers (H, W) as stored.

    Iterating reads ahead in threads; a few pictures are alive at a time.

    Args:
        kind: how they are stored, for people.
        names: of each picture and of its label map, for messages.
        sources: from a number to the files of both.
        classes: names of the classes by number, where they are known.
        reduce_labels: whether 0 is no class and 1 the first one; None where nothing says.
        numbers: put in the place of the numbers in masks, as `numbering` gives them.
        remarks: what users should know.
    """

    def __init__(
        self,
        kind: str,
        names: Sequence[tuple[str, str]],
        sources: Callable[[int], tuple[Source, Source]],
        *,
        classes: Sequence[str] | None = None,
        reduce_labels: bool | None = None,
        numbers: np.ndarray | None = None,
        remarks: Sequence[str] = (),
    ) -> None:
        self.kind, self.names, self.classes = kind, names, classes
        self.reduce_labels, self.remarks = reduce_labels, remarks
        self._sources, self._numbers = sources, numbers

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        image, mask = self.names[index]
        of_image, of_mask = self._sources(range(len(self))[index])
        return read_picture(of_image, image), read_mask(of_mask, mask, self._numbers)

    def __iter__(self) -> Iterator[tuple[Image.Image, np.ndarray]]:
        with ThreadPoolExecutor(_THREADS) as threads:
            pending = deque(
                threads.submit(self.__getitem__, i) for i in range(len(self))[:_THREADS]
            )
            try:
                for index in itertools.count(_THREADS):
                    if not pending:
                        return
                    found = pending.popleft().result()
                    if index < len(self):
                        pending.append(threads.submit(self.__getitem__, index))
                    yield found
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def first(self, count: int) -> LabelledPictures:
        """The first `count` of them."""
        return self.some(range(len(self))[:count])

    def some(self, indices: range) -> LabelledPictures:
        """Those with these numbers, as of a shard, in the order of the numbers."""
        return LabelledPictures(
            self.kind,
            [self.names[index] for index in indices],
            lambda index: self._sources(indices[index]),
            classes=self.classes,
            reduce_labels=self.reduce_labels,
            numbers=self._numbers,
            remarks=self.remarks,
        )


def open_dataset(
    root: str | Path,
    split: str | None = None,
    *,
    split_file: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    numbers: str | None = None,
) -> LabelledPictures:
    """Find pictures and their label maps, by what is in the folder `root`.

    - Cityscapes: leftImg8bit/ and gtFine/, with labelTrainIds or else labelIds.
    - ADE20K: images/ and annotations/ with its file names, where 0 is no class.
    - Pascal VOC: JPEGImages/, SegmentationClass/ and lists in ImageSets/Segmentation/.
    - A data set of Hugging Face `datasets`, as `save_to_disk` or the hub stores it (needs pyarrow).
    - images/ and masks/ (or annotations/, labels/, img_dir/ and ann_dir/), perhaps with a folder
      for each split below, and perhaps classes.txt, a name a line from class 0.

    Args:
        split: such as "train"; None takes the validation split, of folders without splits all.
        split_file: a list of the pictures to take, one a line: a name, with or without its folder
            and suffix; or a picture and its mask, both below `root`.
        image_column, label_column: of a table; None finds them by their names.
        numbers: "labelIds" for masks of Cityscapes' own ids, "binary" for masks of 0 and 255.

    Raises:
        FileNotFoundError: nothing of this kind is there, or a picture has no mask.
        ImportError: pyarrow is needed, and is not installed.
        ValueError: an argument is wrong.
    """
    root = Path(root)
    table = numbering(numbers)
    if split_file is None:
        rows = find_tables(root, split, image_column, label_column)
        if rows is not None:
            return LabelledPictures(rows.kind, rows.names, rows.sources, numbers=table)
    if image_column or label_column:
        raise ValueError(f"image_column, label_column: {root} holds no table")
    pairs: Pairs = find_pairs(root, split, None if split_file is None else Path(split_file))
    if table is None:
        table = numbering(pairs.numbers)
    found = pairs.paths
    return LabelledPictures(
        pairs.kind,
        [(str(image), str(mask)) for image, mask in found],
        found.__getitem__,
        classes=pairs.classes,
        reduce_labels=pairs.reduce_labels,
        numbers=table,
        remarks=pairs.remarks,
    )

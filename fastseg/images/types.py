"""Types of what users hand over and of what is written for other programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from PIL import Image

ImageInput = Image.Image | np.ndarray | torch.Tensor
# One, a batch, or lists. No deeper: a type that names itself would take a str for nested lists.
ImageInputs = ImageInput | Sequence[ImageInput | Sequence[ImageInput]]
Pair = Sequence[ImageInput]  # (image, label map); a tuple of two different types is one too
ChannelValues = float | Sequence[float] | np.ndarray  # one for all channels, or one for each
TargetSizes = Sequence[Sequence[int]] | torch.Tensor | np.ndarray  # (height, width) of each image


class PairsByNumber(Protocol):
    """Pairs as a Dataset of torch has them."""

    def __getitem__(self, index: int, /) -> Pair: ...

    def __len__(self) -> int: ...


Pairs = Iterable[Pair] | PairsByNumber


class ImageProcessor(Protocol):
    """An image processor of fastseg or of transformers, as far as `segment` looks at it."""

    @property
    def do_resize(self) -> object: ...

    @property
    def do_rescale(self) -> object: ...

    @property
    def do_normalize(self) -> object: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class RunLengths(TypedDict):
    """A mask as COCO has it, compressed."""

    size: list[int]  # height, width
    counts: str


class CocoAnnotation(TypedDict):
    """All pixels of a class in a picture, as an annotation of COCO."""

    id: int
    image_id: int
    category_id: int
    segmentation: RunLengths
    area: int
    bbox: list[int]  # left, top, width, height
    iscrowd: int


class Feature(TypedDict):
    """A region as GeoJSON has it."""

    type: str
    properties: Mapping[str, int | float | str]
    geometry: Mapping[str, object]


class FeatureCollection(TypedDict):
    """Regions as a file of GeoJSON has them."""

    type: str
    features: list[Feature]

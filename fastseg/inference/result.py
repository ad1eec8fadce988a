"""`Result`: a picture and its label map, and what people make of them."""

from __future__ import annotations

import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from fastseg.images.inputs import channels_last, flatten_images, is_unit
from fastseg.images.modes import to_8_bits, to_rgb
from fastseg.images.outlines import feature, polygons
from fastseg.images.overlay import ClassShare, class_shares, label_image, overlay
from fastseg.images.palettes import check_palette, config_palette, palette
from fastseg.images.run_lengths import class_runs
from fastseg.images.types import CocoAnnotation, FeatureCollection, RunLengths

from .scores import LabelMap

if TYPE_CHECKING:
    from shapely.geometry import Polygon
    from supervision import Detections

Names = str | int | Sequence[str | int]
_NEAR = 3  # names that an error proposes


@dataclass(frozen=True, eq=False)
class Result:
    """A picture that was segmented: `segment(..., results=True)` gives one for each.

    In a notebook it shows itself. A class is all of its pixels, not an object: where two cars
    touch, they are one region.

    Args:
        labels: (H, W), the class of every pixel, as `segment` gives them.
        image: PIL's, or an array (H, W), (H, W, 3) or (H, W, 4).
        names: of the classes, by number; others are called by their number.
        palette: (K, 3) uint8, RGB, the colours of the classes.
        scores: (H, W) the probability of every pixel's class, where it was asked for.
        path: of the picture, where it is known.
    """

    labels: torch.Tensor
    image: Image.Image | np.ndarray = field(repr=False)
    names: Mapping[int, str] = field(repr=False)
    palette: np.ndarray = field(repr=False)
    scores: torch.Tensor | None = field(default=None, repr=False)
    path: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "palette", check_palette(self.palette, "palette"))

    def overlay(self, alpha: float = 0.55, legend: bool = True) -> Image.Image:
        """The picture with its classes over it, RGB: `alpha` is the opacity of their colours.

        Raises:
            ValueError: the picture has no form that can be shown, as of many bands.
        """
        return overlay(self._picture(), self.labels, self.palette, self.names, alpha, legend)

    def label_image(self) -> Image.Image:
        """The label map as an indexed image, with the classes' colours; 16-bit grey beyond 256."""
        return label_image(self.labels, self.palette)

    def save(self, path: str | Path, alpha: float = 0.55, legend: bool = True) -> Path:
        """Write the overlay in the format of the suffix of `path`, and return the path."""
        path = Path(path)
        self.overlay(alpha, legend).save(path)
        return path

    def shares(self) -> list[ClassShare]:
        """The classes in it with their pixels and shares, largest first."""
        return class_shares(self.labels, self.names)

    def mask(self, names: Names) -> np.ndarray:
        """(H, W) bool, where it is of these classes.

        Args:
            names: the name or the number of a class, or several.

        Raises:
            ValueError: there is no such class.
        """
        return np.isin(self._numbers(), self._chosen(names))

    def cutout(self, names: Names, crop: bool = True) -> Image.Image:
        """The picture as RGBA, transparent where it is of other classes than `names`.

        With `crop` no larger than what is there; a picture with nothing of them keeps its size.

        Raises:
            ValueError: there is no such class, or the picture has no form that can be shown.
        """
        mask = Image.fromarray(self.mask(names).astype(np.uint8) * 255)
        shown = self._picture()
        picture = shown if isinstance(shown, Image.Image) else Image.fromarray(shown)
        picture = to_rgb(to_8_bits(picture)).copy()  # which may be the caller's own
        picture.putalpha(mask)
        box = mask.getbbox() if crop else None
        return picture if box is None else picture.crop(box)

    def rle(self) -> dict[int, RunLengths]:
        """Each class as run lengths, {"size": [height, width], "counts": str}, as COCO has them.

        pycocotools decodes them.
        """
        return {number: runs.to_coco() for number, runs in class_runs(self._numbers()).items()}

    def coco(self, image_id: int = 1, first_id: int = 1) -> list[CocoAnnotation]:
        """An annotation of COCO for each class; category_id is the number of the class."""
        return [
            {
                "id": first_id + index,
                "image_id": image_id,
                "category_id": number,
                "segmentation": runs.to_coco(),
                "area": runs.area,
                "bbox": list(runs.box),
                "iscrowd": 0,
            }
            for index, (number, runs) in enumerate(class_runs(self._numbers()).items())
        ]

    def polygons(self, simplify: float = 0.0, smallest: int = 0) -> list[tuple[int, Polygon]]:
        """Pairs of a class number and a shapely Polygon with its holes, one for each region.

        They run along the edges of pixels, x to the right and y down, and their areas are the
        numbers of pixels; regions that touch at a corner alone are two. Needs the extra `geo`.

        Args:
            simplify: how far an outline may move, in pixels.
            smallest: regions of fewer pixels are given to their largest neighbour.

        Raises:
            ImportError: rasterio or shapely is not installed.
        """
        return list(polygons(self._numbers(), simplify, smallest))

    def to_geojson(
        self,
        transform: Sequence[float] | None = None,
        simplify: float = 0.0,
        smallest: int = 0,
    ) -> FeatureCollection:
        """The polygons as a FeatureCollection of GeoJSON, with class, name and pixels.

        Args:
            transform: (a, b, c, d, e, f) of what takes pixels to places on earth, as rasterio's
                `dataset.transform`; GeoJSON wants longitude and latitude. None leaves pixels.
            simplify, smallest: as of `polygons`.

        Raises:
            ImportError: rasterio or shapely is not installed.
        """
        features = []
        for number, polygon in self.polygons(simplify, smallest):
            name = str(self.names.get(number, number))
            properties = {"class": number, "name": name, "pixels": polygon.area}
            features.append(feature(polygon, properties, transform))
        return {"type": "FeatureCollection", "features": features}

    def to_supervision(self) -> Detections:
        """`supervision.Detections` with a mask for each class. Needs the package supervision."""
        import supervision

        numbers = self._numbers()
        runs = class_runs(numbers)
        boxes = np.array([one.box for one in runs.values()], dtype=np.float64)
        boxes[:, 2:] += boxes[:, :2]
        return supervision.Detections(
            xyxy=boxes,
            mask=np.stack([numbers == number for number in runs]),
            class_id=np.array(list(runs)),
            data={"class_name": np.array([str(self.names.get(one, one)) for one in runs])},
        )

    def _repr_png_(self) -> bytes:
        stream = io.BytesIO()
        self.overlay().save(stream, format="PNG")
        return stream.getvalue()

    def _numbers(self) -> np.ndarray:
        return np.asarray(self.labels.cpu())

    def _picture(self) -> Image.Image | np.ndarray:
        image = self.image
        if isinstance(image, Image.Image):
            return image
        array = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
        if is_unit(array):
            array = np.rint(array * 255)
        has_form = array.ndim == 2 or array.shape[2] in (3, 4)
        if not has_form or array.min() < 0 or array.max() > 255:
            raise ValueError(
                "image: expected one that can be shown, of 1, 3 or 4 channels from 0 to 255, got "
                f"{array.shape}, {array.min()} to {array.max()}"
            )
        return array.astype(np.uint8)

    def _chosen(self, names: Names) -> list[int]:
        several = [names] if isinstance(names, str | int) else list(names)
        return [self._number(one) for one in several]

    def _number(self, name: str | int) -> int:
        if isinstance(name, int):
            if not 0 <= name < max(len(self.palette), 1):
                last = len(self.palette) - 1
                raise ValueError(f"names: expected a class from 0 to {last}, got {name}")
            return name
        numbers = {str(known): number for number, known in self.names.items()}
        if name not in numbers:
            near = difflib.get_close_matches(name, numbers, _NEAR) or list(numbers)[:_NEAR]
            raise ValueError(
                f"names: expected the name of a class, such as {', '.join(near)}, got {name!r}"
            )
        return numbers[name]


def results_of(
    model: Any,
    images: Any,
    maps: Sequence[LabelMap],
    input_data_format: str | None,
    by_prompts: bool = False,
) -> list[Result]:
    """A Result for each of the images and its label map, with the names and colours of the model.

    Of a model without a configuration, and of prompts, classes have numbers for names.
    """
    config: Any = getattr(getattr(model, "module", model), "config", None)
    if by_prompts or not hasattr(config, "id2label"):
        most = max(int(labels.max()) for labels, _ in maps)
        names, colours = {}, palette(most + 1)
    else:
        names, colours = config.id2label, config_palette(config)
        if config.num_labels == 1:  # 1 where the class is, else 0
            names = {0: "background", 1: str(names.get(0, 1))}
            colours = np.vstack([np.zeros((1, 3), dtype=np.uint8), colours])
    return [
        Result(
            labels=labels,
            image=channels_last(image, "image", input_data_format, None),
            names=names,
            palette=colours,
            scores=scores,
            path=getattr(image, "filename", None) or None,
        )
        for image, (labels, scores) in zip(flatten_images(images), maps, strict=True)
    ]

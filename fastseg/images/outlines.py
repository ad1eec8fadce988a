"""Outlines of the classes in a label map: polygons with holes along the edges of pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .types import Feature

MISSING = "polygons need rasterio and shapely: pip install 'fastseg-segformer[geo]'"


def polygons(labels: np.ndarray, simplify: float, smallest: int) -> Iterator[tuple[int, Any]]:
    """Pairs of a class number and a shapely Polygon, x to the right and y down, in pixels.

    Args:
        labels: (H, W) integers from 0 to 65535.
        simplify: how far an outline may move, in pixels; 0 leaves it at the edges of pixels.
        smallest: regions of fewer pixels are given to their largest neighbour first.

    Raises:
        ImportError: rasterio or shapely is not installed.
    """
    try:
        from rasterio.features import shapes, sieve
        from shapely.geometry import shape
    except ImportError as error:
        raise ImportError(MISSING) from error
    data = labels.astype(np.uint8 if labels.max() < 256 else np.int32)
    if smallest > 1:
        data = sieve(data, smallest)
    for geometry, number in shapes(data):
        polygon = shape(geometry)
        if simplify:
            polygon = polygon.simplify(simplify)
        if not polygon.is_empty:
            yield int(number), polygon


def feature(
    polygon: Any, properties: dict[str, int | float | str], transform: Sequence[float] | None
) -> Feature:
    """A polygon as a feature of GeoJSON, whose outer ring goes counterclockwise.

    Args:
        transform: (a, b, c, d, e, f), by which a place (x, y) is (a x + b y + c, d x + e y + f):
            as rasterio's. None leaves pixels.
    """
    from shapely.affinity import affine_transform
    from shapely.geometry import mapping
    from shapely.geometry.polygon import orient

    if transform is not None:
        a, b, c, d, e, f = transform[:6]
        polygon = affine_transform(polygon, [a, b, d, e, c, f])
    return {
        "type": "Feature",
        "properties": properties,
        "geometry": mapping(orient(polygon)),
    }

"""Images for the tests of the image processor, and the comparison with transformers' PIL one."""

from __future__ import annotations

import numpy as np
import skimage.data
from transformers.models.segformer.image_processing_pil_segformer import (
    SegformerImageProcessorPil,
)

from fastseg.images.processor import SegformerImageProcessor

# Photographs that come with scikit-image, coloured but for the camera man.
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera")
SHAPES = [(1, 1), (3, 5), (517, 389), (9, 2000), (64, 64), (2, 3)]


def photograph(name: str) -> np.ndarray:
    return getattr(skimage.data, name)()


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def assert_same(ours, theirs) -> None:
    """Equal bit for bit, and in type."""
    assert set(ours) == set(theirs)
    for key in ours:
        a, b = np.asarray(ours[key]), np.asarray(theirs[key])
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def both(images, maps=None, init=None, return_tensors="pt", **call):
    init = init or {}
    ours = SegformerImageProcessor(**init)(images, maps, return_tensors=return_tensors, **call)
    theirs = SegformerImageProcessorPil(**init)(images, maps, return_tensors=return_tensors, **call)
    return ours, theirs

"""Tileable noise textures, made once per process from fixed seeds, and how they are sampled.

Drawing fresh noise for every scene would cost more than everything else in it; a random offset
into a fixed tile looks the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating[Any]]

TILE = 512  # texels per side; a power of two, so that wrapping is a mask


@cache
def tile(first: int, octaves: int, persistence: float = 0.55) -> Array:
    """Fractal noise (TILE, TILE) in 0..1, mean about 0.5: octaves of `first * 2**i` cells.

    `first` is a power of two, and `first * 2 ** (octaves - 1)` at most TILE.
    """
    rng = np.random.Generator(np.random.PCG64([first, octaves]))
    total = np.zeros((TILE, TILE), np.float32)
    for octave in range(octaves):
        cells = first << octave
        grid = rng.random((cells, cells), dtype=np.float32)
        if cells < TILE:
            grid = np.pad(grid, 2, mode="wrap")
            step = TILE // cells
            size = (cells + 4) * step
            big = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
            grid = np.asarray(big)[2 * step : 2 * step + TILE, 2 * step : 2 * step + TILE]
        total += persistence**octave * (grid - 0.5)
    return np.clip(total / (5 * total.std()) + 0.5, 0, 1)


CLOUD = (4, 6, 0.5)
LEAF = (32, 4, 0.7)
GRIT = (64, 4, 0.9)
STAIN = (8, 5, 0.6)


def sample(texture: Array, u: NDArray, v: NDArray) -> Array:
    """Nearest texel at (u, v), any broadcastable float arrays in texels, wrapped."""
    cols = np.floor(u).astype(np.int32) & (TILE - 1)
    rows = np.floor(v).astype(np.int32) & (TILE - 1)
    return texture[rows, cols]


def patch(
    texture: Array, origin: tuple[float, float], shape: tuple[int, int], step: float
) -> Array:
    """A (rows, columns) patch that starts at texel `origin` = (v, u), `step` texels a pixel."""
    rows = np.floor(origin[0] + step * np.arange(shape[0])).astype(np.int32) & (TILE - 1)
    cols = np.floor(origin[1] + step * np.arange(shape[1])).astype(np.int32) & (TILE - 1)
    return texture[rows[:, None], cols[None, :]]


def ridge(rng: np.random.Generator, width: int, cells: float, octaves: int, rough: float) -> Array:
    """A 1-D fractal curve (width,) in about -1..1; `cells` bumps across, halved per octave."""
    position = np.linspace(0, 1, width, dtype=np.float32)
    total = np.zeros(width, np.float32)
    for octave in range(octaves):
        count = max(2, round(cells * 2**octave))
        knots = rng.uniform(-1, 1, count + 2)
        at = position * count
        low = at.astype(np.int32)
        t = at - low
        t = t * t * (3 - 2 * t) if octave < 2 else t
        total += rough**octave * (knots[low] * (1 - t) + knots[low + 1] * t).astype(np.float32)
    return total

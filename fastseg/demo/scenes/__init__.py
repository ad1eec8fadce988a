"""Street and landscape pictures with exact labels, drawn from a seed.

They stand in for a photographic dataset that could not be shipped: the embedded model was trained
on them, and tests and benchmarks use them as pictures that look like something. NumPy and Pillow
draw them; the same seed and size give the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import backdrop, light
from .camera import Canvas
from .classes import CLASSES, PALETTE
from .ground import Shadows, draw_ground
from .layout import Layout, draw_layout

__all__ = ["CLASSES", "PALETTE", "Scene", "draw_scene"]


@dataclass(frozen=True)
class Scene:
    """A picture (H, W, 3) and its labels (H, W), both uint8; a label is an index into CLASSES."""

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]


def draw_scene(seed: int, size: tuple[int, int] = (512, 512)) -> Scene:
    """Draw the scene of a seed (0 or more) at size (height, width), each at least 32 pixels.

    Raises ValueError for a negative seed or a smaller size. What stands where depends on the seed
    and on the aspect ratio; the resolution only decides how finely it is drawn.
    """
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    height, width = size
    if height < 32 or width < 32:
        raise ValueError(f"size must be at least (32, 32), got {size}")
    # One stream for each part: finer noise in one picture must not move the trees in another.
    streams = [np.random.Generator(np.random.PCG64([seed, part])) for part in range(5)]
    sun = light.draw_light(streams[0])
    layout = draw_layout(streams[1], (height, width), rain=sun.wet)
    canvas = Canvas(
        camera=layout.camera,
        light=sun,
        image=np.zeros((height, width, 3), np.float32),
        labels=np.zeros((height, width), np.uint8),
    )
    _draw_backdrop(canvas, layout, streams[2])
    road = draw_ground(canvas, layout.road, _cast_shadows(canvas, layout), streams[3])
    for _, draw in layout.drawings():
        draw(canvas)
    weather = streams[4]
    if sun.wet:
        visible = road & (canvas.labels == CLASSES.index("road"))
        light.add_reflections(canvas.image, visible, int(layout.camera.horizon), 0.35)
    light.add_glows(canvas.image, canvas.glows)
    if sun.wet:
        light.add_rain(canvas.image, weather)
    return Scene(light.develop(canvas.image, weather), canvas.labels)


def _draw_backdrop(canvas: Canvas, layout: Layout, rng: np.random.Generator) -> None:
    backdrop.draw_sky(canvas, rng)
    for part in layout.far:
        if part == "mountains":
            backdrop.draw_mountains(canvas, rng, int(rng.integers(1, 4)), rng.uniform(0.12, 0.32))
        elif part == "woods":
            backdrop.draw_woods(canvas, rng, rng.uniform(0.03, 0.07))
        else:
            backdrop.draw_skyline(canvas, rng, rng.uniform(0.08, 0.24))


def _cast_shadows(canvas: Canvas, layout: Layout) -> Shadows:
    shadows = Shadows(canvas.camera, canvas.light.direction)
    for b in layout.buildings:
        shadows.block([(b.x0, b.z0), (b.x1, b.z0), (b.x1, b.z1), (b.x0, b.z1)], b.height)
    for tree in layout.trees:
        middle = 0.5 * tree.height if tree.kind == "bush" else 0.62 * tree.height
        shadows.ball(tree.x, tree.z, middle, tree.radius, 235)
    for vehicle in layout.vehicles:
        shadows.block(vehicle.corners(), 0.8 * vehicle.size[2])
    for person in layout.people:
        wide = 0.2 * person.height / 1.7
        corners = [(person.x - wide, person.z - 0.1), (person.x + wide, person.z + 0.1)]
        shadows.block(corners, person.height)
    for sign in layout.signs:
        corners = [(sign.x - 0.08, sign.z), (sign.x + 0.08, sign.z + 0.05)]
        shadows.block(corners, sign.top)
    return shadows

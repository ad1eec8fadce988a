"""Things far away: sky with clouds, mountains, and a line of woods or towers on the horizon."""

from __future__ import annotations

import numpy as np
from PIL import Image

from . import noise
from .camera import Canvas
from .classes import BUILDING, MOUNTAIN, SKY, TREE
from .light import rgb
from .noise import Array


def draw_sky(canvas: Canvas, rng: np.random.Generator) -> None:
    camera, light = canvas.camera, canvas.light
    rows = int(np.clip(camera.horizon + 2, 1, camera.height))
    up = np.clip((camera.horizon - np.arange(rows) - 0.5) / camera.height, 0, 1)
    blend = (1 - np.exp(-up * 4.5)).astype(np.float32)[:, None]
    gradient = light.fog * (1 - blend) + light.zenith * blend
    sky = canvas.image[:rows]
    sky[:] = gradient[:, None]
    if light.night:
        count = int(rng.integers(60, 200))
        ys, xs = rng.integers(0, rows, count), rng.integers(0, camera.width, count)
        sky[ys, xs] += rng.uniform(0.1, 0.7, (count, 1)).astype(np.float32)
    _draw_sun(canvas, rng)
    if light.clouds > 0.1:
        _draw_clouds(sky, canvas, rng)
    canvas.labels[:rows] = SKY


def _draw_sun(canvas: Canvas, rng: np.random.Generator) -> None:
    camera, light = canvas.camera, canvas.light
    size = camera.height
    if light.night:
        at = rng.uniform(0, camera.width), rng.uniform(0, 0.3) * size
        canvas.glow(at, 0.2 * size, (0.1, 0.1, 0.13))
        x, y, radius = at[0], at[1], rng.uniform(0.012, 0.022) * size
        rows, cols = np.mgrid[0 : canvas.image.shape[0], 0 : canvas.image.shape[1]]
        disc = np.clip(radius - np.hypot(cols + 0.5 - x, rows + 0.5 - y) + 0.5, 0, 1)
        canvas.image += disc[..., None].astype(np.float32) * rgb(0.85, 0.85, 0.8)
        return
    dx, dy, dz = light.direction
    if dz <= 0.15 or light.weather not in ("golden", "dusk", "clear"):
        return
    u, v = camera.centre + camera.focal * dx / dz, camera.horizon - camera.focal * dy / dz
    cols = (np.arange(camera.width, dtype=np.float32) + 0.5 - u) / size
    rows_up = (np.arange(camera.height, dtype=np.float32) + 0.5 - v) / size
    near = np.sqrt(cols[None] ** 2 + rows_up[:, None] ** 2)
    halo = 0.5 * np.exp(-near * 5) + 1.2 * np.clip(1.3 - near / 0.03, 0, 1)
    canvas.image += halo[..., None] * rgb(1.0, 0.8, 0.5)


def _draw_clouds(sky: Array, canvas: Canvas, rng: np.random.Generator) -> None:
    """A layer of cloud in perspective, worked out at a quarter of the resolution."""
    camera, light = canvas.camera, canvas.light
    rows, cols = sky.shape[:2]
    v = np.arange(0, rows + 3, 4, dtype=np.float32)[:, None] + 0.5
    u = np.arange(0, cols + 3, 4, dtype=np.float32)[None] + 0.5
    far = camera.height / np.maximum(camera.horizon - v + 0.09 * camera.height, 1)
    scale, texture = rng.uniform(28, 60), noise.tile(*noise.CLOUD)
    origin = rng.uniform(0, noise.TILE, 2)
    across = origin[0] + scale * far * (u - camera.centre) / camera.height * 1.6
    along = origin[1] + scale * far * 1.4
    thick = noise.sample(texture, across, along)
    lit = thick - noise.sample(texture, across + 5 * light.direction[0], along - 4)
    cover = np.clip((thick - 0.78 + 0.55 * min(light.clouds, 1.0)) * 3.2, 0, 1)
    fade = np.clip((camera.horizon - v) / (0.16 * camera.height), 0, 1)
    both = [
        np.asarray(
            Image.fromarray(field.astype(np.float32)).resize(
                (u.size * 4, v.size * 4), Image.Resampling.BICUBIC
            )
        )[:rows, :cols, None]
        for field in (cover * fade, lit)
    ]
    alpha, shade = np.clip(both[0], 0, 1) * 0.92, np.clip(both[1] * 2.2, -0.25, 0.25)
    white = light.ambient * 1.05 + light.sun * 0.62 + 0.04
    if light.weather == "golden":
        white = white * rgb(1.04, 0.95, 0.88)
    colour = white * (0.9 + shade) if light.clouds < 0.8 else light.fog * (0.86 + shade)
    sky += alpha * (colour - sky)


def _ridge_mask(canvas: Canvas, top: Array) -> tuple[slice, Array]:
    """Rows that a ridge spans, and its coverage there; top (W,) is the row of the ridge."""
    camera = canvas.camera
    first = int(np.clip(top.min() - 1, 0, camera.height - 1))
    last = int(np.clip(camera.horizon + 2, first + 1, camera.height))
    v = np.arange(first, last, dtype=np.float32)[:, None] + 0.5
    return slice(first, last), np.clip(v - top[None] + 0.5, 0, 1)


def draw_mountains(canvas: Canvas, rng: np.random.Generator, layers: int, height: float) -> None:
    """Ridges behind one another; `height` of the highest as a share of the picture's height."""
    camera, light = canvas.camera, canvas.light
    rock = rgb(*rng.choice([(0.42, 0.4, 0.44), (0.38, 0.42, 0.4), (0.47, 0.4, 0.36)]))
    snow_line = rng.uniform(0.55, 1.6)
    span = camera.width / camera.height
    texture = noise.tile(*noise.STAIN)
    for layer in range(layers):
        near = (layer + 1) / layers
        tall = height * camera.height * (1.0 - 0.35 * layer)
        line = noise.ridge(rng, camera.width, 2.2 * span + layer, 6, 0.5)
        top = camera.horizon - tall * np.clip(0.62 + 0.42 * line, 0.16, 1.3)
        rows, alpha = _ridge_mask(canvas, top)
        v = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5
        step = 420 / camera.height
        u = np.arange(camera.width, dtype=np.float32)[None]
        # Slopes: a texture that hangs from the ridge, so that gullies run down from it.
        grain = noise.sample(texture, (u + 40 * layer) * step * 1.3, (v - top[None]) * step * 0.5)
        slope = np.clip(np.gradient(top) * np.sign(light.direction[0]) * 0.5, -0.6, 0.6)[None]
        shade = 0.72 + 0.9 * (grain - 0.5) + 0.16 * slope
        lit = (light.ambient + 0.6 * light.sun) * 0.95
        colour = shade[..., None] * (rock * lit)
        above = (camera.horizon - v) / tall + 0.6 * (grain - 0.5)
        snow = np.clip((above - snow_line) * 6, 0, 1)[..., None]
        colour += snow * (np.clip(0.45 + shade, 0, 1.1)[..., None] * lit - colour)
        haze = min(0.9, 0.34 + 0.25 * (1 - near) + 14 * light.density)
        colour += haze * (light.fog * 0.93 - colour)
        area = canvas.image[rows]
        area += alpha[..., None] * (colour - area)
        canvas.labels[rows][alpha >= 0.5] = MOUNTAIN


def draw_woods(canvas: Canvas, rng: np.random.Generator, height: float) -> None:
    """A line of distant trees; `height` as a share of the picture's height."""
    camera, light = canvas.camera, canvas.light
    span = camera.width / camera.height
    line = noise.ridge(rng, camera.width, 5 * span, 5, 0.62)
    top = camera.horizon - height * camera.height * np.clip(0.8 + 0.3 * line, 0.45, 1.4)
    rows, alpha = _ridge_mask(canvas, top)
    shape = (rows.stop - rows.start, camera.width)
    leaves = noise.patch(
        noise.tile(*noise.LEAF), tuple(rng.uniform(0, 512, 2)), shape, 700 / camera.height
    )
    green = rgb(0.17, 0.3, 0.13) * rng.uniform(0.85, 1.15)
    lit = light.ambient + 0.5 * light.sun
    colour = (0.45 + 1.1 * leaves)[..., None] * (green * lit)
    haze = light.haze(90)
    colour += min(haze, 0.75) * (light.fog - colour)
    area = canvas.image[rows]
    area += alpha[..., None] * (colour - area)
    canvas.labels[rows][alpha >= 0.5] = TREE


def draw_skyline(canvas: Canvas, rng: np.random.Generator, height: float) -> None:
    """Towers on the horizon, grey with distance; `height` as a share of the picture's height."""
    camera, light = canvas.camera, canvas.light
    haze = min(0.72, 0.3 + 12 * light.density)
    x = rng.uniform(-0.1, 0.1) * camera.height
    while x < camera.width:
        wide = rng.uniform(0.04, 0.11) * camera.height
        tall = height * camera.height * rng.uniform(0.35, 1.0)
        tone = rng.uniform(0.42, 0.62) + rgb(*rng.uniform(-0.04, 0.04, 3))
        seed = int(rng.integers(1 << 30))
        box = canvas.window(x, camera.horizon - tall, x + wide, camera.horizon + 2)
        if box is not None:
            colour = _tower(canvas, box, tone, np.random.Generator(np.random.PCG64(seed)))
            left, top, right, bottom = box
            canvas.image[top:bottom, left:right] = colour + haze * (light.fog - colour)
            canvas.labels[top:bottom, left:right] = BUILDING
        x += wide * rng.uniform(0.75, 1.15)


def _tower(
    canvas: Canvas, box: tuple[int, int, int, int], tone: Array, rng: np.random.Generator
) -> Array:
    """The colours (h, w, 3) of one tower's front: a grid of windows, some of them lit."""
    light = canvas.light
    rows, cols = box[3] - box[1], box[2] - box[0]
    pitch = max(3, canvas.camera.height // 90)
    wall = tone * (light.ambient + 0.5 * light.sun)
    glass = 0.8 * wall
    lamp = rgb(1.0, 0.82, 0.45) * 1.3
    v, u = np.arange(rows)[:, None], np.arange(cols)[None]
    panes = (v % pitch > 0) & (u % pitch > 0)
    lit = (rng.random((64, 64)) > 0.6)[v // pitch % 64, u // pitch % 64] & light.lamps
    colour = np.where(panes[..., None], glass, wall)
    return np.where((panes & lit)[..., None], lamp, colour)

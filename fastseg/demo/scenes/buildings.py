"""Buildings: boxes whose walls are worked out per pixel, in the wall's own metres."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import noise
from .camera import Canvas, Colour, Sprite
from .classes import BUILDING
from .light import rgb
from .noise import Array

WALLS: tuple[Colour, ...] = (
    (0.62, 0.33, 0.25),
    (0.52, 0.27, 0.22),
    (0.8, 0.74, 0.62),
    (0.86, 0.8, 0.7),
    (0.72, 0.7, 0.68),
    (0.58, 0.6, 0.63),
    (0.84, 0.66, 0.48),
    (0.78, 0.56, 0.5),
    (0.62, 0.68, 0.7),
    (0.88, 0.84, 0.76),
    (0.7, 0.62, 0.42),
    (0.66, 0.74, 0.68),
)
ROOFS: tuple[Colour, ...] = ((0.48, 0.24, 0.18), (0.3, 0.29, 0.31), (0.4, 0.3, 0.24))
AWNINGS: tuple[Colour, ...] = (
    (0.7, 0.16, 0.16),
    (0.14, 0.36, 0.3),
    (0.16, 0.26, 0.5),
    (0.82, 0.6, 0.2),
    (0.4, 0.2, 0.36),
)


@dataclass(frozen=True)
class Building:
    """An upright box, x0 < x1 and z0 < z1 in metres, and the looks of its walls."""

    x0: float
    x1: float
    z0: float
    z1: float
    height: float
    wall: Colour
    bay: float  # metres from window to window
    storey: float
    window: tuple[float, float]  # the window's share of bay and storey
    glass: bool  # a curtain wall
    shop: bool  # shop windows and an awning on the ground floor
    roof: float  # height of a pitched roof; 0 for a flat one
    seed: int

    def beyond(self, x: float) -> bool:
        """Return whether x is not on the street's side of the wall that faces the street."""
        return x > self.x0 - 0.5 if self.x0 > 0 else x < self.x1 + 0.5


def draw_building_plan(
    rng: np.random.Generator,
    box: tuple[float, float, float, float],
    height: float,
    house: bool = False,
) -> Building:
    wall = np.array(WALLS[rng.integers(len(WALLS))]) * rng.uniform(0.88, 1.08)
    glass = not house and height > 14 and rng.random() < 0.22
    if glass:
        wall = np.array([0.36, 0.44, 0.52]) * rng.uniform(0.7, 1.3)
    storey = rng.uniform(2.9, 3.6)
    return Building(
        *box,
        height=max(1, round(height / storey)) * storey + (0 if house else 0.9),
        wall=(float(wall[0]), float(wall[1]), float(wall[2])),
        bay=rng.uniform(1.5, 2.2) if glass else rng.uniform(2.2, 3.6),
        storey=storey,
        window=(0.86, 0.8) if glass else (rng.uniform(0.36, 0.62), rng.uniform(0.42, 0.62)),
        glass=glass,
        shop=not house and not glass and rng.random() < 0.6,
        roof=rng.uniform(1.6, 3.0) if house else 0.0,
        seed=int(rng.integers(1 << 30)),
    )


def _box(value: Array, half: Array | float, pixel: Array) -> Array:
    """Coverage of |value| < half for a pixel of this width in metres."""
    return np.clip((half - np.abs(value)) / pixel + 0.5, 0, 1)


def _wall(plan: Building, canvas: Canvas, s: Array, t: Array, pixel: Array, lit: Array) -> Array:
    """The colour (h, w, 3) of a wall, s metres along and t metres up, `pixel` metres a pixel."""
    light = canvas.light
    rng = np.random.Generator(np.random.PCG64(plan.seed))
    shift = rng.uniform(0, 512, 2)
    grime = noise.sample(noise.tile(*noise.STAIN), s * 9 + shift[0], t * 9 + shift[1]) - 0.5
    grit = noise.sample(noise.tile(*noise.GRIT), s * 46 + shift[0], t * 80) - 0.5
    value = 1 + 0.26 * grime + 0.32 * grit * np.clip(0.03 / pixel, 0, 1)
    value -= 0.16 * np.clip(1 - t / 1.2, 0, 1)
    brick = np.clip(0.035 / pixel, 0, 1) * 0.16
    if plan.wall[0] > 1.6 * plan.wall[2]:
        value -= brick * _box(np.mod(t, 0.16) - 0.08, 0.016, pixel)
    colour = value[..., None] * rgb(*plan.wall)

    bay, storey = plan.bay, plan.storey
    along, up = np.mod(s, bay) - 0.5 * bay, np.mod(t, storey) - 0.52 * storey
    cell_s, cell_t = np.floor(s / bay).astype(np.int32), np.floor(t / storey).astype(np.int32)
    ground = t < storey
    shop = ground & plan.shop
    wide = np.where(shop, 0.43 * bay, 0.5 * plan.window[0] * bay).astype(np.float32)
    tall = np.where(shop, 0.4 * storey, 0.5 * plan.window[1] * storey).astype(np.float32)
    below_top = (t < plan.height - 0.8) | (plan.roof > 0)
    frame = _box(along, wide + 0.12, pixel) * _box(up, tall + 0.12, pixel) * below_top
    pane = _box(along, wide, pixel) * _box(up, tall, pixel) * below_top
    if not plan.glass:
        # One bar down the middle of each window, while it can be seen.
        pane = pane * (1 - 0.8 * _box(along, 0.04, pixel) * np.clip(0.08 / pixel, 0, 1))
    trim = rgb(*plan.wall) * 0.75 + 0.22
    if plan.glass:
        trim = rgb(*plan.wall) * 0.8
    colour += frame[..., None] * (trim - colour)
    table = rng.random(64).astype(np.float32)
    pick = table[(cell_s * 7 + cell_t * 13) & 63]
    if plan.glass:
        slope = np.clip(t / max(plan.height, 1), 0, 1)[..., None]
        glass = light.fog * 0.6 + slope * (light.zenith - light.fog) * 0.45
        glass = glass * (0.72 + 0.35 * pick + 0.5 * grime)[..., None] * rgb(0.8, 0.92, 1.0)
    else:
        tone = (0.11 + 0.2 * pick + 0.1 * (up / storey))[..., None]
        glass = tone * (0.5 + 0.6 * light.zenith) + (pick > 0.8)[..., None] * rgb(0.3, 0.28, 0.24)
        glass = glass * light.ambient * 1.3
    colour *= lit
    if light.lamps:
        chance = 0.45 if light.night else 0.3
        lamp = (pick < chance)[..., None] * rgb(1.0, 0.78, 0.42) * (0.5 + 0.9 * pick)[..., None]
        if plan.shop:
            lamp = np.where(ground[..., None], rgb(1.0, 0.86, 0.58) * 0.95, lamp)
        glass = np.maximum(glass, lamp)
    colour += pane[..., None] * (glass - colour)

    if plan.shop:
        band = _box(t - storey * 0.97, 0.3, pixel)
        awning = rgb(*AWNINGS[rng.integers(len(AWNINGS))])
        stripes = 0.85 + 0.3 * _box(np.mod(s, 0.9) - 0.45, 0.22, pixel)
        banner = (stripes[..., None] * awning) * (lit if not light.lamps else 0.75)
        colour += band[..., None] * (banner - colour)
    if plan.roof == 0:
        cornice = _box(t - plan.height + 0.3, 0.32, pixel)
        colour += cornice[..., None] * ((rgb(*plan.wall) * 0.85 + 0.1) * lit - colour)
        colour *= 1 - 0.3 * _box(t - plan.height + 0.72, 0.1, pixel)[..., None]
    return colour


def _lay_haze(canvas: Canvas, colour: Array, z: Array) -> Array:
    light = canvas.light
    haze = 1 - np.exp(-light.density * np.maximum(0, z - 4))
    return colour + haze[..., None] * (light.fog - colour)


def draw_front(plan: Building, canvas: Canvas) -> None:
    """The wall that faces the eye."""
    camera = canvas.camera
    if plan.z0 < 1.2:
        return
    x0, y0 = camera.project(plan.x0, plan.height, plan.z0)
    x1, y1 = camera.project(plan.x1, 0.0, plan.z0)
    box = canvas.window(x0, y0, x1, y1)
    if box is None:
        return
    left, top, right, bottom = box
    u = np.arange(left, right, dtype=np.float32)[None] + 0.5
    v = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5
    scale = camera.focal / plan.z0
    s = np.broadcast_to((u - x0) / scale, (v.size, u.size))
    t = np.broadcast_to((y1 - v) / scale, (v.size, u.size))
    pixel = np.full((1, 1), 1 / scale, np.float32)
    colour = _wall(plan, canvas, s, t, pixel, canvas.light.on((0, 0, -1)))
    alpha = np.clip(u - x0 + 0.5, 0, 1) * np.clip(x1 - u + 0.5, 0, 1)
    alpha = alpha * np.clip(v - y0 + 0.5, 0, 1) * np.clip(y1 - v + 0.5, 0, 1)
    canvas.lay(box, colour * alpha[..., None], alpha, BUILDING, plan.z0)


def draw_side(plan: Building, canvas: Canvas) -> None:
    """The roof, and the wall along the street where the box lies wholly to one side of the eye."""
    camera = canvas.camera
    if plan.roof:
        _gable(plan, canvas)
        _pitched_roof(plan, canvas)
    if plan.x0 > 0.3:
        x, normal = plan.x0, (-1.0, 0.0, 0.0)
    elif plan.x1 < -0.3:
        x, normal = plan.x1, (1.0, 0.0, 0.0)
    else:
        return
    z0 = max(plan.z0, 1.0)
    ends = sorted((camera.project(x, 0, z0)[0], camera.project(x, 0, plan.z1)[0]))
    box = canvas.window(
        ends[0],
        camera.project(x, plan.height, z0)[1],
        ends[1],
        camera.project(x, 0, z0)[1],
    )
    if box is None:
        return
    left, top, right, bottom = box
    u = np.arange(left, right, dtype=np.float32)[None] + 0.5
    v = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5
    away = u - camera.centre
    away = np.where(np.abs(away) < 1, 1, away) * np.sign(x)
    z = np.clip(camera.focal * abs(x) / np.maximum(away, 1e-3), z0, plan.z1).astype(np.float32)
    scale = camera.focal / z
    top_row = camera.horizon + (camera.eye - plan.height) * scale
    base_row = camera.horizon + camera.eye * scale
    t = (base_row - v) / scale
    s = np.broadcast_to(z - plan.z0, t.shape)
    pixel = np.maximum(1 / scale, z * z / (camera.focal * abs(x)))
    colour = _wall(plan, canvas, s, t, pixel, canvas.light.on(normal))
    colour = _lay_haze(canvas, colour, np.broadcast_to(z, t.shape))
    alpha = np.clip(u - ends[0] + 0.5, 0, 1) * np.clip(ends[1] - u + 0.5, 0, 1)
    alpha = alpha * np.clip(v - top_row + 0.5, 0, 1) * np.clip(base_row - v + 0.5, 0, 1)
    canvas.lay(box, colour * alpha[..., None], alpha, BUILDING, 0.0)


def _gable(plan: Building, canvas: Canvas) -> None:
    """The triangle of the side wall under a pitched roof."""
    x = plan.x0 if plan.x0 > 0 else plan.x1
    ridge, middle = plan.height + plan.roof, 0.5 * (plan.z0 + plan.z1)
    corners = [(x, plan.height - 0.1, plan.z0), (x, ridge, middle), (x, plan.height - 0.1, plan.z1)]
    lit = canvas.light.on((-1.0 if x > 0 else 1.0, 0, 0)) * rgb(*plan.wall)
    sprite = Sprite()
    sprite.polygon([canvas.camera.project(*p) for p in corners], tuple(lit.tolist()))
    sprite.paint(canvas, BUILDING, middle, noise.tile(*noise.GRIT))


def _pitched_roof(plan: Building, canvas: Canvas) -> None:
    """The slope of the roof that faces the eye."""
    camera, light, out = canvas.camera, canvas.light, 0.35
    eaves, ridge = plan.height - 0.1, plan.height + plan.roof
    middle, z0 = 0.5 * (plan.z0 + plan.z1), plan.z0 - out
    rng = np.random.Generator(np.random.PCG64(plan.seed))
    tiles = rgb(*ROOFS[rng.integers(len(ROOFS))])
    sprite = Sprite()
    colour = tiles * light.on((0, 0.8, -0.6))
    rows = 7
    for i in range(rows):
        a, b = i / rows, (i + 1) / rows
        quad = [
            (plan.x0 - out, eaves + (ridge - eaves) * a, z0 + (middle - z0) * a),
            (plan.x1 + out, eaves + (ridge - eaves) * a, z0 + (middle - z0) * a),
            (plan.x1 + out, eaves + (ridge - eaves) * b, z0 + (middle - z0) * b),
            (plan.x0 - out, eaves + (ridge - eaves) * b, z0 + (middle - z0) * b),
        ]
        shade = colour * (0.92 if i % 2 else 1.05)
        sprite.polygon([camera.project(*p) for p in quad], tuple(shade.tolist()))
    sprite.paint(canvas, BUILDING, plan.z0, noise.tile(*noise.GRIT))

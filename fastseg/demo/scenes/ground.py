"""The ground, pixel by pixel in world coordinates: road and markings, pavements, grass, water."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from . import noise
from .camera import NEAR, Camera, Canvas
from .classes import GRASS, ROAD, SIDEWALK, WATER
from .light import rgb
from .noise import Array


@dataclass(frozen=True)
class Road:
    """Place of the road, and what is beside it. Lengths in metres."""

    centre: float  # x of the middle line, where the camera stands
    bend: float  # x grows by bend * z**2
    half: float  # half the width of the carriageway
    lanes: int  # per direction
    walk: tuple[float, float]  # width of the pavement on the left and on the right; 0 for none
    verge: tuple[int, int]  # the class beyond it: GRASS, SIDEWALK or WATER
    crossing: float  # where a side road crosses; 0 for none
    crossing_width: float
    zebra: float  # where a pedestrian crossing begins; 0 for none

    def middle(self, z: float) -> float:
        return self.centre + self.bend * z * z

    def edge(self, side: int, z: float) -> float:
        """The x of the outer edge of the pavement; side is -1 on the left, 1 on the right."""
        return self.middle(z) + side * (self.half + self.walk[side > 0])


class Shadows:
    """Shadows of upright things, drawn as polygons onto the ground."""

    def __init__(self, camera: Camera, sun: Array) -> None:
        self.camera = camera
        self.picture = Image.new("L", (camera.width, camera.height))
        self.draw = ImageDraw.Draw(self.picture)
        # How far a metre of height throws its shadow; long ones are cut short.
        reach = min(1 / max(float(sun[1]), 0.05), 3.5)
        self.dx, self.dz = -float(sun[0]) * reach, -float(sun[2]) * reach

    def _polygon(self, corners: list[tuple[float, float]], value: int) -> None:
        points = [self.camera.project(x, 0.0, max(z, NEAR)) for x, z in corners]
        self.draw.polygon(points, fill=value)

    def block(self, corners: list[tuple[float, float]], height: float, value: int = 255) -> None:
        """The shadow of a prism on the corners (x, z), plus the dark right under it."""
        moved = [(x + self.dx * height, z + self.dz * height) for x, z in corners]
        self._polygon(moved, value)
        for i, corner in enumerate(corners):
            j = (i + 1) % len(corners)
            self._polygon([corner, corners[j], moved[j], moved[i]], value)
        self._polygon(corners, value)

    def ball(self, x: float, z: float, height: float, radius: float, value: int = 255) -> None:
        """The shadow of a round crown at `height`, and of its trunk."""
        cx, cz = x + self.dx * height, z + self.dz * height
        angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        wobble = radius * (1 + 0.14 * np.sin(3 * angles + x))
        xs, zs = cx + wobble * np.cos(angles), cz + wobble * np.sin(angles)
        self._polygon(list(zip(xs.tolist(), zs.tolist(), strict=True)), value)
        wide = 0.06 * radius + 0.05
        self._polygon([(x - wide, z), (x + wide, z), (cx + wide, cz), (cx - wide, cz)], value)

    def field(self) -> Array:
        blurred = self.picture.filter(ImageFilter.GaussianBlur(0.5 + self.camera.height / 500))
        return np.asarray(blurred, np.float32) * np.float32(1 / 255)


def _lines(distance: Array, half_width: float, pixel: Array) -> Array:
    """Coverage of a stripe, exact for the pixel's width and faint where the pixel is wider."""
    limit = np.minimum(1, 2 * half_width / pixel)
    return np.clip((half_width - np.abs(distance)) / pixel + 0.5, 0, limit)


def draw_ground(
    canvas: Canvas, road: Road, shadows: Shadows, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Paint everything below the horizon; returns a mask (H, W) of the carriageway."""
    camera, light = canvas.camera, canvas.light
    first = int(np.clip(np.ceil(camera.horizon), 0, camera.height - 1))
    v = np.arange(first, camera.height, dtype=np.float32)[:, None] + 0.5
    z = camera.focal * camera.eye / np.maximum(v - np.float32(camera.horizon), 0.4)
    pixel = z / np.float32(camera.focal)
    deep = z * z / np.float32(camera.focal * camera.eye)  # metres of z that a pixel spans
    columns = np.arange(camera.width, dtype=np.float32)[None] + np.float32(0.5 - camera.centre)
    x = columns * pixel
    across = x - (road.centre + road.bend * z * z).astype(np.float32)
    distance = np.abs(across)
    right = across > 0

    grit = noise.sample(noise.tile(*noise.GRIT), x * 38 + 9, z * 38)
    stain = noise.sample(noise.tile(*noise.STAIN), x * 11 + rng.uniform(0, 512), z * 5)
    sharp = np.clip(0.035 / pixel, 0.06, 1)
    grit = (grit - 0.5) * sharp
    stain = (stain - 0.5) * np.clip(0.5 / pixel, 0.1, 1)

    albedo = np.empty((*x.shape, 3), np.float32)
    labels = np.empty(x.shape, np.uint8)
    water = np.zeros(x.shape, bool)
    pave = rgb(*rng.choice([(0.68, 0.65, 0.61), (0.74, 0.67, 0.59), (0.64, 0.64, 0.66)]))
    for kind in sorted(set(road.verge)):
        here = right if road.verge[1] == kind else ~right
        if road.verge[0] == road.verge[1]:
            here = np.ones_like(right)
        labels[here] = kind
        if kind == GRASS:
            colour = _grass(x, z, grit, stain, sharp, rng)
        elif kind == WATER:
            colour = _water(canvas, v, x, z, rng)
            water = water | here
        else:
            colour = _paving(across, z, pixel, deep, grit, stain, pave, 1.2)
        np.copyto(albedo, colour, where=here[..., None])
    walk = np.where(right, road.walk[1], road.walk[0]).astype(np.float32)
    edge = road.half + walk
    slabs = _paving(across, z, pixel, deep, grit, stain, pave, rng.choice([0.6, 1.0]))
    kerb = _lines(distance - road.half - 0.12, 0.14, pixel)
    slabs += (kerb * (walk > 0))[..., None] * (rgb(0.82, 0.81, 0.78) - slabs)
    cover = np.clip((edge - distance) / pixel + 0.5, 0, 1)[..., None]
    albedo += cover * (slabs - albedo)
    on_walk = distance < edge
    labels[on_walk] = SIDEWALK
    water &= ~on_walk

    asphalt = _asphalt(across, distance, z, pixel, deep, grit, stain, road, rng)
    cover = np.clip((road.half - distance) / pixel + 0.5, 0, 1)
    on_road = distance < road.half
    if road.crossing:
        middle = road.crossing + 0.5 * road.crossing_width
        band = np.clip((0.5 * road.crossing_width - np.abs(z - middle)) / deep + 0.5, 0, 1)
        cover = np.maximum(cover, band)
        on_road = on_road | (np.abs(z - middle) < 0.5 * road.crossing_width)
    albedo += cover[..., None] * (asphalt - albedo)
    labels[on_road] = ROAD
    water &= ~on_road

    shade = shadows.field()[first:]
    sun = light.sun * max(0.0, float(light.direction[1]))
    # Sunless places keep the sky's light, less a little for what stands around them.
    lit = (1 - 0.25 * shade)[..., None] * light.ambient + (1 - shade)[..., None] * sun
    if water.any():
        lit[water] = 1  # its colours are lit already
    colour = albedo * lit
    haze = (1 - np.exp(-light.density * np.maximum(0, z - 4)))[..., None]
    colour += haze * (light.fog - colour)
    canvas.image[first:] = colour
    canvas.labels[first:] = labels
    mask = np.zeros(canvas.labels.shape, bool)
    mask[first:] = on_road
    return mask


def _asphalt(
    across: Array,
    distance: Array,
    z: Array,
    pixel: Array,
    deep: Array,
    grit: Array,
    stain: Array,
    road: Road,
    rng: np.random.Generator,
) -> Array:
    tone = rng.uniform(0.33, 0.46)
    grey = rgb(tone, tone, tone * rng.uniform(0.98, 1.06))
    # Wheels polish two tracks in every lane.
    lane = road.half / road.lanes
    tracks = 0.012 * np.cos(across / lane * 4 * np.pi)
    value = tone * (1 + 0.34 * grit + 0.1 * stain) - tracks
    colour = value[..., None] * (grey / tone)
    paint = np.zeros_like(across)
    dashes = (np.mod(z + rng.uniform(0, 6), 6) < 3) & (deep < 3)
    dashes_cover = np.where(deep < 3, dashes, 0.5).astype(np.float32)
    middle = rng.choice(3)
    if middle == 0:
        paint += _lines(distance - 0.16, 0.08, pixel)
    else:
        paint += _lines(across, 0.09, pixel) * (dashes_cover if middle == 1 else 1)
    for i in range(1, road.lanes):
        paint += _lines(distance - i * lane, 0.08, pixel) * dashes_cover
    edge = rng.random() < 0.6
    if edge:
        paint += _lines(distance - road.half + 0.3, 0.08, pixel)
    if road.crossing:
        inside = np.abs(z - road.crossing - 0.5 * road.crossing_width)
        paint = paint * (inside > 0.5 * road.crossing_width)
    if road.zebra:
        middle_of = road.zebra + 1.6
        band = np.clip((1.6 - np.abs(z - middle_of)) / deep + 0.5, 0, 1)
        bars = _lines(np.mod(across, 1.1) - 0.55, 0.28, pixel)
        paint = np.maximum(paint * (1 - band), band * bars * (distance < road.half - 0.25))
    worn = np.clip(0.93 + 0.5 * grit + 0.35 * stain, 0, 1)
    ink = rgb(0.92, 0.78, 0.35) if middle == 0 and not edge else rgb(0.9, 0.9, 0.88)
    colour += (np.clip(paint, 0, 1) * worn)[..., None] * (ink - colour)
    return colour


def _paving(
    across: Array,
    z: Array,
    pixel: Array,
    deep: Array,
    grit: Array,
    stain: Array,
    colour: Array,
    slab: float,
) -> Array:
    value = 1 + 0.3 * grit + 0.12 * stain
    fade = np.clip(0.1 * slab / deep, 0, 1)
    joints = _lines(np.mod(across, slab) - 0.5 * slab, 0.02, pixel)
    joints = joints + _lines(np.mod(z, slab) - 0.5 * slab, 0.02, deep) * fade
    value = value - 0.28 * joints * np.clip(0.12 * slab / pixel, 0, 1)
    return value[..., None] * colour


def _grass(
    x: Array, z: Array, grit: Array, stain: Array, sharp: Array, rng: np.random.Generator
) -> Array:
    green = rgb(*rng.choice([(0.3, 0.46, 0.16), (0.36, 0.48, 0.2), (0.26, 0.42, 0.17)]))
    tuft = noise.sample(noise.tile(*noise.LEAF), x * 30, z * 16)
    value = 0.95 + 0.6 * grit + 0.75 * (tuft - 0.5) * np.clip(2.5 * sharp, 0.15, 1)
    colour = value[..., None] * green
    colour += np.clip(stain, -0.3, 0.4)[..., None] * rgb(0.16, 0.08, 0.02)
    if rng.random() < 0.4:
        flowers = (noise.sample(noise.tile(*noise.GRIT), x * 21, z * 21) > 0.93) & (sharp > 0.5)
        colour[flowers] = rgb(*rng.choice([(0.95, 0.9, 0.4), (0.95, 0.95, 0.95), (0.9, 0.5, 0.6)]))
    return colour


def _water(canvas: Canvas, v: Array, x: Array, z: Array, rng: np.random.Generator) -> Array:
    camera, light = canvas.camera, canvas.light
    texture = noise.tile(*noise.LEAF)
    waves = noise.sample(texture, x * 6 + rng.uniform(0, 512), z * 14) - 0.5
    swell = noise.sample(noise.tile(*noise.CLOUD), x * 5, z * 9) - 0.5
    ripple = waves * np.clip(6 / z, 0.14, 1) + 0.6 * swell * np.clip(30 / z, 0.3, 1)
    down = (v - camera.horizon) / camera.height
    mirror = np.exp(-np.clip(down + 0.12 * ripple, 0, 1) * 3.2)[..., None]
    deep = rgb(0.05, 0.2, 0.26) * (light.ambient + 0.6 * light.sun)
    sky = 0.5 * light.fog + 0.5 * light.zenith
    colour = deep + mirror * (sky * 0.95 - deep)
    colour = colour * (1 + 0.5 * ripple)[..., None]
    glint = np.clip(waves - 0.3, 0, 1) * np.clip(12 / z, 0.2, 1)
    return colour + glint[..., None] * (1.2 * light.sun)

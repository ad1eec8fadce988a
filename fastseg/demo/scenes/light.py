"""Hours and weathers: the colours of sun, sky and haze, and what the camera does to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .noise import Array

WEATHERS = ("clear", "golden", "overcast", "dusk", "night", "fog", "rain")
CHANCES = (0.34, 0.16, 0.14, 0.1, 0.09, 0.07, 0.1)


def rgb(r: float, g: float, b: float) -> Array:
    return np.array([r, g, b], np.float32)


# name: sky above, sky at the horizon, sun, ambient, haze per metre, clouds, least and most height
# of the sun in degrees. Sun and ambient multiply a surface's own colour.
LOOKS = {
    "clear": ((0.22, 0.46, 0.82), (0.72, 0.84, 0.95), (0.84, 0.79, 0.69), (0.54, 0.58, 0.65),
              0.0025, 0.45, 28, 65),
    "golden": ((0.36, 0.5, 0.74), (0.98, 0.8, 0.58), (1.0, 0.7, 0.42), (0.52, 0.49, 0.54),
               0.005, 0.5, 9, 24),
    "overcast": ((0.62, 0.67, 0.73), (0.83, 0.86, 0.88), (0.14, 0.14, 0.14), (0.86, 0.88, 0.9),
                 0.005, 0.9, 30, 60),
    "dusk": ((0.16, 0.2, 0.42), (0.93, 0.55, 0.42), (0.32, 0.18, 0.13), (0.5, 0.45, 0.55),
             0.005, 0.55, 4, 9),
    "night": ((0.02, 0.035, 0.1), (0.12, 0.15, 0.27), (0.07, 0.08, 0.11), (0.33, 0.36, 0.47),
              0.004, 0.3, 25, 50),
    "fog": ((0.7, 0.73, 0.76), (0.82, 0.84, 0.86), (0.08, 0.08, 0.07), (0.82, 0.83, 0.84),
            0.022, 0.2, 30, 60),
    "rain": ((0.42, 0.46, 0.52), (0.66, 0.7, 0.74), (0.04, 0.04, 0.04), (0.68, 0.71, 0.76),
             0.009, 1.0, 30, 60),
}  # fmt: skip


@dataclass(frozen=True)
class Light:
    weather: str
    zenith: Array
    fog: Array  # the colour of the horizon, into which distance fades
    sun: Array
    ambient: Array
    density: float  # haze per metre
    clouds: float  # 0..1
    direction: Array  # unit vector towards the sun

    @property
    def night(self) -> bool:
        return self.weather == "night"

    @property
    def lamps(self) -> bool:
        """Return whether windows and lamps are lit."""
        return self.weather in ("night", "dusk")

    @property
    def wet(self) -> bool:
        return self.weather == "rain"

    def on(self, normal: tuple[float, float, float]) -> Array:
        """Light (3,) that a surface's colour is multiplied by, from its normal."""
        facing = max(0.0, float(np.dot(self.direction, normal)))
        sky = 0.8 + 0.2 * normal[1]
        return self.ambient * sky + self.sun * facing

    def haze(self, z: float) -> float:
        return 1 - float(np.exp(-self.density * max(0.0, z - 4)))


def draw_light(rng: np.random.Generator) -> Light:
    weather = WEATHERS[rng.choice(len(WEATHERS), p=CHANCES)]
    zenith, horizon, sun, ambient, density, clouds, low, high = LOOKS[weather]
    height = np.radians(rng.uniform(low, high))
    # Mostly from behind or from the side: a sun in the picture is for the low hours.
    turn = np.radians(rng.uniform(-180, 180) if high < 30 else rng.uniform(100, 260))
    direction = rgb(np.cos(height) * np.sin(turn), np.sin(height), np.cos(height) * np.cos(turn))
    strength = rng.uniform(0.85, 1.1)
    tint = rgb(*rng.uniform(0.96, 1.04, 3))
    return Light(
        weather=weather,
        zenith=rgb(*zenith) * tint,
        fog=rgb(*horizon) * tint,
        sun=rgb(*sun) * strength,
        ambient=rgb(*ambient) * strength * rng.uniform(0.92, 1.05),
        density=density * rng.uniform(0.7, 1.4),
        clouds=clouds * rng.uniform(0.5, 1.1),
        direction=direction,
    )


def add_glows(
    image: Array, glows: list[tuple[float, float, float, tuple[float, float, float]]]
) -> None:
    """Add round lights (column, row, radius in pixels, colour) to image (H, W, 3), in place."""
    height, width = image.shape[:2]
    for x, y, radius, colour in glows:
        left, right = max(0, int(x - radius)), min(width, int(x + radius) + 1)
        top, bottom = max(0, int(y - radius)), min(height, int(y + radius) + 1)
        if left >= right or top >= bottom:
            continue
        dx = (np.arange(left, right, dtype=np.float32) + 0.5 - x) / radius
        dy = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y) / radius
        fall = np.clip(1 - np.sqrt(dx[None] ** 2 + dy[:, None] ** 2), 0, 1) ** 2.5
        image[top:bottom, left:right] += fall[..., None] * rgb(*colour)


def add_reflections(image: Array, road: NDArray[np.bool_], horizon: int, strength: float) -> None:
    """Mirror what stands above the horizon in a wet road, in place."""
    height = image.shape[0]
    rows = np.arange(max(horizon, 0), height)
    mirrored = image[np.clip(2 * horizon - rows, 0, height - 1)]
    small = Image.fromarray((np.clip(mirrored, 0, 1) * 255).astype(np.uint8))
    size = small.size
    # Ripples smear reflections downwards.
    small = small.resize((max(1, size[0] // 3), max(1, size[1] // 14)), Image.Resampling.BOX)
    blurred = np.asarray(small.resize(size, Image.Resampling.BILINEAR), np.float32) / 255
    area = image[rows[0] :]
    area += (road[rows[0] :] * np.float32(strength))[..., None] * (blurred - area)


def add_rain(image: Array, rng: np.random.Generator) -> None:
    """Slanted streaks over image (H, W, 3), in place."""
    height, width = image.shape[:2]
    layer = Image.new("L", (width, height))
    draw = ImageDraw.Draw(layer)
    slant, count = rng.uniform(-0.25, 0.25), int(rng.integers(60, 200))
    starts = rng.random((count, 2)) * (width, height)
    lengths = rng.uniform(0.02, 0.07, count) * height
    for (x, y), length in zip(starts.tolist(), lengths.tolist(), strict=True):
        draw.line([(x, y), (x + slant * length, y + length)], fill=70, width=max(1, height // 400))
    streaks = np.asarray(layer.filter(ImageFilter.BoxBlur(0.5)), np.float32) / 255
    image += streaks[..., None] * (0.9 - image)


def develop(image: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turn light (H, W, 3), about 0..1, into the camera's bytes: exposure, white balance, contrast,
    vignette, blur and sensor noise."""
    height, width = image.shape[:2]
    gain = rng.uniform(0.95, 1.14) * rng.uniform(0.94, 1.06, 3).astype(np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32) ** 2
    x = np.linspace(-1, 1, width, dtype=np.float32) ** 2
    vignette = 1 - np.float32(rng.uniform(0, 0.13)) * (y[:, None] + x[None])
    image = image * (gain * vignette[..., None])
    np.clip(image, 0, 1, out=image)
    # Brightness and contrast, as polynomials: powers would cost more than the rest together.
    middle = image * (1 - image)
    image += middle * np.float32(rng.uniform(-0.1, 0.3))
    image += middle * (image - np.float32(0.45)) * np.float32(rng.uniform(0.1, 0.5))
    strength = np.float32(rng.uniform(0.002, 0.017))
    radius = rng.uniform(-0.6, 0.9) * height / 512
    noise = rng.standard_normal((height, width, 1), np.float32)
    noise *= strength
    image += noise
    picture = Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8))
    if radius > 0.1:
        picture = picture.filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture)

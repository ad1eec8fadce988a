"""The pinhole camera, the picture being painted, and polygons drawn without jagged edges.

World axes in metres: x to the right, y up, z away from the eye; the eye is at (0, eye, 0) and the
ground is y = 0. Pixel centres are at half-integers. A picture is painted from far to near, each
object laying its colour, its class and its share of haze over what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .light import Light
from .noise import Array

Point = tuple[float, float]
Colour = tuple[float, float, float]
NEAR = 0.6  # metres; nothing is projected from nearer


@dataclass(frozen=True)
class Camera:
    width: int
    height: int
    focal: float  # pixels
    centre: float  # column of the vanishing point
    horizon: float  # row of the horizon
    eye: float  # metres above the ground

    def project(self, x: float, y: float, z: float) -> Point:
        scale = self.focal / max(z, NEAR)
        return self.centre + x * scale, self.horizon + (self.eye - y) * scale

    def fraction(self, metres: float, z: float) -> float:
        """Share of the picture's height that an upright length at distance z takes."""
        return metres * self.focal / (max(z, NEAR) * self.height)


@dataclass
class Canvas:
    """The picture, floats 0..1 (H, W, 3), its labels (H, W), and the lamps that glow at the end."""

    camera: Camera
    light: Light
    image: Array
    labels: NDArray[np.uint8]
    glows: list[tuple[float, float, float, Colour]] = field(default_factory=list)

    def window(
        self, x0: float, y0: float, x1: float, y1: float
    ) -> tuple[int, int, int, int] | None:
        """The whole pixels that a box of floats touches inside the frame, or None."""
        left, top = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
        right = min(self.camera.width, int(np.ceil(x1)))
        bottom = min(self.camera.height, int(np.ceil(y1)))
        return (left, top, right, bottom) if left < right and top < bottom else None

    def lay(
        self, box: tuple[int, int, int, int], rgb: Array, alpha: Array, label: int, z: float
    ) -> None:
        """Blend rgb (h, w, 3), multiplied by alpha (h, w) already, over the window `box`."""
        left, top, right, bottom = box
        haze = self.light.haze(z)
        area = self.image[top:bottom, left:right]
        area *= 1 - alpha[..., None]
        area += rgb * (1 - haze) + alpha[..., None] * (haze * self.light.fog)
        self.labels[top:bottom, left:right][alpha >= 0.5] = label

    def glow(self, at: Point, radius: float, colour: Colour) -> None:
        self.glows.append((at[0], at[1], radius, colour))


class Sprite:
    """Flat-coloured shapes of one object, drawn at twice the resolution and then averaged.

    Coordinates are those of the frame; colours are floats 0..1, lit already.
    """

    def __init__(self) -> None:
        self.shapes: list[tuple[list[Point], Colour]] = []

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.shapes.append((list(points), colour))

    def ellipse(self, at: Point, rx: float, ry: float, colour: Colour, points: int = 20) -> None:
        angles = np.linspace(0, 2 * np.pi, points, endpoint=False)
        xs, ys = at[0] + rx * np.cos(angles), at[1] + ry * np.sin(angles)
        self.polygon(list(zip(xs.tolist(), ys.tolist(), strict=True)), colour)

    def limb(self, a: Point, b: Point, wide_a: float, wide_b: float, colour: Colour) -> None:
        """A bar from a to b, of one width at a and another at b."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        scale = 0.5 / (np.hypot(dx, dy) + 1e-6)
        nx, ny = -dy * scale, dx * scale
        self.polygon(
            [
                (a[0] + nx * wide_a, a[1] + ny * wide_a),
                (b[0] + nx * wide_b, b[1] + ny * wide_b),
                (b[0] - nx * wide_b, b[1] - ny * wide_b),
                (a[0] - nx * wide_a, a[1] - ny * wide_a),
            ],
            colour,
        )

    def paint(self, canvas: Canvas, label: int, z: float, texture: Array | None = None) -> None:
        """Draw onto the canvas; `texture` (TILE, TILE), mean 0.5, roughens the colours."""
        xs = [x for points, _ in self.shapes for x, _ in points]
        ys = [y for points, _ in self.shapes for _, y in points]
        box = canvas.window(min(xs), min(ys), max(xs), max(ys))
        if box is None:
            return
        left, top, right, bottom = box
        # Four plain channels: red, green, blue and coverage. Pillow averages CMYK band by band,
        # so colours over an empty ground come out multiplied by their coverage.
        picture = Image.new("CMYK", (2 * (right - left), 2 * (bottom - top)))
        draw = ImageDraw.Draw(picture)
        for points, colour in self.shapes:
            r, g, b = (min(255, max(0, int(255 * c + 0.5))) for c in colour)
            # Pillow's pixel centres are at integers.
            corners = [(2 * (x - left) - 0.5, 2 * (y - top) - 0.5) for x, y in points]
            draw.polygon(corners, fill=(r, g, b, 255))
        flat = np.asarray(picture.reduce(2), dtype=np.float32) * np.float32(1 / 255)
        rgb, alpha = flat[..., :3], flat[..., 3]
        if texture is not None:
            rows, cols = alpha.shape
            rough = texture[top % 256 : top % 256 + rows, left % 256 : left % 256 + cols]
            if rough.shape == alpha.shape:
                rgb = rgb * (0.9 + 0.2 * rough[..., None])
        canvas.lay(box, rgb, alpha, label, z)

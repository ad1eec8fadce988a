"""Traffic signs and traffic lights on their posts, facing the eye."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import noise
from .camera import Canvas, Colour, Point, Sprite
from .classes import SIGN
from .light import rgb

RED, BLUE, WHITE = (0.8, 0.1, 0.1), (0.1, 0.3, 0.7), (0.94, 0.94, 0.93)
YELLOW, GREEN, BLACK = (0.96, 0.78, 0.12), (0.08, 0.42, 0.26), (0.07, 0.07, 0.08)
KINDS = ("stop", "limit", "no entry", "yield", "warning", "blue", "parking", "board", "lights")
POST = 0.16  # metres wide


@dataclass(frozen=True)
class Sign:
    kind: str
    x: float
    z: float
    top: float  # height of the middle of the board, metres
    radius: float  # of the board, metres
    seed: int


def draw_sign(sign: Sign, canvas: Canvas) -> None:
    camera, light = canvas.camera, canvas.light
    rng = np.random.Generator(np.random.PCG64(sign.seed))
    # Signs throw headlights and street lamps back.
    lit = light.on((0, 0, -1)) * (1.9 if light.night else 1.15)
    scale = camera.focal / sign.z
    foot = camera.project(sign.x, 0, sign.z)
    x, y = camera.project(sign.x, sign.top, sign.z)
    size = sign.radius * scale
    sprite = Sprite()

    def colour(base: Colour) -> Colour:
        tone = rgb(*base) * lit
        return float(tone[0]), float(tone[1]), float(tone[2])

    def ring(radius: float, count: int, turn: float) -> list[Point]:
        angles = turn + np.linspace(0, 2 * np.pi, count, endpoint=False)
        return [(x + size * radius * np.cos(a), y + size * radius * np.sin(a)) for a in angles]

    def disc(radius: float, base: Colour) -> None:
        sprite.polygon(ring(radius, 24, 0), colour(base))

    def rect(x0: float, x1: float, y0: float, y1: float, base: Colour) -> None:
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        sprite.polygon([(x + size * a, y + size * b) for a, b in corners], colour(base))

    post = POST * scale
    grey = (0.5, 0.51, 0.53) if sign.kind != "lights" else (0.16, 0.17, 0.17)
    sprite.limb(foot, (x, y), post, post, colour(grey))
    dark = (foot[0] + 0.25 * post, foot[1]), (x + 0.25 * post, y)
    sprite.limb(*dark, 0.4 * post, 0.4 * post, colour((0.33, 0.34, 0.36)))
    if sign.kind == "stop":
        sprite.polygon(ring(1.05, 8, np.pi / 8), colour(WHITE))
        sprite.polygon(ring(0.95, 8, np.pi / 8), colour(RED))
        for i in range(4):
            rect(-0.62 + 0.34 * i, -0.4 + 0.34 * i, -0.22, 0.22, WHITE)
    elif sign.kind == "limit":
        disc(1, RED)
        disc(0.78, WHITE)
        for a in (-0.42, 0.08):
            rect(a, a + 0.34, -0.36, 0.36, BLACK)
            rect(a + 0.11, a + 0.23, -0.22, 0.22, WHITE)
    elif sign.kind == "no entry":
        disc(1, WHITE)
        disc(0.95, RED)
        rect(-0.66, 0.66, -0.17, 0.17, WHITE)
    elif sign.kind in ("yield", "warning"):
        turn = np.pi / 2 if sign.kind == "yield" else -np.pi / 2
        sprite.polygon(ring(1.2, 3, turn), colour(RED))
        sprite.polygon(ring(0.78, 3, turn), colour(WHITE if rng.random() < 0.6 else YELLOW))
        if sign.kind == "warning":
            rect(-0.08, 0.08, -0.32, 0.1, BLACK)
            rect(-0.08, 0.08, 0.18, 0.32, BLACK)
    elif sign.kind == "blue":
        disc(1, WHITE)
        disc(0.94, BLUE)
        rect(-0.11, 0.11, -0.3, 0.6, WHITE)
        head = [(-0.42, -0.2), (0, -0.68), (0.42, -0.2)]
        sprite.polygon([(x + size * a, y + size * b) for a, b in head], colour(WHITE))
    elif sign.kind == "parking":
        rect(-0.9, 0.9, -0.9, 0.9, WHITE)
        rect(-0.84, 0.84, -0.84, 0.84, BLUE)
        rect(-0.36, -0.1, -0.6, 0.62, WHITE)
        rect(-0.1, 0.38, -0.6, 0.08, WHITE)
        rect(-0.1, 0.14, -0.36, -0.14, BLUE)
    elif sign.kind == "board":
        base = GREEN if rng.random() < 0.5 else BLUE
        rect(-1.7, 1.7, -0.85, 0.85, WHITE)
        rect(-1.64, 1.64, -0.79, 0.79, base)
        for row in (-0.5, -0.02, 0.44):
            end = rng.uniform(0.1, 0.9)
            rect(-1.4, end, row, row + 0.22, WHITE)
            rect(1.1, 1.4, row, row + 0.22, WHITE)
    else:
        rect(-0.55, 0.55, -1.35, 1.35, (0.13, 0.14, 0.14))
        lit_one = int(rng.integers(3))
        lamps = ((0.95, 0.15, 0.1), (1.0, 0.72, 0.15), (0.2, 0.9, 0.45))
        for i, lamp in enumerate(lamps):
            at = (x, y + size * (i - 1) * 0.82)
            if i == lit_one:
                sprite.ellipse(at, 0.36 * size, 0.36 * size, lamp)
                canvas.glow(at, 1.1 * size, (0.3 * lamp[0], 0.3 * lamp[1], 0.3 * lamp[2]))
            else:
                dim = (0.2 * lamp[0], 0.2 * lamp[1], 0.2 * lamp[2])
                sprite.ellipse(at, 0.36 * size, 0.36 * size, colour(dim))
    sprite.paint(canvas, SIGN, sign.z, noise.tile(*noise.STAIN))

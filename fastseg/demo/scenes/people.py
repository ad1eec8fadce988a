"""People walking and standing, in all sorts of clothes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import noise
from .camera import Canvas, Colour, Point, Sprite
from .classes import PERSON
from .light import rgb

SKIN: tuple[Colour, ...] = (
    (0.9, 0.72, 0.6),
    (0.78, 0.58, 0.44),
    (0.55, 0.38, 0.27),
    (0.36, 0.24, 0.18),
)
HAIR: tuple[Colour, ...] = (
    (0.1, 0.08, 0.07),
    (0.3, 0.19, 0.1),
    (0.62, 0.46, 0.22),
    (0.5, 0.2, 0.1),
    (0.7, 0.7, 0.7),
)
TOPS: tuple[Colour, ...] = (
    (0.8, 0.2, 0.2),
    (0.18, 0.32, 0.6),
    (0.9, 0.88, 0.84),
    (0.9, 0.7, 0.2),
    (0.22, 0.5, 0.36),
    (0.16, 0.16, 0.2),
    (0.6, 0.36, 0.6),
    (0.85, 0.5, 0.3),
    (0.5, 0.68, 0.82),
    (0.6, 0.5, 0.4),
)
BOTTOMS: tuple[Colour, ...] = (
    (0.16, 0.2, 0.34),
    (0.12, 0.12, 0.14),
    (0.5, 0.43, 0.33),
    (0.34, 0.36, 0.4),
    (0.4, 0.2, 0.22),
)
UMBRELLAS: tuple[Colour, ...] = (
    (0.75, 0.15, 0.2),
    (0.15, 0.2, 0.45),
    (0.9, 0.75, 0.2),
    (0.1, 0.1, 0.12),
    (0.3, 0.6, 0.55),
)


@dataclass(frozen=True)
class Person:
    x: float
    z: float
    height: float
    umbrella: bool
    seed: int


def draw_person(person: Person, canvas: Canvas) -> None:
    camera, light = canvas.camera, canvas.light
    rng = np.random.Generator(np.random.PCG64(person.seed))
    lit = light.on((0, 0.15, -0.99)) * (1.25 if light.night else 1.0)
    shaded = light.ambient * 0.9
    foot_x, foot_y = camera.project(person.x, 0, person.z)
    unit = person.height * camera.focal / person.z
    mirror = 1.0 if rng.random() < 0.5 else -1.0
    dark_side = 1.0 if light.direction[0] < 0 else -1.0
    sprite = Sprite()

    def at(x: float, y: float) -> Point:
        return foot_x + mirror * x * unit, foot_y - y * unit

    def pick(colours: tuple[Colour, ...], shade: float = 1.0, dark: bool = False) -> Colour:
        colour = rgb(*colours[rng.integers(len(colours))]) * (shaded if dark else lit) * shade
        return float(colour[0]), float(colour[1]), float(colour[2])

    def darker(colour: Colour, by: float = 0.72) -> Colour:
        return colour[0] * by, colour[1] * by, colour[2] * by

    skin, hair, top, bottom = pick(SKIN), pick(HAIR), pick(TOPS), pick(BOTTOMS)
    shoes = pick(BOTTOMS, 0.6)
    stride = rng.uniform(0.0, 0.13)
    dress, coat = rng.random() < 0.22, rng.random() < 0.3
    wide = rng.uniform(0.115, 0.14)
    # The far leg and arm first, then the near ones.
    for side, shade in ((-1, 0.78), (1, 1.0)):
        hip, foot = at(side * 0.035, 0.5), at(side * (stride + 0.03), 0.03)
        leg = skin if dress else bottom
        sprite.limb(hip, foot, 0.105 * unit, 0.065 * unit, darker(leg, shade))
        toe = at(side * (stride + 0.03) + 0.05, 0.012)
        sprite.limb((foot[0], foot[1] + 0.015 * unit), toe, 0.05 * unit, 0.035 * unit, shoes)
    swing = stride * 0.9
    sleeve = rng.random() < 0.65
    elbow, hand = at(-wide - swing * 0.5, 0.63), at(-wide - swing, 0.47)
    sprite.limb(at(-wide + 0.02, 0.8), elbow, 0.06 * unit, 0.05 * unit, darker(top, 0.8))
    sprite.limb(elbow, hand, 0.05 * unit, 0.04 * unit, darker(top if sleeve else skin, 0.8))
    if rng.random() < 0.2:
        pack = [at(-wide - 0.08, 0.55), at(-wide - 0.07, 0.77), at(0, 0.8), at(0, 0.54)]
        sprite.polygon(pack, pick(TOPS, 0.7))
    hem = 0.3 if dress else 0.36 if coat else 0.46
    flare = 0.15 if dress else 0.115
    torso = [at(-wide, 0.81), at(-0.09, 0.6), at(-flare, hem), at(flare, hem), at(0.09, 0.6)]
    torso += [at(wide, 0.81), at(0.04, 0.85), at(-0.04, 0.85)]
    sprite.polygon(torso, top)
    shadow_side = dark_side * mirror
    fold = [at(shadow_side * wide, 0.81), at(shadow_side * 0.09, 0.6), at(shadow_side * flare, hem)]
    fold += [at(shadow_side * 0.035, hem), at(shadow_side * 0.03, 0.81)]
    sprite.polygon(fold, darker(top))
    if not dress and not coat:
        sprite.limb(at(-0.1, 0.475), at(0.1, 0.475), 0.03 * unit, 0.03 * unit, darker(bottom, 0.8))
    raised = person.umbrella
    elbow = at(wide + 0.06, 0.66) if raised else at(wide + swing * 0.5, 0.63)
    hand = at(wide - 0.01, 0.76) if raised else at(wide + swing, 0.47)
    sprite.limb(at(wide - 0.02, 0.8), elbow, 0.065 * unit, 0.05 * unit, top)
    sprite.limb(elbow, hand, 0.05 * unit, 0.042 * unit, top if sleeve else skin)
    if not raised and rng.random() < 0.25:
        bag = (hand[0] - 0.05 * unit, hand[1]), (hand[0] + 0.05 * unit, hand[1])
        low = hand[1] + 0.13 * unit
        corners = [bag[0], bag[1], (bag[1][0] + 0.01 * unit, low), (bag[0][0] - 0.01 * unit, low)]
        sprite.polygon(corners, pick(TOPS, 0.8))
    head = at(0.01, 0.925)
    long_hair = rng.random() < 0.4
    back_view = rng.random() < 0.35
    if long_hair:
        locks = [at(-0.068, 0.95), at(-0.08, 0.8), at(0.05, 0.8), at(0.06, 0.95)]
        sprite.polygon(locks, darker(hair, 0.85))
    sprite.limb(at(0, 0.83), at(0, 0.9), 0.06 * unit, 0.06 * unit, darker(skin, 0.85))
    sprite.ellipse(head, 0.062 * unit, 0.078 * unit, hair if back_view else skin)
    if not back_view:
        cap = [at(-0.062, 0.9), at(-0.07, 0.965), at(-0.03, 1.005), at(0.04, 1.005)]
        cap += [at(0.072, 0.965), at(0.06, 0.945), at(0.0, 0.965)]
        sprite.polygon(cap, hair)
    if rng.random() < 0.15:
        hat = [at(-0.1, 0.965), at(-0.06, 0.97), at(-0.05, 1.03), at(0.05, 1.03), at(0.07, 0.97)]
        sprite.polygon([*hat, at(0.1, 0.965)], pick(TOPS, 0.75))
    if person.umbrella:
        _umbrella(sprite, hand, unit, pick(UMBRELLAS), darker)
    sprite.paint(canvas, PERSON, person.z, noise.tile(*noise.STAIN))


def _umbrella(
    sprite: Sprite, hand: Point, unit: float, colour: Colour, darker: Callable[..., Colour]
) -> None:
    tip = (hand[0], hand[1] - 0.42 * unit)
    sprite.limb(hand, tip, 0.02 * unit, 0.02 * unit, (0.15, 0.15, 0.15))
    for start, end, shade in ((0.0, 1.0, 1.0), (0.0, 0.3, 0.75), (0.55, 0.8, 0.86)):
        angles = np.pi * np.linspace(start, end, 12)
        rim = [
            (tip[0] - 0.34 * unit * np.cos(a), tip[1] + (0.2 - 0.24 * np.sin(a)) * unit)
            for a in angles
        ]
        middle = (tip[0], tip[1] + 0.17 * unit)
        sprite.polygon([*rim, middle], darker(colour, shade))

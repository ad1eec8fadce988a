"""Cars and buses: small solids of flat faces, seen from any side in true perspective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import noise
from .camera import NEAR, Canvas, Colour, Sprite
from .classes import BUS, CAR
from .light import rgb

PAINTS: tuple[Colour, ...] = (
    (0.72, 0.12, 0.12),
    (0.15, 0.28, 0.55),
    (0.86, 0.86, 0.86),
    (0.55, 0.57, 0.6),
    (0.12, 0.12, 0.14),
    (0.88, 0.7, 0.2),
    (0.2, 0.42, 0.36),
    (0.6, 0.75, 0.85),
    (0.78, 0.42, 0.2),
    (0.32, 0.16, 0.2),
)
BUS_PAINTS: tuple[Colour, ...] = (
    (0.8, 0.15, 0.13),
    (0.9, 0.66, 0.14),
    (0.16, 0.45, 0.62),
    (0.2, 0.5, 0.3),
    (0.86, 0.86, 0.82),
)
GLASS = rgb(0.16, 0.2, 0.25)
RUBBER = rgb(0.07, 0.07, 0.075)

Vec = tuple[float, float, float]


@dataclass(frozen=True)
class Vehicle:
    """A car or a bus standing at (x, z) in metres; yaw 0 drives away from the eye."""

    bus: bool
    x: float
    z: float
    yaw: float
    paint: Colour
    shape: int

    @property
    def size(self) -> Vec:
        """Length, width and height in metres."""
        if self.bus:
            return 10.0, 2.5, 3.1
        return ((4.4, 1.85, 1.5), (4.0, 1.8, 1.55), (4.6, 1.95, 1.78))[self.shape]

    def corners(self) -> list[tuple[float, float]]:
        """The footprint on the ground as (x, z)."""
        length, width, _ = self.size
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return [
            (self.x + a * s + b * c, self.z + a * c - b * s)
            for a, b in (
                (-length / 2, -width / 2),
                (length / 2, -width / 2),
                (length / 2, width / 2),
                (-length / 2, width / 2),
            )
        ]


def draw_vehicle_plan(
    rng: np.random.Generator, x: float, z: float, yaw: float, bus: bool
) -> Vehicle:
    paints = BUS_PAINTS if bus else PAINTS
    base = np.array(paints[rng.integers(len(paints))]) * rng.uniform(0.85, 1.12)
    colour = (float(base[0]), float(base[1]), float(base[2]))
    return Vehicle(bus, x, z, yaw, colour, int(rng.integers(3)))


class _Painter:
    """Painter of a vehicle: from points (along, up, across) to polygons of its sprite."""

    def __init__(self, vehicle: Vehicle, canvas: Canvas) -> None:
        self.v, self.canvas, self.sprite = vehicle, canvas, Sprite()
        self.c, self.s = float(np.cos(vehicle.yaw)), float(np.sin(vehicle.yaw))

    def world(self, p: Vec) -> Vec:
        along, up, across = p
        return (
            self.v.x + along * self.s + across * self.c,
            up,
            self.v.z + along * self.c - across * self.s,
        )

    def seen(self, points: Sequence[Vec]) -> tuple[bool, Vec]:
        """Return whether the outside of a face shows (corners anticlockwise), its normal."""
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = (self.world(p) for p in points[:3])
        px, py, pz, qx, qy, qz = bx - ax, by - ay, bz - az, cx - bx, cy - by, cz - bz
        # x right, y up, z away is a left-handed frame: the cross product points inwards.
        normal = (qy * pz - py * qz, qz * px - pz * qx, qx * py - px * qy)
        long = sum(n * n for n in normal) ** 0.5 + 1e-9
        view = normal[0] * ax + normal[1] * (ay - self.canvas.camera.eye) + normal[2] * az
        return view < 0, (normal[0] / long, normal[1] / long, normal[2] / long)

    def face(self, points: Sequence[Vec], colour: np.ndarray, lit: np.ndarray | float) -> None:
        tone = (colour * lit).tolist()
        project = self.canvas.camera.project
        self.sprite.polygon([project(*self.world(p)) for p in points], (tone[0], tone[1], tone[2]))

    def lamp(self, p: Vec, colour: Colour, metres: float) -> None:
        x, y, z = self.world(p)
        if z > NEAR:
            camera = self.canvas.camera
            self.canvas.glow(camera.project(x, y, z), metres * camera.focal / z, colour)


def _between(face: Sequence[Vec], a: float, b: float) -> Vec:
    """The point at share a along (corner 0 to 1) and share b up (corner 0 to 3) of a quad."""
    w0, w1, w2, w3 = (1 - a) * (1 - b), a * (1 - b), a * b, (1 - a) * b
    p, q, r, s = face
    return (
        w0 * p[0] + w1 * q[0] + w2 * r[0] + w3 * s[0],
        w0 * p[1] + w1 * q[1] + w2 * r[1] + w3 * s[1],
        w0 * p[2] + w1 * q[2] + w2 * r[2] + w3 * s[2],
    )


def _part(face: Sequence[Vec], a0: float, a1: float, b0: float, b1: float) -> list[Vec]:
    return [_between(face, a, b) for a, b in ((a0, b0), (a1, b0), (a1, b1), (a0, b1))]


def _box_faces(low: Sequence[float], high: Sequence[float], y0: float, y1: float) -> dict:
    """Quads of a frustum; low and high are (back, front, half width) at y0 and y1."""
    a, b, w = low
    c, d, v = high
    return {
        "back": [(a, y0, -w), (a, y0, w), (c, y1, v), (c, y1, -v)],
        "front": [(b, y0, w), (b, y0, -w), (d, y1, -v), (d, y1, v)],
        "left": [(b, y0, -w), (a, y0, -w), (c, y1, -v), (d, y1, -v)],
        "right": [(a, y0, w), (b, y0, w), (d, y1, v), (c, y1, v)],
        "top": [(c, y1, -v), (c, y1, v), (d, y1, v), (d, y1, -v)],
    }


def _wheels(painter: _Painter, places: Sequence[float], radius: float, half: float) -> None:
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for side in (-1, 1):
        for along in places:
            rim = [
                (along + radius * np.cos(a), radius + radius * np.sin(a), side * half)
                for a in (angles if side > 0 else -angles)
            ]
            if painter.seen(rim)[0]:
                painter.face(rim, RUBBER, 1.0)
                hub = [
                    (along + 0.55 * (p[0] - along), radius + 0.55 * (p[1] - radius), p[2])
                    for p in rim
                ]
                painter.face(hub, rgb(0.5, 0.5, 0.52), painter.canvas.light.ambient)


def _ends(painter: _Painter, faces: dict, bus: bool) -> None:
    """Lamps, plates and grilles of front and back."""
    light = painter.canvas.light
    ambient = light.ambient
    for name in ("front", "back"):
        face = faces[name]
        if not painter.seen(face)[0]:
            continue
        low, high = (0.16, 0.26) if bus else (0.5, 0.8)
        lamp = rgb(0.95, 0.93, 0.82) if name == "front" else rgb(0.75, 0.06, 0.05)
        shine = 1.0 if light.lamps else ambient * 1.15
        if not bus:
            painter.face(_part(face, 0.0, 1.0, 0.0, 0.24), rgb(0.13, 0.13, 0.14), ambient)
            painter.face(_part(face, 0.34, 0.66, 0.28, 0.52), rgb(0.9, 0.9, 0.85), ambient)
            if name == "front":
                grille = _part(face, 0.27, 0.73, 0.56, 0.78)
                painter.face(grille, rgb(0.1, 0.1, 0.11), ambient)
        for a in (0.05, 0.77):
            painter.face(_part(face, a, a + 0.18, low, high), lamp, shine)
            if light.lamps:
                colour = (0.9, 0.8, 0.55) if name == "front" else (0.55, 0.05, 0.04)
                at = _between(face, a + 0.09, 0.5 * (low + high))
                painter.lamp(at, colour, 1.1 if name == "front" else 0.5)


def _draw_car(painter: _Painter) -> None:
    vehicle, light = painter.v, painter.canvas.light
    length, width, height = vehicle.size
    half, paint = width / 2, rgb(*vehicle.paint)
    belt = 0.62 * height
    body = _box_faces(
        (-length / 2, length / 2, half), (-length / 2 + 0.06, length / 2 - 0.12, half), 0.22, belt
    )
    # Where the cabin stands on the body, and its roof: a saloon, a hatchback, an estate on stilts.
    low, high = (
        ((-1.75, 1.1, half - 0.06), (-1.1, 0.35, half - 0.3)),
        ((-1.95, 1.0, half - 0.06), (-1.6, 0.3, half - 0.28)),
        ((-2.25, 1.15, half - 0.06), (-2.05, 0.5, half - 0.24)),
    )[vehicle.shape]
    cabin = _box_faces(low, high, belt, height)
    for name in ("top", "back", "front", "left", "right"):
        seen, normal = painter.seen(body[name])
        if not seen:
            continue
        lit = light.on(normal)
        if name in ("left", "right"):
            painter.face(body[name], paint * 0.92, lit)
            painter.face(_part(body[name], 0, 1, 0.0, 0.14), rgb(0.1, 0.1, 0.1), light.ambient)
            painter.face(_part(body[name], 0.02, 0.98, 0.62, 0.68), paint * 1.15, lit)
            for a in (0.38, 0.64):
                painter.face(_part(body[name], a, a + 0.006, 0.15, 0.98), paint * 0.5, lit)
        else:
            painter.face(body[name], paint, lit * (1.1 if name == "top" else 1))
    _ends(painter, body, bus=False)
    _wheels(painter, (-0.31 * length, 0.31 * length), 0.34, half + 0.01)
    sky = 0.5 * light.zenith + 0.5 * light.fog
    for name in ("back", "front", "left", "right", "top"):
        seen, normal = painter.seen(cabin[name])
        if not seen:
            continue
        face, lit = cabin[name], light.on(normal)
        painter.face(face, paint * (1.08 if name == "top" else 0.95), lit)
        if name == "top":
            continue
        glass = (GLASS * light.ambient * 0.9 + 0.28 * sky * max(0.2, normal[1] + 0.45)).tolist()
        tone = rgb(*glass)
        if name in ("left", "right"):
            for a0, a1 in ((0.08, 0.46), (0.51, 0.92)):
                painter.face(_part(face, a0, a1, 0.1, 0.86), tone, 1.0)
        else:
            painter.face(_part(face, 0.07, 0.93, 0.08, 0.88), tone, 1.0)
            painter.face(_part(face, 0.15, 0.35, 0.1, 0.86), tone * 1.22, 1.0)


def _draw_bus(painter: _Painter) -> None:
    vehicle, light = painter.v, painter.canvas.light
    length, width, height = vehicle.size
    half, paint = width / 2, rgb(*vehicle.paint)
    ends = (-length / 2, length / 2, half)
    body = _box_faces(ends, ends, 0.3, height)
    sky = 0.5 * light.zenith + 0.5 * light.fog
    lit_glass = rgb(0.95, 0.85, 0.6) * 0.8
    glass = lit_glass if light.lamps else GLASS * light.ambient + 0.16 * sky
    cream = rgb(0.88, 0.86, 0.8)
    for name in ("top", "back", "front", "left", "right"):
        seen, normal = painter.seen(body[name])
        if not seen:
            continue
        face, lit = body[name], light.on(normal)
        painter.face(face, paint, lit)
        if name == "top":
            continue
        painter.face(_part(face, 0, 1, 0.0, 0.1), rgb(0.12, 0.12, 0.13), light.ambient)
        painter.face(_part(face, 0, 1, 0.9, 1.0), cream, lit)
        if name in ("left", "right"):
            painter.face(_part(face, 0, 1, 0.3, 0.34), cream, lit)
            doors = (0.08, 0.55) if name == "right" else ()
            for i in range(8):
                a = 0.02 + i * 0.122
                painter.face(_part(face, a, a + 0.108, 0.42, 0.82), glass, 1.0)
            for a in doors:
                painter.face(_part(face, a, a + 0.1, 0.08, 0.82), glass * 0.8, 1.0)
        else:
            b0, b1 = (0.34, 0.8) if name == "front" else (0.5, 0.8)
            painter.face(_part(face, 0.06, 0.94, b0, b1), glass, 1.0)
            sign = rgb(1.0, 0.72, 0.2) if light.lamps else rgb(0.85, 0.65, 0.2) * light.ambient
            painter.face(_part(face, 0.2, 0.8, 0.83, 0.93), rgb(0.06, 0.06, 0.06), 1.0)
            painter.face(_part(face, 0.3, 0.7, 0.855, 0.905), sign, 1.0)
    _ends(painter, body, bus=True)
    _wheels(painter, (-0.3 * length, 0.32 * length), 0.48, half + 0.01)


def draw_vehicle(vehicle: Vehicle, canvas: Canvas) -> None:
    if min(z for _, z in vehicle.corners()) < NEAR + 0.4:
        return
    painter = _Painter(vehicle, canvas)
    (_draw_bus if vehicle.bus else _draw_car)(painter)
    if painter.sprite.shapes:
        label = BUS if vehicle.bus else CAR
        painter.sprite.paint(canvas, label, vehicle.z, noise.tile(*noise.STAIN))

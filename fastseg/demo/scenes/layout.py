"""Layout of a scene: a place and everything in it, before anything is painted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from .buildings import Building, draw_building_plan, draw_front, draw_side
from .camera import Camera, Canvas
from .classes import GRASS, SIDEWALK, WATER
from .ground import Road
from .people import Person, draw_person
from .signs import KINDS, Sign, draw_sign
from .trees import Tree, draw_tree, draw_tree_plan
from .vehicles import Vehicle, draw_vehicle, draw_vehicle_plan

PLACES = ("street", "suburb", "country", "waterfront")
CHANCES = (0.38, 0.22, 0.18, 0.22)

# Least share of the picture's height: what would come out smaller is left out, since a label of a
# few pixels teaches nothing.
LEAST_PERSON, LEAST_CAR, LEAST_BUS, LEAST_BOARD = 0.1, 0.06, 0.1, 0.06

Drawing = tuple[float, Callable[[Canvas], None]]


@dataclass
class Layout:
    place: str
    camera: Camera
    road: Road
    far: tuple[str, ...]  # what closes the horizon, from far to near
    buildings: list[Building] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    vehicles: list[Vehicle] = field(default_factory=list)
    people: list[Person] = field(default_factory=list)
    signs: list[Sign] = field(default_factory=list)
    taken: list[tuple[float, float, float]] = field(default_factory=list)

    def free(self, x: float, z: float, radius: float) -> bool:
        """Take a disc on the ground if it is empty and before all buildings; return whether."""
        if any(b.z0 - 1 < z < b.z1 + 1 and b.beyond(x) for b in self.buildings):
            return False
        if any((x - a) ** 2 + (z - b) ** 2 < (radius + r) ** 2 for a, b, r in self.taken):
            return False
        self.taken.append((x, z, radius))
        return True

    def drawings(self) -> list[Drawing]:
        """Everything that stands, as (distance, how to draw it), far to near."""
        drawings: list[Drawing] = []
        # What stands in the street is nearer than the wall beside it and farther than the next
        # front: a building is painted in two goes.
        drawings += [(b.z1, partial(draw_side, b)) for b in self.buildings]
        drawings += [(b.z0, partial(draw_front, b)) for b in self.buildings]
        drawings += [(t.z, partial(draw_tree, t)) for t in self.trees]
        drawings += [(v.z, partial(draw_vehicle, v)) for v in self.vehicles]
        drawings += [(p.z, partial(draw_person, p)) for p in self.people]
        drawings += [(s.z, partial(draw_sign, s)) for s in self.signs]
        return sorted(drawings, key=lambda item: -item[0])


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 30))


def draw_layout(rng: np.random.Generator, size: tuple[int, int], rain: bool) -> Layout:
    height, width = size
    place = PLACES[rng.choice(len(PLACES), p=CHANCES)]
    camera = Camera(
        width=width,
        height=height,
        focal=height * rng.uniform(0.78, 1.05),
        centre=width * rng.uniform(0.34, 0.66),
        horizon=height * rng.uniform(0.36, 0.56),
        eye=rng.uniform(1.6, 3.6),
    )
    road = _draw_road(rng, place)
    layout = Layout(place, camera, road, _draw_far(rng, place))
    if place == "street":
        for side in (-1, 1):
            _add_row(layout, rng, side, (8, 26), 0.93)
    elif place == "waterfront":
        side = 1 if road.verge[0] == WATER else -1
        _add_row(layout, rng, side, (8, 18), 0.8)
    elif place == "suburb":
        for side in (-1, 1):
            _add_houses(layout, rng, side)
    _add_vehicles(layout, rng)
    _add_signs(layout, rng)
    _add_trees(layout, rng)
    _add_people(layout, rng, rain)
    return layout


def _draw_road(rng: np.random.Generator, place: str) -> Road:
    lanes = 1 if place in ("country", "suburb") else int(rng.integers(1, 3))
    half = lanes * rng.uniform(3.0, 3.5) + 0.4
    town = place in ("street", "waterfront")
    bend = rng.uniform(-1, 1) * {"street": 0.0008, "waterfront": 0.002}.get(place, 0.005)
    walks = [float(rng.uniform(2.2, 4.5) if town else rng.uniform(1.5, 2.4)) for _ in range(2)]
    if place == "country":
        walks = [w if rng.random() < 0.15 else 0.0 for w in walks]
    verge = [SIDEWALK if place == "street" else GRASS] * 2
    if place == "waterfront":
        verge = [GRASS if rng.random() < 0.5 else SIDEWALK] * 2
        verge[int(rng.integers(2))] = WATER
    elif place == "country" and rng.random() < 0.4:
        verge[int(rng.integers(2))] = WATER
    crossing = rng.uniform(16, 34) if town and WATER not in verge and rng.random() < 0.4 else 0.0
    zebra = crossing - 4.5 if crossing else (rng.uniform(6, 22) if rng.random() < 0.3 else 0.0)
    return Road(
        centre=float(rng.uniform(-1, 1) * (half + 0.5)),
        bend=float(bend),
        half=float(half),
        lanes=lanes,
        walk=(walks[0], walks[1]),
        verge=(verge[0], verge[1]),
        crossing=float(crossing),
        crossing_width=float(rng.uniform(6, 9)),
        zebra=float(zebra) if place != "country" else 0.0,
    )


def _draw_far(rng: np.random.Generator, place: str) -> tuple[str, ...]:
    options = {
        "street": (("skyline",), ("woods",), ("mountains", "skyline"), ("mountains",)),
        "suburb": (("woods",), ("mountains", "woods"), ("mountains",)),
        "country": (("mountains", "woods"), ("mountains",), ("mountains",), ("woods",)),
        "waterfront": (("mountains",), ("mountains", "skyline"), ("skyline",), ("woods",)),
    }[place]
    return options[rng.integers(len(options))]


def _beside_crossing(road: Road, z0: float, z1: float) -> bool:
    margin = max(road.walk)
    near, far = road.crossing - margin, road.crossing + road.crossing_width + margin
    return not road.crossing or z1 < near or z0 > far


def _add_row(
    layout: Layout, rng: np.random.Generator, side: int, heights: tuple[float, float], full: float
) -> None:
    """A row of town houses along the pavement."""
    road, z = layout.road, rng.uniform(-6, 6)
    setback = rng.uniform(0.2, 1.5) if road.verge[side > 0] == SIDEWALK else rng.uniform(2, 6)
    while z < 105:
        length = rng.uniform(9, 20)
        z0, z1 = z, z + length
        z = z1 + (0.0 if rng.random() < 0.7 else rng.uniform(1, 5))
        if z1 < 2 or rng.random() > full or not _beside_crossing(road, z0, z1):
            continue
        # The nearest corner to the road, whichever way it bends.
        edges = [side * road.edge(side, max(at, 0.0)) for at in (z0, z1)]
        inner = side * (max(edges) + setback)
        outer = inner + side * rng.uniform(9, 14)
        box = (min(inner, outer), max(inner, outer), z0, z1)
        layout.buildings.append(draw_building_plan(rng, box, rng.uniform(*heights)))


def _add_houses(layout: Layout, rng: np.random.Generator, side: int) -> None:
    road, z = layout.road, rng.uniform(4, 14)
    while z < 75:
        wide, deep = rng.uniform(8, 13), rng.uniform(7, 10)
        gap = rng.uniform(3, 9)
        inner = side * (max(side * road.edge(side, z), side * road.edge(side, z + deep)) + gap)
        box = (min(inner, inner + side * wide), max(inner, inner + side * wide), z, z + deep)
        if rng.random() < 0.85:
            plan = draw_building_plan(rng, box, rng.uniform(2.8, 6.5), house=True)
            layout.buildings.append(plan)
        z += deep + rng.uniform(4, 14)


def _add_vehicles(layout: Layout, rng: np.random.Generator) -> None:
    road = layout.road
    busy = rng.random()
    lane = road.half / road.lanes
    if road.crossing and rng.random() < 0.6:
        z = road.crossing + road.crossing_width * rng.uniform(0.3, 0.7)
        x = road.middle(z) + rng.uniform(-8, 8)
        _add_vehicle(layout, rng, x, z, rng.choice([-1, 1]) * np.pi / 2, bus=rng.random() < 0.3)
    for index in range(-road.lanes, road.lanes):
        z = rng.uniform(4, 14)
        while z < 45:
            x = road.middle(z) + (index + 0.5) * lane + rng.uniform(-0.2, 0.2)
            yaw = (0.0 if index >= 0 else np.pi) + np.arctan(2 * road.bend * z)
            if rng.random() < 0.2 + 0.6 * busy:
                bus = rng.random() < 0.27
                _add_vehicle(layout, rng, x, z + (4 if bus else 0), yaw, bus)
            z += rng.uniform(7, 16)
    if layout.place != "country" and rng.random() < 0.5:
        # Parked along one kerb.
        side = int(rng.choice([-1, 1]))
        for z in np.arange(rng.uniform(4, 8), 30, 6.2).tolist():
            x = road.middle(z) + side * (road.half - 1.15)
            if rng.random() < 0.75:
                yaw = (0.0 if side > 0 else np.pi) + np.arctan(2 * road.bend * z)
                _add_vehicle(layout, rng, x, z, yaw, bus=False)


def _add_vehicle(
    layout: Layout, rng: np.random.Generator, x: float, z: float, yaw: float, bus: bool
) -> None:
    least, height = (LEAST_BUS, 3.1) if bus else (LEAST_CAR, 1.5)
    if layout.camera.fraction(height, z) < least:
        return
    length = 5.2 if bus else 2.3
    ahead = np.sin(yaw) * length * 0.6, np.cos(yaw) * length * 0.6
    discs = [(x, z, 1.4), (x - ahead[0], z - ahead[1], 1.4), (x + ahead[0], z + ahead[1], 1.4)]
    taken = layout.taken
    if any((a - p) ** 2 + (b - q) ** 2 < (r + s) ** 2 for a, b, r in discs for p, q, s in taken):
        return
    taken.extend(discs)
    layout.vehicles.append(draw_vehicle_plan(rng, x, z, yaw, bus))


def _add_signs(layout: Layout, rng: np.random.Generator) -> None:
    road, camera = layout.road, layout.camera
    for _ in range(int(rng.integers(1, 5))):
        kind = KINDS[rng.integers(len(KINDS))]
        z, side = rng.uniform(5, 18), 1 if rng.random() < 0.6 else -1
        if road.verge[side > 0] == WATER and not road.walk[side > 0]:
            continue
        radius = rng.uniform(0.42, 0.6) * (0.8 if kind == "lights" else 1)
        top = rng.uniform(2.3, 3.0)
        x = road.middle(z) + side * (road.half + rng.uniform(0.4, 0.9))
        if camera.fraction(2 * radius, z) >= LEAST_BOARD and layout.free(x, z, 1.1):
            layout.signs.append(Sign(kind, x, z, top, radius, _seed(rng)))


def _add_trees(layout: Layout, rng: np.random.Generator) -> None:
    road, place = layout.road, layout.place
    kind = str(rng.choice(["round", "round", "fir", "poplar"]))
    if place in ("street", "waterfront"):
        for side in (-1, 1):
            if rng.random() < 0.35:
                continue
            pitch, at = rng.uniform(6.5, 12), road.half + rng.uniform(0.9, 1.4)
            for z in np.arange(rng.uniform(5, 12), 70, pitch).tolist():
                x = road.middle(z) + side * at
                if _beside_crossing(road, z, z) and layout.free(x, z, 0.8):
                    tall = rng.uniform(4, 7.5)
                    layout.trees.append(draw_tree_plan(rng, x, z, kind, tall))
    for _ in range(int(rng.integers(10, 22))):
        side = int(rng.choice([-1, 1]))
        if road.verge[side > 0] != GRASS:
            continue
        z = float(np.exp(rng.uniform(np.log(6), np.log(90))))
        x = road.edge(side, z) + side * rng.uniform(1.5, 4 + 0.7 * z)
        any_kind = str(rng.choice(["round", "round", kind, "fir", "bush"]))
        tall = rng.uniform(1.2, 2.2) if any_kind == "bush" else rng.uniform(4, 11)
        if layout.free(x, z, 1.5):
            layout.trees.append(draw_tree_plan(rng, x, z, any_kind, tall))


def _add_people(layout: Layout, rng: np.random.Generator, rain: bool) -> None:
    road, camera = layout.road, layout.camera
    crowd = {"street": 15, "waterfront": 13, "suburb": 9, "country": 5}[layout.place]
    for _ in range(int(rng.integers(1, crowd + 1))):
        z, side = float(np.exp(rng.uniform(np.log(3.5), np.log(16)))), int(rng.choice([-1, 1]))
        walk = road.walk[side > 0]
        if road.zebra and rng.random() < 0.3:
            z = road.zebra + rng.uniform(0.4, 2.8)
            x = road.middle(z) + rng.uniform(-1, 1) * road.half
        elif walk:
            x = road.middle(z) + side * (road.half + rng.uniform(0.4, walk - 0.2))
        elif road.verge[side > 0] == GRASS:
            x = road.middle(z) + side * (road.half + rng.uniform(0.6, 5))
        else:
            continue
        tall = rng.uniform(1.5, 1.9) if rng.random() < 0.88 else rng.uniform(1.1, 1.4)
        if camera.fraction(tall, z) >= LEAST_PERSON and layout.free(x, z, 0.4):
            wet = rng.random() < (0.7 if rain else 0.03)
            layout.people.append(Person(x, z, tall, wet, _seed(rng)))

"""The classes of the drawn scenes, and a colour for each."""

from __future__ import annotations

CLASSES: tuple[str, ...] = (
    "sky",
    "mountain",
    "water",
    "grass",
    "tree",
    "building",
    "road",
    "sidewalk",
    "car",
    "bus",
    "person",
    "traffic sign",
)

# RGB, one per class, close to the Cityscapes colours where that set has the class.
PALETTE: tuple[tuple[int, int, int], ...] = (
    (70, 130, 180),
    (150, 120, 100),
    (40, 90, 220),
    (152, 251, 152),
    (107, 142, 35),
    (110, 110, 110),
    (128, 64, 128),
    (244, 35, 232),
    (0, 0, 142),
    (0, 80, 100),
    (220, 20, 60),
    (220, 220, 0),
)

(
    SKY,
    MOUNTAIN,
    WATER,
    GRASS,
    TREE,
    BUILDING,
    ROAD,
    SIDEWALK,
    CAR,
    BUS,
    PERSON,
    SIGN,
) = range(len(CLASSES))

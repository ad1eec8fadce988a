"""Trees and bushes: a soft shape made of overlapping balls or tiers, with a leafy edge."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from . import noise
from .camera import Canvas
from .classes import TREE
from .light import rgb
from .noise import Array

# Chance, and colour of the leaves.
LEAVES = (
    (0.3, (0.22, 0.36, 0.13)),
    (0.26, (0.28, 0.42, 0.16)),
    (0.16, (0.17, 0.3, 0.14)),
    (0.09, (0.62, 0.42, 0.14)),
    (0.07, (0.62, 0.26, 0.12)),
    (0.06, (0.8, 0.56, 0.62)),
    (0.06, (0.4, 0.46, 0.18)),
)
FIR = (0.12, 0.24, 0.15)
KINDS = ("round", "fir", "poplar", "bush")


@dataclass(frozen=True)
class Tree:
    kind: str
    x: float
    z: float
    height: float
    radius: float
    leaves: tuple[float, float, float]
    seed: int


def draw_tree_plan(rng: np.random.Generator, x: float, z: float, kind: str, height: float) -> Tree:
    share = {"round": (0.3, 0.42), "fir": (0.2, 0.27), "poplar": (0.14, 0.19), "bush": (0.6, 1.0)}
    index = rng.choice(len(LEAVES), p=[chance for chance, _ in LEAVES])
    colour = FIR if kind == "fir" else LEAVES[index][1]
    tint = rng.uniform(0.88, 1.12, 3)
    return Tree(
        kind=kind,
        x=x,
        z=z,
        height=height,
        radius=height * rng.uniform(*share[kind]),
        leaves=(colour[0] * tint[0], colour[1] * tint[1], colour[2] * tint[2]),
        seed=int(rng.integers(1 << 30)),
    )


def _balls(tree: Tree, x: Array, y: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Depth inside the crown (above 0), and how much it faces right and up, both (h, w)."""
    low = {"round": 0.3, "poplar": 0.1, "bush": 0.0}[tree.kind]
    middle, tall = 0.5 * (1 + low) * tree.height, 0.5 * (1 - low) * tree.height
    count = {"round": 11, "poplar": 9, "bush": 7}[tree.kind]
    inside = np.full(np.broadcast_shapes(x.shape, y.shape), -1.0, np.float32)
    facing = np.zeros(inside.shape, np.float32)
    for i in range(count):
        turn, out = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0.05, 0.5))
        r = rng.uniform(0.4, 0.62) * min(tree.radius, tall)
        if tree.kind == "poplar":
            cx, cy = rng.uniform(-0.25, 0.25) * tree.radius, middle + tall * (i / 4 - 1) * 0.8
            r = tree.radius * (0.9 - 0.45 * abs(i / 4 - 1))
        elif tree.kind == "bush":
            cx, cy = tree.radius * (i / 3 - 1) * 0.8, 0.45 * tree.height
            r = rng.uniform(0.4, 0.55) * tree.height
        else:
            cx, cy = out * np.cos(turn) * tree.radius, middle + out * np.sin(turn) * tall
        dx, dy = (x - np.float32(cx)) / np.float32(r), (y - np.float32(cy)) / np.float32(r)
        ball = 1 - dx * dx - dy * dy
        top = ball > inside
        np.copyto(inside, ball, where=top)
        np.copyto(facing, 0.7 * dy - 0.5 * dx, where=top)
    return inside, facing


def _tiers(tree: Tree, x: Array, y: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    up = np.clip((y / tree.height - 0.1) / 0.9, -0.2, 1)
    tiers = int(rng.integers(5, 9))
    saw = 1 - np.mod(up * tiers, 1)
    half = tree.radius * (1 - up) * (0.68 + 0.36 * saw) + 0.02 * tree.height
    inside = np.where(up < 0, -1, 1 - np.abs(x) / np.maximum(half, 1e-3))
    facing = np.broadcast_to(0.5 * (0.5 - saw), inside.shape) - 0.6 * x / tree.radius
    return np.minimum(inside, 0.8).astype(np.float32), facing.astype(np.float32)


def draw_tree(tree: Tree, canvas: Canvas) -> None:
    camera, light = canvas.camera, canvas.light
    scale = camera.focal / tree.z
    foot_x, foot_y = camera.project(tree.x, 0, tree.z)
    wide = 1.25 * tree.radius * scale + 1
    box = canvas.window(
        foot_x - wide, foot_y - 1.12 * tree.height * scale, foot_x + wide, foot_y + 1
    )
    if box is None:
        return
    left, top, right, bottom = box
    rows, cols = bottom - top, right - left
    # The crown is smooth: a coarse grid, enlarged, is as good as every pixel.
    step = max(1, int(np.ceil(max(rows, cols) / 96)))
    u = np.arange(left, right + step, step, dtype=np.float32) + 0.5 * step
    v = np.arange(top, bottom + step, step, dtype=np.float32) + 0.5 * step
    x, y = (u[None] - foot_x) / scale, (foot_y - v[:, None]) / scale
    rng = np.random.Generator(np.random.PCG64(tree.seed))
    shape = _tiers if tree.kind == "fir" else _balls
    coarse = shape(tree, x.astype(np.float32), y.astype(np.float32), rng)
    size = (u.size * step, v.size * step)
    inside, facing = (
        np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BILINEAR))[:rows, :cols]
        for f in coarse
    )
    texel = 560 / camera.height
    origin = rng.uniform(0, 512, 2)
    start = (float(origin[0] + top * texel), float(origin[1] + left * texel))
    leaf = noise.patch(noise.tile(*noise.LEAF), start, (rows, cols), texel) - 0.5
    edge = 0.5 * (tree.radius if tree.kind == "fir" else 0.5 * tree.radius) * scale
    rough = 0.26 if tree.kind == "fir" else 0.9
    alpha = np.clip((inside + rough * leaf) * edge + 0.5, 0, 1)
    side = 1.0 if light.direction[0] < 0 else -1.0
    glow = np.clip(0.45 + 0.5 * facing * (side if tree.kind == "fir" else 1), 0, 1)
    tone = 0.62 + 0.5 * np.clip(facing, -1, 1) + 1.15 * leaf
    lit = (0.8 + 0.3 * glow)[..., None] * light.ambient + glow[..., None] * (light.sun * 0.9)
    colour = np.clip(tone, 0.2, 1.7)[..., None] * lit * rgb(*tree.leaves)
    rgb_out = colour * alpha[..., None]
    if tree.kind != "bush":
        # The trunk stands behind the leaves, up to the middle of the crown.
        half = max(0.035 * tree.height * scale, 1.6)
        px = np.arange(left, right, dtype=np.float32) + 0.5 - foot_x
        py = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5
        reach = foot_y - 0.55 * tree.height * scale
        bark = np.clip(half - np.abs(px)[None] + 0.5, 0, 1) * ((py > reach) & (py < foot_y))
        bark = bark * (1 - alpha)
        round_ = (0.75 + 0.35 * np.clip(-px / half * side, -1, 1))[None] + 0.5 * leaf
        wood = round_[..., None] * (rgb(0.3, 0.22, 0.16) * light.on((0, 0, -1)))
        rgb_out = rgb_out + bark[..., None] * wood
        alpha = alpha + bark
    canvas.lay(box, rgb_out, alpha, TREE, tree.z)

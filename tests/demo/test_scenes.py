"""The drawn scenes: same seed, same picture; any size; labels that lie on what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from fastseg.demo.scenes import CLASSES, PALETTE, draw_scene

# Shares of sky, mountain, water, ... in percent, by seed, at 120x160, noted when the embedded
# model was trained: pictures that drift away from these are not the ones it knows.
NOTED = {
    12: [34.9, 15.0, 20.0, 2.9, 3.0, 0.0, 19.0, 1.2, 0.0, 3.5, 0.4, 0.0],
    4: [8.7, 2.2, 3.3, 0.0, 15.3, 13.1, 16.1, 9.4, 0.0, 30.1, 1.8, 0.0],
    100: [10.1, 1.9, 0.0, 0.0, 7.6, 35.9, 24.3, 16.0, 2.0, 0.0, 1.6, 0.6],
}


def shares(labels: np.ndarray) -> np.ndarray:
    return 100 * np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size


def test_same_seed_same_pixels() -> None:
    first, again, other = (
        draw_scene(5, (96, 128)),
        draw_scene(5, (96, 128)),
        draw_scene(6, (96, 128)),
    )
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.labels, other.labels)


@pytest.mark.parametrize("seed", NOTED)
def test_scenes_are_those_the_model_was_trained_on(seed: int) -> None:
    # Not bit for bit: another NumPy or Pillow may round a border pixel differently.
    np.testing.assert_allclose(shares(draw_scene(seed, (120, 160)).labels), NOTED[seed], atol=0.5)


@pytest.mark.parametrize("size", [(32, 32), (33, 97), (256, 128), (120, 500)])
def test_any_size(size: tuple[int, int]) -> None:
    for seed in range(12):
        scene = draw_scene(seed, size)
        assert scene.image.shape == (*size, 3)
        assert scene.labels.shape == size
        assert scene.image.dtype == scene.labels.dtype == np.uint8
        assert scene.labels.max() < len(CLASSES)
        assert scene.image.std() > 10  # not blank


def test_every_class_appears() -> None:
    seen = np.stack([shares(draw_scene(seed, (128, 128)).labels) for seed in range(60)])
    often = (seen > 0.3).mean(0)
    assert (often > 0.1).all(), dict(zip(CLASSES, often, strict=True))


def test_resolution_does_not_move_things() -> None:
    for seed in range(8):
        small, large = (draw_scene(seed, (side, side)).labels for side in (128, 384))
        assert (small == large[1::3, 1::3]).mean() > 0.965


def test_labels_lie_on_the_edges_of_the_picture() -> None:
    """Moved by two pixels any way, label borders meet the picture's own edges less well."""
    shifts = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2)]
    met = dict.fromkeys(shifts, 0.0)
    for seed in range(10):
        scene = draw_scene(seed, (256, 256))
        grey = scene.image.astype(np.float64).mean(2)
        steps = np.abs(np.diff(grey, axis=1))
        borders = np.diff(scene.labels.astype(int), axis=1) != 0
        for dy, dx in shifts:
            met[dy, dx] += steps[np.roll(borders, (dy, dx), (0, 1))].mean()
    best = max(met, key=lambda shift: met[shift])
    assert best == (0, 0), met
    assert met[0, 0] > 1.5 * max(met[0, 2], met[0, -2]), met


def test_palette_has_a_colour_for_each_class() -> None:
    assert len(set(PALETTE)) == len(PALETTE) == len(set(CLASSES)) == len(CLASSES)
    assert len(CLASSES) >= 8


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="seed"):
        draw_scene(-1)
    with pytest.raises(ValueError, match="size"):
        draw_scene(0, (31, 64))

"""Boundary F1 against distance transforms of each class's border."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, gaussian_filter

from fastseg.evaluation.boundary import SHARE_OF_DIAGONAL, BoundaryF1


def border(labels, ignored, index):
    """Pixels of class `index` beside one of another class, neither of them ignored."""
    found = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for step in (1, -1):
            other = np.roll(labels, step, axis)
            there = np.roll(~ignored, step, axis)
            edge = [slice(None)] * 2
            edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
            there[tuple(edge)] = False  # nothing is beyond the picture
            found |= (labels == index) & ~ignored & (other != index) & there
    return found


def reference(pairs, classes, ignore):
    counts = np.zeros((4, classes))
    for predicted, truth in pairs:
        distance = max(1.0, SHARE_OF_DIAGONAL * np.hypot(*truth.shape))
        for index in range(classes):
            borders = [border(labels, truth == ignore, index) for labels in (predicted, truth)]
            for row, (one, other) in enumerate((borders, borders[::-1])):
                far = distance_transform_edt(~other) if other.any() else np.full(one.shape, np.inf)
                counts[row, index] += (one & (far <= distance)).sum()
                counts[row + 2, index] += one.sum()
    with np.errstate(all="ignore"):
        precision, recall = counts[:2] / counts[2:]
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    return np.where(counts[2:].sum(axis=0) > 0, f1, np.nan)


def blobs(seed, shape, classes):
    rng = np.random.default_rng(seed)
    smooth = [gaussian_filter(rng.standard_normal(shape), 9) for _ in range(classes)]
    return np.argmax(smooth, axis=0)


@pytest.mark.parametrize("shape", [(60, 90), (300, 420), (7, 250)])
def test_as_distances(shape):
    pairs = []
    for seed in range(2):
        truth, other = blobs(seed, shape, 5), blobs(seed + 10, shape, 5)
        predicted = np.roll(truth, (1, 2), (0, 1))
        predicted[:, : shape[1] // 4] = other[:, : shape[1] // 4]
        truth[: shape[0] // 6, shape[1] // 3 :] = 255
        pairs.append((predicted, truth))
    found = BoundaryF1(7)
    for predicted, truth in pairs:
        found.add(predicted, truth)
    expected = reference(pairs, 7, 255)
    np.testing.assert_allclose(found.f1, expected, rtol=1e-12)
    assert np.isnan(found.f1[5:]).all()
    assert found.mean_f1 == pytest.approx(np.nanmean(expected))
    assert 0 < found.mean_f1 < 0.99


def test_right_and_absent_borders():
    truth = blobs(0, (40, 50), 3)
    found = BoundaryF1(4)
    found.add(truth, truth)
    np.testing.assert_array_equal(found.f1[:3], np.ones(3))
    found = BoundaryF1(2)
    found.add(np.zeros_like(truth), (truth > 1).astype(int))  # borders in one map alone
    np.testing.assert_array_equal(found.f1, [0, 0])
    found = BoundaryF1(2)
    found.add(np.zeros_like(truth), np.zeros_like(truth))
    assert np.isnan(found.mean_f1)


def test_two_shards_are_one():
    pairs = [(blobs(seed, (40, 50), 3), blobs(seed + 5, (40, 50), 3)) for seed in range(2)]
    whole, shards = BoundaryF1(3), [BoundaryF1(3), BoundaryF1(3)]
    for pair, shard in zip(pairs, shards, strict=True):
        whole.add(*pair)
        shard.add(*pair)
    shards[0].merge(shards[1])
    np.testing.assert_array_equal(whole.f1, shards[0].f1)

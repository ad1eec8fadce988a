"""Two models on the same pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastseg.evaluation.comparison import Comparison


def iou(pairs):
    """mIoU of (predicted, truth) by sets, pixel for pixel."""
    classes = {label for pair in pairs for labels in pair for label in labels.ravel().tolist()}
    found = []
    for label in classes:
        both = sum(((p == label) & (t == label)).sum() for p, t in pairs)
        either = sum(((p == label) | (t == label)).sum() for p, t in pairs)
        found.append(both / either)
    return float(np.mean(found))


def counts(predicted, truth):
    return np.histogram2d(truth.ravel(), predicted.ravel(), bins=4, range=[[0, 4], [0, 4]])[
        0
    ].astype(np.int64)


def make(pictures):
    rng = np.random.default_rng(1)
    found, both = Comparison(), []
    for _ in range(pictures):
        truth = rng.integers(0, 4, (9, 8))
        one, other = (np.where(rng.random(truth.shape) < s, truth, 0) for s in (0.9, 0.7))
        found.add(
            *(torch.from_numpy(labels) for labels in (one, other)),
            *(counts(labels, truth) for labels in (one, other)),
        )
        both.append((one, other, truth))
    return found, both


def test_difference_and_share_of_equal_pixels():
    found, both = make(5)
    one, other = ([(pair[n], pair[2]) for pair in both] for n in (0, 1))
    assert found.difference() == pytest.approx(iou(one) - iou(other))
    equal = np.mean([(first == second).mean() for first, second, _ in both])
    assert found.equal_share == pytest.approx(equal)


def test_interval_over_two_pictures():
    """Draws of two pictures are one twice, the other twice, or both: a quarter, a quarter, half."""
    found, both = make(2)
    differences = []
    for drawn in ([0, 0], [1, 1]):
        pairs = [both[index] for index in drawn]
        differences.append(iou([(p, t) for p, _, t in pairs]) - iou([(p, t) for _, p, t in pairs]))
    low, high = found.interval()
    assert (low, high) == pytest.approx((min(differences), max(differences)))
    assert low < found.difference() < high
    assert found.interval() == (low, high)  # the draws are those of a seed


def test_interval_as_drawn_one_by_one():
    found, both = make(15)
    rng = np.random.default_rng(5)
    differences = []
    for _ in range(300):
        drawn = [both[index] for index in rng.integers(0, 15, 15)]
        differences.append(iou([(p, t) for p, _, t in drawn]) - iou([(p, t) for _, p, t in drawn]))
    low, high = np.percentile(differences, [2.5, 97.5])
    spread = np.std(differences)
    # Ends of 300 and of 1,000 draws are that far apart by chance; the interval is 4 spreads wide.
    assert np.abs(np.array(found.interval()) - [low, high]).max() < 0.5 * spread


def test_a_model_and_itself_and_one_picture():
    found, both = make(1)
    assert all(np.isnan(found.interval()))
    same = Comparison()
    for _ in range(3):
        one, _, truth = both[0]
        same.add(*[torch.from_numpy(one)] * 2, *[counts(one, truth)] * 2)
    assert (same.difference(), same.equal_share, same.interval()) == (0, 1, (0, 0))

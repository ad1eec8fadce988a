"""The confusion matrix and its figures against torchmetrics' and Hugging Face's definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from fastseg.evaluation import confusion
from fastseg.evaluation.confusion import Confusion, LabelError


def mean_iou_of_hugging_face(predicted, truths, classes, ignore):
    """The definition in `evaluate`'s metric mean_iou: histograms, with ignored pixels left out."""
    areas = np.zeros((3, classes))
    for labels, truth in zip(predicted, truths, strict=True):
        kept = truth != ignore
        labels, truth = labels[kept], truth[kept]
        for row, values in enumerate((labels[labels == truth], labels, truth)):
            areas[row] += np.histogram(values, bins=classes, range=(0, classes - 1))[0]
    both, of_labels, of_truth = areas
    with np.errstate(all="ignore"):
        iou, accuracy = both / (of_labels + of_truth - both), both / of_truth
        return {
            "mean_iou": np.nanmean(iou),
            "mean_accuracy": np.nanmean(accuracy),
            "overall_accuracy": both.sum() / of_truth.sum(),
            "per_category_iou": iou,
            "per_category_accuracy": accuracy,
        }


def maps(seed, classes, ignore, count=3, dtype=np.int64):
    """Maps made of runs; a class that is only predicted, and one that is nowhere, where it fits."""
    rng = np.random.default_rng(seed)
    used = max(1, classes - 2)
    found = []
    for _ in range(count):
        height, width = rng.integers(1, 40, 2)
        truth = rng.integers(0, used, (height, -(-width // 3))).repeat(3, 1)[:, :width]
        predicted = np.where(
            rng.random(truth.shape) < 0.7, truth, rng.integers(0, used, truth.shape)
        )
        predicted[0, 0] = min(used, classes - 1)
        if ignore is not None:
            truth[rng.random(truth.shape) < 0.2] = ignore
        found.append((predicted.astype(dtype), truth.astype(dtype)))
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    classes=st.integers(2, 300),
    ignore=st.sampled_from([255, -100, -1, 0, 1, 300, None]),
    tensors=st.booleans(),
)
def test_as_torchmetrics_and_hugging_face(seed, classes, ignore, tensors):
    if ignore == 255 and classes > 255:
        ignore = None
    pairs = maps(seed, classes, ignore)
    found = Confusion(classes, ignore)
    reference = MulticlassConfusionMatrix(classes, ignore_index=ignore)
    jaccard = MulticlassJaccardIndex(classes, ignore_index=ignore, average="none")
    for predicted, truth in pairs:
        as_tensors = [torch.from_numpy(labels) for labels in (predicted, truth)]
        own = found.add(*(as_tensors if tensors else (predicted, truth)))
        reference.update(*as_tensors)
        jaccard.update(*as_tensors)
        assert own.sum() == truth.size - (truth == ignore).sum()
    assert found.matrix.dtype == np.int64
    np.testing.assert_array_equal(found.matrix, reference.compute().numpy())
    assert found.ignored == sum(int((truth == ignore).sum()) for _, truth in pairs)
    if not found.matrix.any():
        return
    expected = mean_iou_of_hugging_face(*zip(*pairs, strict=True), classes, ignore)
    close = {"rtol": 1e-12, "atol": 0}
    np.testing.assert_allclose(found.iou, expected["per_category_iou"], **close)
    np.testing.assert_allclose(found.accuracy, expected["per_category_accuracy"], **close)
    np.testing.assert_allclose(found.mean_iou, expected["mean_iou"], **close)
    np.testing.assert_allclose(found.mean_accuracy, expected["mean_accuracy"], **close)
    np.testing.assert_allclose(found.pixel_accuracy, expected["overall_accuracy"], **close)
    # torchmetrics has 0 for a class in neither map, and for an ignored one whatever was predicted.
    known = ~np.isnan(found.iou)
    if ignore is not None and 0 <= ignore < classes:
        known[ignore] = False
    np.testing.assert_allclose(found.iou[known], jaccard.compute().numpy()[known], rtol=1e-6)


def test_frequency_weighted_iou_and_classes_in_one_map_alone():
    found = Confusion(5)
    #   class 2 is only predicted, 3 never, 4 nowhere
    truth = np.array([[0, 0, 0, 0, 1, 1, 3, 255]])
    predicted = np.array([[0, 0, 0, 2, 1, 0, 0, 4]])
    found.add(predicted, truth)
    iou = np.array([3 / 6, 1 / 2, 0, 0, np.nan])
    np.testing.assert_allclose(found.iou, iou)
    np.testing.assert_allclose(found.accuracy, [3 / 4, 1 / 2, np.nan, 0, np.nan])
    assert found.mean_iou == pytest.approx(1 / 4)
    assert found.frequency_weighted_iou == pytest.approx(4 / 7 * 1 / 2 + 2 / 7 * 1 / 2)
    assert found.ignored == 1


def test_bytes_and_wide_integers_count_alike():
    for dtype in (np.uint8, np.int16, np.uint16, np.int32):
        bytes_, wide = Confusion(12), Confusion(12)
        for predicted, truth in maps(5, 12, 255):
            bytes_.add(predicted.astype(np.uint8), truth.astype(np.uint8))
            wide.add(predicted.astype(dtype), truth.astype(dtype))
        np.testing.assert_array_equal(bytes_.matrix, wide.matrix)
    with_bools = Confusion(2)
    with_bools.add(torch.tensor([[True, False]]), torch.tensor([[True, True]]))
    np.testing.assert_array_equal(with_bools.matrix, [[0, 0], [1, 1]])


def test_what_a_gpu_counts():
    """The same pairs by torch's operators, which are those of a GPU."""
    for predicted, truth in maps(6, 40, 255, dtype=np.uint8):
        np.testing.assert_array_equal(
            confusion._pairs_on_gpu(torch.from_numpy(predicted), truth),
            confusion._pairs(predicted, truth),
        )


def test_two_shards_are_one():
    pairs = maps(7, 20, 255, count=4)
    whole, shards = Confusion(20), [Confusion(20), Confusion(20)]
    for index, pair in enumerate(pairs):
        whole.add(*pair)
        shards[index % 2].add(*pair)
    shards[0].merge(shards[1])
    np.testing.assert_array_equal(whole.matrix, shards[0].matrix)
    assert whole.ignored == shards[0].ignored
    with pytest.raises(ValueError, match="other: expected the same"):
        whole.merge(Confusion(20, None))


@pytest.mark.parametrize(
    ("classes", "ignore", "labels", "text"),
    [
        (
            150,
            255,
            [0, 150],
            "from 0 to 149, or 255 to be left out, got 150 in 1 of 2 pixels.*reduce",
        ),
        (19, 255, [7, 26], "got 26 in 1 of 2 pixels.*--map labelIds"),
        (2, None, [0, 255], "from 0 to 1, got 255 in 1.*divide by 255"),
        (21, 0, [3, 255], "got 255 .*--ignore 255"),
        (21, 255, [3, -100], "got -100 .*where -100 is no class, pass it as ignore_index"),
        (
            5,
            255,
            [38, 75],
            "got 38, 75 in 2 of 2 pixels; has the model other classes, or are these",
        ),
        (300, 255, [38, 301], "from 0 to 299, or 255 .*got 301 in 1 of 2"),
    ],
)
def test_labels_that_are_no_classes_say_what_to_do(classes, ignore, labels, text):
    truth = np.array([labels])
    found = Confusion(classes, ignore)
    for one in (
        (truth, truth.astype(np.uint8)) if truth.min() >= 0 and truth.max() < 256 else (truth,)
    ):
        with pytest.raises(LabelError, match=text):
            found.add(np.zeros_like(truth), one)
    assert not found.matrix.any()


def test_wrong_arguments():
    found = Confusion(3)
    zeros = np.zeros((2, 3), np.uint8)
    with pytest.raises(
        LabelError, match="predicted: expected classes from 0 to 2.*got 4 in 6 of 6"
    ):
        found.add(zeros + 4, zeros)
    found.add(zeros + 4, zeros + 255)  # where nothing is labelled nothing is looked at
    with pytest.raises(
        ValueError, match=r"truth: expected pixels in the shape of predicted, \(2, 3"
    ):
        found.add(zeros, zeros.T)
    with pytest.raises(ValueError, match="truth: expected pixels"):
        found.add(zeros[:0], zeros[:0])
    with pytest.raises(TypeError, match="truth: expected integers, got float64"):
        found.add(zeros, zeros.astype(float))
    with pytest.raises(TypeError, match="predicted: expected integers, got float32"):
        found.add(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.uint8).numpy())
    with pytest.raises(ValueError, match="num_labels: expected an integer from 1, got 0"):
        Confusion(0)

"""`fastseg.evaluate` on models and data sets of every kind."""

from __future__ import annotations

import json
import re
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn

import fastseg
from tests.inference.segment_cases import picture
from tests.models.seggpt.cases import twins

CLASSES = 5
SIZES = [(60, 80), (90, 70), (64, 64)]
TINY = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 16],
    "num_attention_heads": [1, 1, 1, 1],
    "decoder_hidden_size": 16,
}
PLAIN_PROCESSOR = fastseg.SegformerImageProcessor(
    do_resize=False, do_rescale=False, do_normalize=False
)


class PixelModel(nn.Module):
    """A model of another library: logits alone, of each pixel by itself, so labels are exact."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Conv2d(3, classes, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randint(-8, 9, self.layer.weight.shape))
            self.layer.bias.copy_(-127.5 * self.layer.weight.sum(dim=(1, 2, 3)))
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layer(pixel_values)

    def labels(self, image: Image.Image) -> np.ndarray:
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].double()
        weight, bias = self.layer.weight.detach().double(), self.layer.bias.detach().double()
        logits = F.conv2d(pixels, weight, bias)[0]
        return (logits.argmax(0) if len(logits) > 1 else (logits[0] > 0).long()).numpy()


def make_data(classes: int = CLASSES, sizes=SIZES, ignore: int = 255):
    """Pictures, and labels that a `PixelModel` gets right for the most part."""
    model, rng = PixelModel(classes), np.random.default_rng(2)
    data = []
    for index, size in enumerate(sizes):
        image = picture(*size, seed=index)
        truth = model.labels(image).astype(np.uint8)
        wrong = rng.random(size) < 0.3
        truth[wrong] = rng.integers(0, max(classes, 2), wrong.sum())
        truth[:3] = ignore
        data.append((image, truth))
    return data


def matrix_of(pairs, classes: int) -> np.ndarray:
    """Pixels by (true, predicted) class of pairs (predicted, truth), one by one."""
    found = np.zeros((classes, classes), np.int64)
    for predicted, truth in pairs:
        for label, true in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if true != 255:
                found[true, label] += 1
    return found


@pytest.fixture(scope="module")
def data():
    return make_data()


@pytest.fixture(scope="module")
def pixel_model():
    return PixelModel()


def evaluate(model, data, **options):
    return fastseg.evaluate(model, data, processor=PLAIN_PROCESSOR, **options)


def test_a_module_of_logits_alone(pixel_model, data):
    found = evaluate(pixel_model, data, num_labels=CLASSES)
    expected = matrix_of([(pixel_model.labels(image), truth) for image, truth in data], CLASSES)
    np.testing.assert_array_equal(found.confusion.matrix, expected)
    iou = np.diag(expected) / (expected.sum(0) + expected.sum(1) - np.diag(expected))
    assert found.mean_iou == pytest.approx(iou.mean())
    assert found.pixel_accuracy == pytest.approx(np.trace(expected) / expected.sum())
    assert 0.5 < found.mean_iou < 0.9
    assert (found.pictures, found.confusion.ignored) == (3, 3 * (80 + 70 + 64))
    assert found.names == [f"class {index}" for index in range(CLASSES)]


class MapStyle(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index % len(self.data)]  # it never ends by itself


@pytest.mark.parametrize(
    "convert",
    [
        iter,
        MapStyle,
        lambda data: [(np.asarray(image), torch.from_numpy(truth)) for image, truth in data],
        lambda data: [(image, truth.astype(np.int64)) for image, truth in data],
        lambda data: [(image, Image.fromarray(truth)) for image, truth in data],
        lambda data: [(image, truth.astype(np.float32)) for image, truth in data],
    ],
    ids=["iterator", "torch Dataset", "tensors", "int64", "PIL", "floats"],
)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_kinds_of_data_sets(pixel_model, data, convert, batch_size):
    expected = evaluate(pixel_model, data, num_labels=CLASSES)
    told = []
    found = evaluate(
        pixel_model,
        convert(data),
        num_labels=CLASSES,
        batch_size=batch_size,
        progress=told.append,
    )
    np.testing.assert_array_equal(found.confusion.matrix, expected.confusion.matrix)
    assert sum(told) == 3


def test_transformers_accelerated_against_its_own_forward(data):
    torch.manual_seed(0)
    config = transformers.SegformerConfig(id2label=dict(enumerate("abcde")), **TINY)
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    processor = fastseg.SegformerImageProcessor(size=64)
    pairs, logits = [], []
    with torch.no_grad():
        model.decode_head.classifier.weight *= 40
        for image, _ in data:
            logits.append(model(**processor(image, return_tensors="pt")).logits)
        middle = torch.cat(logits).mean(dim=(0, 2, 3))
        model.decode_head.classifier.bias -= middle
    for (_, truth), one in zip(data, logits, strict=True):
        full = F.interpolate((one - middle[:, None, None]).double(), truth.shape, mode="bilinear")
        pairs.append((full.argmax(1)[0].numpy(), truth))
    fastseg.accelerate(model)
    found = fastseg.evaluate(model, data, processor=processor, against="plain", worst=1)
    expected, pixels = matrix_of(pairs, CLASSES), sum(truth.size for _, truth in pairs)
    assert np.abs(found.confusion.matrix - expected).sum() <= 0.002 * pixels  # near-ties
    assert np.abs(found.against.confusion.matrix - expected).sum() <= 0.002 * pixels
    assert found.comparison.equal_share > 0.998
    assert found.names == list("abcde")
    assert (found.settings["path"], found.against.settings["path"]) == ("fast", "plain")
    assert len(np.unique(pairs[0][0])) > 2


def test_against_another_model(pixel_model, data):
    other = PixelModel()
    with torch.no_grad():
        other.layer.weight[0] += 3
    found = evaluate(pixel_model, data, num_labels=CLASSES, against=other)
    alone = evaluate(other, data, num_labels=CLASSES)
    np.testing.assert_array_equal(found.against.confusion.matrix, alone.confusion.matrix)
    assert found.comparison.difference() == pytest.approx(found.mean_iou - alone.mean_iou)
    equal = [(pixel_model.labels(image) == other.labels(image)).mean() for image, _ in data]
    sizes = [truth.size for _, truth in data]
    assert found.comparison.equal_share == pytest.approx(np.average(equal, weights=sizes))
    assert 0.1 < found.comparison.equal_share < 1
    shown = str(found)
    assert "the other: mIoU " in shown
    assert "resamplings" in shown
    with pytest.raises(ValueError, match="against: expected a model or 'plain', got 'fast'"):
        evaluate(pixel_model, data, num_labels=CLASSES, against="fast")


def test_windows_and_views_are_those_of_segment(data):
    torch.manual_seed(0)
    config = fastseg.SegformerConfig(num_labels=CLASSES, **TINY)
    model = fastseg.SegformerForSemanticSegmentation(config).eval()
    processor = fastseg.SegformerImageProcessor(size=64)
    with torch.no_grad():
        model.decode_head.classifier.weight *= 40
    options = {"slide": (48, 32), "tta": ("flip",)}
    maps = fastseg.segment(model, [image for image, _ in data], processor=processor, **options)
    expected = matrix_of(
        [(labels.numpy(), truth) for labels, (_, truth) in zip(maps, data, strict=True)], CLASSES
    )
    found = fastseg.evaluate(model, data, processor=processor, **options)
    np.testing.assert_array_equal(found.confusion.matrix, expected)
    assert found.settings["mode"] == "slide"
    whole = fastseg.evaluate(model, data, processor=processor)
    assert (whole.confusion.matrix != expected).any()


def test_one_class_is_two(pixel_model):
    data = make_data(classes=1)
    model = PixelModel(1)
    found = evaluate(model, data, num_labels=1, boundary=True)
    expected = matrix_of([(model.labels(image), truth) for image, truth in data], 2)
    np.testing.assert_array_equal(found.confusion.matrix, expected)
    assert expected.min() > 0
    assert found.names == ["background", "class 0"]
    assert 0 < found.boundary.mean_f1 < 1


def test_a_seggpt_by_its_prompt(data):
    model = twins()[1]
    example = picture(40, 50, seed=9)
    prompt = fastseg.keep_prompt(model, example, PixelModel(3).labels(example))
    assert prompt.num_labels == 2
    truths = [truth % 3 for _, truth in data]  # 255 becomes 0
    pairs = [(image, truth) for (image, _), truth in zip(data, truths, strict=True)]
    maps = fastseg.segment(model, [image for image, _ in data], prompts=[prompt])
    expected = matrix_of(
        [(labels.numpy(), truth) for labels, truth in zip(maps, truths, strict=True)], 3
    )
    found = fastseg.evaluate(model, pairs, prompts=[prompt])
    np.testing.assert_array_equal(found.confusion.matrix, expected)
    assert found.names == ["background", "class 1", "class 2"]


def test_reduced_labels(pixel_model, data, monkeypatch):
    """0 becomes 255; 255 stays, which on bytes would become 254."""
    raised = [
        (image, np.where(truth == 255, 0, truth + 1).astype(np.uint8)) for image, truth in data
    ]
    raised[0][1][5] = 255
    expected = evaluate(pixel_model, data, num_labels=CLASSES).confusion.matrix.copy()
    expected -= matrix_of([(pixel_model.labels(data[0][0])[5:6], data[0][1][5:6])], CLASSES)
    reduces = fastseg.SegformerImageProcessor(
        do_resize=False, do_rescale=False, do_normalize=False, do_reduce_labels=True
    )
    for options in ({"reduce_labels": True}, {"processor": reduces}):
        options = {"processor": PLAIN_PROCESSOR} | options
        for dtype in (np.uint8, np.int64):
            as_type = [(image, truth.astype(dtype)) for image, truth in raised]
            found = fastseg.evaluate(pixel_model, as_type, num_labels=CLASSES, **options)
            np.testing.assert_array_equal(found.confusion.matrix, expected)
            assert found.settings["reduce_labels"] is True
    assert not found.remarks
    found = fastseg.evaluate(
        pixel_model, data, num_labels=CLASSES, processor=reduces, reduce_labels=False
    )
    assert found.settings["reduce_labels"] is False


def test_labels_that_seem_shifted_are_told(pixel_model):
    images = [picture(40, 50, seed=seed) for seed in range(3)]
    maps = [pixel_model.labels(image).astype(np.uint8) for image in images]
    up = [(image, (labels + 1).clip(max=4)) for image, labels in zip(images, maps, strict=True)]
    found = evaluate(pixel_model, up, num_labels=CLASSES)
    assert re.search("one class below their label.*reduce_labels=True", str(found))
    down = [(image, labels.clip(min=1) - 1) for image, labels in zip(images, maps, strict=True)]
    found = evaluate(pixel_model, down, num_labels=CLASSES)
    assert re.search("one class above their label.*reduce_labels=False", str(found))


def test_worst_pictures(pixel_model, data):
    found = evaluate(pixel_model, data, num_labels=CLASSES, worst=2)
    ious = []
    for image, truth in data:
        matrix = matrix_of([(pixel_model.labels(image), truth)], CLASSES)
        ious.append(np.mean(np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))))
    order = np.argsort(ious)[:2]
    assert [one.name for one in found.worst] == [f"image {index} of dataset" for index in order]
    assert [one.mean_iou for one in found.worst] == pytest.approx([ious[index] for index in order])
    np.testing.assert_array_equal(found.worst[0].truth, data[order[0]][1])
    np.testing.assert_array_equal(found.worst[0].predicted, pixel_model.labels(data[order[0]][0]))


def test_table_and_json(pixel_model, data):
    found = evaluate(pixel_model, data, num_labels=CLASSES, boundary=True, against="plain")
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["mean_iou"] == found.mean_iou
    assert content["classes"][2]["iou"] == found.iou[2]
    assert np.array_equal(content["confusion_matrix"], found.confusion.matrix)
    assert content["against"]["difference_of_mean_iou"] == 0
    assert content["against"]["equal_labels"] == 1
    assert content["mean_boundary_f1"] == found.boundary.mean_f1
    rows = str(found).splitlines()
    assert rows[1].split()[:3] == ["class", "0", f"{100 * found.iou[0]:.2f}"]
    assert f"{100 * found.mean_iou:.2f} %" in str(found)


def test_classes_in_neither_map_are_named():
    model = PixelModel()
    with torch.no_grad():
        model.layer.bias[3] = -1e6
    image = picture(30, 40)
    truth = model.labels(image)
    found = evaluate(model, [(image, truth)], num_labels=CLASSES)
    assert 3 not in truth
    assert "class 3" in found.absent
    assert "class 3" in str(found).split("in neither map")[1]
    assert found.to_dict()["classes"][3]["iou"] is None
    assert found.mean_iou == 1


def test_memory_does_not_grow_with_the_pictures(pixel_model):
    image = picture(60, 80)
    truth = pixel_model.labels(image).astype(np.uint8)

    def peak(count):
        tracemalloc.start()
        pairs = ((image.copy(), truth.copy()) for _ in range(count))
        evaluate(pixel_model, pairs, num_labels=CLASSES, worst=3)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(5)
    assert peak(120) < 1.05 * peak(20)


def of(labels) -> list:
    return [(picture(*np.shape(labels)), np.array(labels, np.uint8))]


FULL = np.arange(40 * 50).reshape(40, 50) % CLASSES


@pytest.mark.parametrize(
    ("data", "options", "text"),
    [
        ([], {}, "dataset: expected pictures, got none"),
        (of(FULL + 1), {}, "label map 0 of dataset: expected classes from 0 to 4.*got 5 in 400"),
        (
            [*of(FULL), (picture(40, 50), FULL[:, :49])],
            {},
            r"label map 1 of dataset: expected the height and width of image 1 of dataset, turned "
            r"as its EXIF orientation says, \(40, 50\), got \(40, 49\)",
        ),
        (
            of(FULL * 0 + 255),
            {},
            "expected labelled pixels, got 2000 that are all 255.*in 1 pictures",
        ),
        (of(FULL % 2 * 255), {}, "the masks hold 0 and 255 alone, in 1 pictures.*--map binary"),
        (
            [(picture(40, 50), np.zeros((40, 50, 3), np.uint8) + np.arange(3, dtype=np.uint8))],
            {},
            "label map 0 of dataset: expected one label for each pixel.*as in a mask of colours",
        ),
        ([(picture(40, 50), FULL + 0.5)], {}, "label map 0 of dataset: expected whole numbers"),
        (of(FULL), {"split": "train"}, "split: expected None with a dataset that is no folder"),
        (of(FULL), {"worst": -1}, "worst: expected an integer from 0, got -1"),
        (of(FULL), {"num_labels": None}, "num_labels: expected the number of classes"),
        (of(FULL), {"prompts": [1]}, "prompts: expected what fastseg.keep_prompt makes"),
        (
            [*of(FULL), (np.full((40, 50, 3), np.nan), FULL)],
            {"batch_size": 2},
            "image 1 of dataset: expected finite pixels",
        ),
    ],
)
def test_data_that_cannot_be_meant(pixel_model, data, options, text):
    with pytest.raises(ValueError, match=text):
        evaluate(pixel_model, data, **({"num_labels": CLASSES} | options))


def test_masks_of_0_and_255_are_told_early_of_two_classes():
    model = PixelModel(2)
    image, seen = picture(20, 30), []

    def pairs():
        for index in range(100):
            seen.append(index)
            yield image, np.arange(600, dtype=np.uint8).reshape(20, 30) % 2 * 255

    with pytest.raises(ValueError, match="in 16 pictures, and 255 is ignored: where it is class 1"):
        evaluate(model, pairs(), num_labels=2)
    assert len(seen) == 16


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (3, "dataset: expected a folder or an iterable of \\(image, label map\\), got int"),
        ([{"image": 1}], "dataset: expected pairs .*got dict; of rows with columns make pairs"),
        ([(1, 2, 3)], "dataset: expected pairs .*got tuple"),
    ],
)
def test_no_data_set(pixel_model, data, text):
    with pytest.raises(TypeError, match=text):
        evaluate(pixel_model, data, num_labels=CLASSES)

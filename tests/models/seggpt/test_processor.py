"""SegGptImageProcessor against transformers', bit for bit, and what it says where that fails."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import fastseg

RNG = np.random.default_rng(0)
BASE = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
IMAGE = Image.fromarray(BASE).resize((131, 97), Image.Resampling.BICUBIC)
PROMPT = Image.fromarray(BASE[::-1].copy()).resize((100, 75), Image.Resampling.BICUBIC)
MASK = np.kron(RNG.integers(0, 13, (15, 20)), np.ones((5, 5), dtype=int)).astype(np.uint8)
COLOURS = Image.fromarray(np.stack([MASK * 20, MASK * 10, 255 - MASK], axis=-1))
SMALL = {"height": 64, "width": 48}


def both(**options):
    ours = fastseg.SegGptImageProcessor(**options)
    return ours, transformers.SegGptImageProcessor(**options)


def assert_equal(ours, theirs):
    assert sorted(ours) == sorted(theirs)
    for name, their in theirs.items():
        mine, their = (np.asarray(one) for one in (ours[name], their))
        assert mine.dtype == their.dtype
        assert np.array_equal(mine, their), name


CASES = {
    "labels": {"prompt_masks": MASK, "num_labels": 12},
    "labels of a picture": {"prompt_masks": Image.fromarray(MASK), "num_labels": 12},
    "labels of a palette": {"prompt_masks": Image.fromarray(MASK).convert("P"), "num_labels": 12},
    "torch": {"prompt_masks": torch.from_numpy(MASK).long(), "num_labels": 12},
    "150 labels": {"prompt_masks": MASK, "num_labels": 150},
    "no num_labels": {"prompt_masks": MASK * 20},
    "bools, no num_labels": {"prompt_masks": MASK > 5},
    "colours": {"prompt_masks": COLOURS, "do_convert_rgb": False},
    "lists": {"images": [IMAGE, PROMPT], "prompt_images": [PROMPT] * 2}
    | {"prompt_masks": [MASK, MASK[::-1].copy()], "num_labels": 12},
    "a stack": {"prompt_masks": np.stack([MASK] * 3), "num_labels": 12},
    "arrays": {"images": np.asarray(IMAGE), "prompt_images": np.asarray(PROMPT)},
    "size": {"prompt_masks": MASK, "num_labels": 12, "size": SMALL},
    "no resizing": {"prompt_masks": MASK, "num_labels": 12, "do_resize": False},
    "no normalizing": {"prompt_masks": MASK, "num_labels": 12, "do_normalize": False},
    "bilinear": {"resample": Image.Resampling.BILINEAR},
    "a prompt alone": {"images": None, "prompt_masks": MASK, "num_labels": 12},
}


@pytest.mark.filterwarnings("ignore:.*all but black")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("return_tensors", ["pt", "np"])
def test_same_bits(case, return_tensors):
    ours, theirs = both()
    call = {"images": IMAGE, "prompt_images": PROMPT, **case, "return_tensors": return_tensors}
    assert_equal(ours(**call), theirs(**call))


@pytest.mark.parametrize("options", [{"num_labels": 12}, {"size": SMALL, "image_mean": [0.5] * 3}])
def test_options_of_the_constructor(options):
    ours, theirs = both(**options)
    call = {"images": IMAGE, "prompt_images": PROMPT, "prompt_masks": MASK}
    assert_equal(ours(**call, return_tensors="np"), theirs(**call, return_tensors="np"))


def test_a_label_maps_colours_alone():
    """The draft's method."""
    ours, _ = both()
    call = {"prompt_masks": MASK, "num_labels": 12, "return_tensors": "pt"}
    alone = ours.pre_process_semantic_segmentation(**call)
    assert list(alone) == ["prompt_masks"]
    assert torch.equal(alone["prompt_masks"], ours(**call)["prompt_masks"])


@pytest.mark.parametrize("count", [1, 2, 7, 8, 12, 26, 27, 63, 64, 124, 150, 255])
def test_palettes(count):
    ours, theirs = both()
    assert ours.get_palette(count) == theirs.get_palette(count)


def outputs(kind):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(2, 3, 128, 72, generator=generator)
    if kind == "ties":  # of colours that lie between two of the palette, and on the border
        levels = torch.randint(0, 33, masks.shape, generator=generator) / 32
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        masks = (levels - mean[:, None, None]) / std[:, None, None]
    return SimpleNamespace(pred_masks=masks.bfloat16() if kind == "bfloat16" else masks)


SIZES = {
    "none": None,
    "larger": [(101, 150), (64, 72)],
    "smaller": [(31, 20), (1, 1)],
    "wide": [(20, 300), (300, 7)],
}


@pytest.mark.parametrize("kind", ["noise", "ties", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("count", [None, 1, 12, 63, 150])
def test_label_maps_are_transformers(kind, sizes, count):
    ours, theirs = both()
    given = outputs(kind)
    expected = theirs.post_process_semantic_segmentation(given, sizes, count)
    for form in (given, given.pred_masks, {"pred_masks": given.pred_masks}):
        found = ours.post_process_semantic_segmentation(form, sizes, count)
        for mine, their in zip(found, expected, strict=True):
            assert mine.dtype == their.dtype
            assert torch.equal(mine, their)


@pytest.mark.parametrize("sizes", [None, [(101, 150), (31, 20)]])
@pytest.mark.parametrize("count", [None, 12])
def test_scores(sizes, count):
    ours, theirs = both()
    given = outputs("noise")
    results = [
        one.post_process_semantic_segmentation(given, sizes, count, return_segmentation_scores=True)
        for one in (ours, theirs)
    ]
    for mine, their in zip(*results, strict=True):
        assert torch.equal(mine.segmentation, their.segmentation)
        if count is None:
            assert mine.segmentation_scores is their.segmentation_scores is None
        else:
            assert torch.equal(mine.segmentation_scores, their.segmentation_scores)


def test_what_is_painted_comes_back():
    """One num_labels for both ways."""
    processor = fastseg.SegGptImageProcessor(num_labels=12, do_resize=False)
    painted = processor(prompt_masks=MASK, return_tensors="pt")["prompt_masks"]
    stacked = torch.cat([torch.zeros_like(painted), painted], dim=2)
    (found,) = processor.post_process_semantic_segmentation(stacked)
    assert np.array_equal(found, MASK)


WRONG = {
    "above": ({"prompt_masks": MASK, "num_labels": 5}, r"prompt_masks\[0\]: .* 5, num_labels; got"),
    "ignored": (
        {"prompt_masks": np.where(MASK > 9, 255, MASK), "num_labels": 12},
        r"got 255; where it stands for pixels without a class, make these 0",
    ),
    "negative": ({"prompt_masks": MASK.astype(int) - 1, "num_labels": 12}, "got -1"),
    "no byte": ({"prompt_masks": MASK.astype(int) * 40}, "expected labels from bytes; got 480"),
    "fractions": ({"prompt_masks": MASK / 2, "num_labels": 12}, "expected whole numbers"),
    "colours": (
        {"prompt_masks": COLOURS, "num_labels": 12},
        r"prompt_masks\[0\]: .* as in a mask of colours.* or pass do_convert_rgb=False",
    ),
    "grey as colours": (
        {"prompt_masks": MASK, "do_convert_rgb": False},
        r"prompt_masks\[0\]: expected 3 channels.*True for label maps",
    ),
    "nothing": ({"images": None, "prompt_images": None}, "expected images, prompt_images or"),
    "prompt": ({"prompt_images": np.zeros((5, 5, 7))}, r"prompt_images\[0\]: expected"),
    "num_labels": ({"num_labels": 0}, "num_labels: expected at least 1, got 0"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_what_is_wrong(call, message):
    processor = fastseg.SegGptImageProcessor()
    with pytest.raises(ValueError, match=message):
        processor(**{"images": IMAGE, "prompt_images": PROMPT, **call})


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "1"])
def test_pictures_of_other_modes(mode):
    """transformers fails on them; they are taken as RGB."""
    ours, theirs = both()
    picture = IMAGE.convert(mode)
    expected = theirs(images=picture.convert("RGB"), return_tensors="np")
    assert_equal(ours(images=picture, return_tensors="np"), expected)


def test_bools_and_floats_of_whole_values():
    """As class numbers, where transformers gives a TypeError."""
    ours = fastseg.SegGptImageProcessor()
    bools = ours(prompt_masks=MASK > 5, num_labels=1, return_tensors="np")
    numbers = (MASK > 5).astype(int)
    assert_equal(bools, ours(prompt_masks=numbers, num_labels=1, return_tensors="np"))
    floats = ours(prompt_masks=MASK.astype(np.float32), num_labels=12, return_tensors="np")
    assert_equal(floats, ours(prompt_masks=MASK, num_labels=12, return_tensors="np"))


@pytest.mark.parametrize(
    ("mask", "num_labels", "message"),
    [
        (MASK > 5, None, "holds 1 at most, of 255, which is all but black; pass num_labels=1"),
        (MASK * 0, 12, "is all of one colour"),
        (MASK * 0 + 3, 12, "is all of one colour"),
        (MASK * 0 + 255, None, "is all of one colour"),
    ],
)
def test_masks_that_show_nothing(mask, num_labels, message):
    first = MASK * (1 if num_labels else 20)
    with pytest.warns(UserWarning, match=rf"prompt_masks\[1\]: {message}"):
        fastseg.SegGptImageProcessor()(prompt_masks=[first, mask], num_labels=num_labels)


def test_masks_of_two_colours_are_fine():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastseg.SegGptImageProcessor()(prompt_masks=MASK > 5, num_labels=1)
        fastseg.SegGptImageProcessor()(prompt_masks=(MASK > 5) * 255)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (SimpleNamespace(logits=torch.zeros(1, 3, 4, 4)), "with pred_masks"),
        (torch.zeros(1, 4, 4, 4), r"expected floating-point pred_masks"),
        (torch.zeros(1, 3, 4, 4).long(), r"expected floating-point pred_masks"),
    ],
)
def test_wrong_outputs(outputs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fastseg.SegGptImageProcessor().post_process_semantic_segmentation(outputs)
    with pytest.raises(ValueError, match="target_sizes: expected"):
        fastseg.SegGptImageProcessor().post_process_semantic_segmentation(
            torch.zeros(1, 3, 4, 4), [(1, 1), (2, 2)]
        )


def test_files_both_ways(tmp_path):
    _, theirs = both(size=SMALL, num_labels=7)
    call = {"images": IMAGE, "prompt_images": PROMPT, "prompt_masks": MASK // 2}
    expected = theirs(**call, return_tensors="np")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = fastseg.SegGptImageProcessor.from_pretrained(tmp_path / "theirs")
    assert_equal(loaded(**call, return_tensors="np"), expected)
    loaded.save_pretrained(tmp_path / "ours")
    again = transformers.SegGptImageProcessor.from_pretrained(tmp_path / "ours")
    assert_equal(again(**call, return_tensors="np"), expected)
    stored = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "SegGptImageProcessor"
    assert "do_reduce_labels" not in stored
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert type(found).__name__.startswith("SegGptImageProcessor")


def test_an_unknown_option():
    with pytest.raises(TypeError, match="do_reduce_labels: no such option; expected one of"):
        fastseg.SegGptImageProcessor()(images=IMAGE, do_reduce_labels=True)

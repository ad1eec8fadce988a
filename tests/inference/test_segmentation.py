"""`segment`, whole images and sliding windows, against the same done step by step."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastseg
from fastseg.cli.options import EMBEDDED_MODEL
from fastseg.inference.sliding import window_starts
from tests.inference.segment_cases import mmseg_logits, picture
from tests.model_cases import TINY, randomize, relative_error, tiny_model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = fastseg.SegformerForSemanticSegmentation(fastseg.SegformerConfig(**TINY)).eval()
    randomize(model)
    return model


def agree(labels, expected, least=0.999):
    """Different kernels round differently: all but pixels next to a tie must agree."""
    assert labels.shape == expected.shape
    assert (labels == expected).float().mean() >= least


def whole_image(model, image, processor):
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad(), fastseg.plain_path():
        logits = model(pixel_values).logits
    size = (image.height, image.width)
    logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits.argmax(1)[0]


SMALL = fastseg.SegformerImageProcessor(size={"height": 64, "width": 96})


def test_labels_can_be_edited(model):
    labels = fastseg.segment(model, picture(50, 70), processor=SMALL)[0]
    labels[0] = 255
    assert (labels[0] == 255).all()


@pytest.mark.parametrize("slide", [None, (64, 40)])
def test_one_class_is_there_or_not(slide):
    config = fastseg.SegformerConfig(**{**TINY, "num_labels": 1})
    model = fastseg.SegformerForSemanticSegmentation(config).eval()
    randomize(model)
    with torch.no_grad():
        model.decode_head.classifier.bias.zero_()
    processor = fastseg.SegformerImageProcessor(do_resize=False)
    image = picture(64, 64)
    labels = fastseg.segment(model, image, processor=processor, slide=slide)[0]
    with torch.no_grad(), fastseg.plain_path():
        logits = model(processor(image, return_tensors="pt")["pixel_values"]).logits
    resized = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)[0, 0]
    agree(labels, (resized > 0).long())
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_image_at_its_own_size(model, batch_size):
    images = [picture(*size, seed) for seed, size in enumerate([(50, 70), (131, 64), (50, 70)])]
    labels = fastseg.segment(model, images, processor=SMALL, batch_size=batch_size)
    for result, image in zip(labels, images, strict=True):
        agree(result, whole_image(model, image, SMALL))
    assert not torch.equal(labels[0], labels[2])


def test_images_that_stay_of_different_sizes(model):
    processor = fastseg.SegformerImageProcessor(do_resize=False)
    images = [picture(64, 64, 1), picture(96, 70, 2), picture(64, 64, 3)]
    for result, image in zip(
        fastseg.segment(model, images, processor=processor), images, strict=True
    ):
        agree(result, whole_image(model, image, processor))


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image,
        np.asarray,
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
        lambda image: np.asarray(image)[None],
        lambda image: [image],
    ],
    ids=["PIL", "numpy", "torch", "batch", "list"],
)
def test_kinds_of_images(model, convert):
    image = picture(50, 70)
    labels = fastseg.segment(model, convert(image), processor=SMALL)
    assert len(labels) == 1
    agree(labels[0], whole_image(model, image, SMALL))


def test_half_precision_model(model):
    image = picture(50, 70)
    expected = whole_image(model, image, SMALL)
    labels = fastseg.segment(model.bfloat16(), image, processor=SMALL)[0]
    model.float()
    agree(labels, expected, least=0.9)


def test_the_processor_saved_with_the_model_is_used(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    SMALL.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    loaded = fastseg.from_pretrained("model")
    monkeypatch.chdir("/")
    image = picture(50, 70)
    agree(fastseg.segment(loaded, image)[0], whole_image(model, image, SMALL))
    wrapped = torch.nn.DataParallel(loaded).eval()
    agree(fastseg.segment(wrapped, image)[0], whole_image(model, image, SMALL))


def test_a_missing_processor_is_told(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no preprocessor_config\.json"):
        fastseg.segment(fastseg.from_pretrained(tmp_path), picture(50, 70))


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("options", [{}, {"slide": (64, 40)}, {"tta": ["flip"]}])
@pytest.mark.parametrize("threshold", [None, 0.4])
def test_labels_of_8_bits_are_the_same(classes, options, threshold):
    model = tiny_model(num_labels=classes)
    options |= {"processor": SMALL, "threshold": threshold}
    images = [picture(70, 90), picture(64, 64, 1)]
    expected = fastseg.segment(model, images, **options)
    found = fastseg.segment(model, images, dtype=torch.uint8, **options)
    for labels, wide in zip(found, expected, strict=True):
        assert labels.dtype == torch.uint8
        assert wide.dtype == torch.int64
        assert torch.equal(labels.long(), wide)


def test_wrong_dtype_of_labels(model):
    with pytest.raises(ValueError, match=r"dtype: expected one of .*uint8, got torch.int32"):
        fastseg.segment(model, picture(50, 70), processor=SMALL, dtype=torch.int32)
    for options in ({}, {"slide": (64, 64)}, {"tta": ["flip"]}):
        with pytest.raises(ValueError, match="uint8 tells 256 classes apart, the model has 257"):
            fastseg.segment(
                tiny_model(num_labels=257),
                picture(50, 70),
                processor=SMALL,
                dtype=torch.uint8,
                **options,
            )


# Sliding windows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((150, 201), 64, 40),
        ((150, 201), 64, 64),
        ((128, 128), 64, 32),
        ((150, 90), (96, 64), (50, 30)),
        ((50, 201), 64, 40),  # lower than a window
        ((50, 60), 64, 40),  # smaller than a window
        ((200, 70), 64, 20),  # each row under several window rows
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_slide_as_mmseg(model, size, crop, stride, batch_size):
    image = picture(*size)
    processor = fastseg.SegformerImageProcessor()
    pixel_values = processor(image, return_tensors="pt", do_resize=False)["pixel_values"]
    pair = [(value, value) if isinstance(value, int) else value for value in (crop, stride)]
    labels = fastseg.segment(
        model, image, processor=processor, slide=(crop, stride), batch_size=batch_size
    )
    agree(labels[0], mmseg_logits(model, pixel_values, *pair).argmax(1)[0])


def test_slide_in_small_stripes(model, monkeypatch):
    monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", 1000)
    image = picture(150, 201)
    pixel_values = fastseg.SegformerImageProcessor()(image, return_tensors="pt", do_resize=False)
    expected = mmseg_logits(model, pixel_values["pixel_values"], (64, 64), (40, 40))
    agree(fastseg.segment(model, image, slide=(64, 40))[0], expected.argmax(1)[0])


def test_windows_are_batched(model):
    sizes = []
    handle = model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    fastseg.segment(model, picture(64, 300), slide=(64, 40), batch_size=3)
    handle.remove()
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("size", [1, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize(("crop", "stride"), [(64, 64), (64, 1), (64, 43)])
def test_windows_cover_an_axis(size, crop, stride):
    starts = window_starts(size, crop, stride)
    covered = {position for start in starts for position in range(start, start + min(crop, size))}
    assert covered == set(range(size))
    assert len(starts) == 1 + max(0, math.ceil((size - crop) / stride))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size: .*0"),
        ({"batch_size": "3"}, "batch_size: .*'3'"),
        ({"slide": (512.0, 256)}, "slide: .*crop.*512.0"),
        ({"slide": 64}, "slide: .*64"),
        ({"slide": (64, 40, 3)}, "slide: .*3"),
        ({"slide": (64, 0)}, "slide: .*stride.* 0"),
        ({"slide": (64, 65)}, "slide: .*65"),
        ({"slide": ((64, 2.5), 40)}, "slide: .*crop.*2.5"),
    ],
)
def test_wrong_options(model, options, text):
    with pytest.raises(ValueError, match=text):
        fastseg.segment(model, picture(100, 100), **options)


def test_training_mode_and_wrong_images(model):
    with pytest.raises(ValueError, match="training mode"):
        fastseg.segment(model.train(), picture(9, 9))
    model.eval()
    with pytest.raises(TypeError, match="images"):
        fastseg.segment(model, "cat.png")


def photograph():
    """An astronaut's portrait of 600 x 512, which matplotlib comes with."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return Image.open(path).convert("RGB")


@pytest.mark.parametrize("slide", [None, (256, 192)])
def test_bytes_give_the_labels_of_floats(monkeypatch, slide):
    """Rescaled and normalised in the first op, against the processor's own arithmetic."""
    model = fastseg.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    fed = []
    model.register_forward_pre_hook(lambda module, arguments: fed.append(arguments[0].dtype))
    labels = fastseg.segment(model, photograph(), slide=slide)[0]
    monkeypatch.setattr(type(model), "takes_bytes", False)
    expected = fastseg.segment(model, photograph(), slide=slide)[0]
    assert fed == [torch.uint8] * (len(fed) // 2) + [torch.float32] * (len(fed) // 2)
    assert len(labels.unique()) > 3
    assert torch.equal(labels, expected)


def test_a_scale_and_an_offset_of_pixels(model):
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    scale, offset = torch.tensor([0.01, 0.02, 0.03]), torch.tensor([-2.0, 1.0, 0.5])
    with torch.no_grad():
        floats = pixels.double() * scale[:, None, None] + offset[:, None, None]
        with fastseg.plain_path():
            expected = copy.deepcopy(model).double()(floats).logits
            plain = model(pixels, pixel_scale=scale, pixel_offset=offset).logits
        folded = model(pixels, pixel_scale=scale, pixel_offset=offset).logits
        embed = model.segformer.encoder.patch_embeddings[0]
        handle = embed.register_forward_hook(lambda *arguments: None)
        by_its_own_code = model(pixels, pixel_scale=scale, pixel_offset=offset).logits
        handle.remove()
    for result in (plain, folded, by_its_own_code):
        assert relative_error(result, expected) <= 2e-6
    with pytest.raises(TypeError, match="pixel_values: .*uint8"), torch.no_grad():
        model(pixels)


@pytest.mark.parametrize("slide", [None, (48, 32)])
@pytest.mark.parametrize("kind", ["L", "I;16", "floats", "whole numbers", "tensor"])
def test_other_images_than_colour_photographs(model, monkeypatch, kind, slide):
    image = picture(80, 100)
    pixels = np.asarray(image)
    image = {
        "L": lambda: image.convert("L"),
        "I;16": lambda: Image.fromarray(pixels[..., 0].astype(np.uint16)),
        "floats": lambda: (pixels / 255).astype(np.float32),
        "whole numbers": lambda: pixels.astype(np.int64),
        "tensor": lambda: torch.from_numpy(pixels.copy()).permute(2, 0, 1),
    }[kind]()
    options = {"do_rescale": kind != "floats", "size": {"height": 64, "width": 96}}
    processor = fastseg.SegformerImageProcessor(**options)
    labels = fastseg.segment(model, image, processor=processor, slide=slide)[0]
    monkeypatch.setattr(type(model), "takes_bytes", False)
    expected = fastseg.segment(model, image, processor=processor, slide=slide)[0]
    assert len(expected.unique()) > 1
    agree(labels, expected)

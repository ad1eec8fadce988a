"""What `segment` takes: floats in [0, 1], many bands, pictures too small for a model."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import fastseg
from tests.model_cases import TINY, tiny_model, twins

SIZE = (80, 100)
RESIZED = fastseg.SegformerImageProcessor(size={"height": 64, "width": 96})


@functools.cache
def a_model(**config):
    """A model of random weights whose maps of pictures have several classes."""
    torch.manual_seed(0)
    model = tiny_model(**config)
    bands = model.config.num_channels
    pixels = torch.from_numpy(picture(*SIZE, bands)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        model.decode_head.classifier.bias -= model(2 * pixels - 1).logits.mean((0, 2, 3))
    return model


def picture(height, width, bands=3, seed=0):
    """Smooth bands, as a noisy one has too many pixels next to a tie."""
    coarse = np.random.default_rng(seed).integers(0, 256, (bands, 5, 6), dtype=np.uint8)
    size = (width, height)
    smooth = [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in coarse]
    return np.stack([np.asarray(one) for one in smooth], axis=-1)


def agree(labels, expected, least=0.999):
    assert labels.shape == expected.shape
    assert len(expected.unique()) > 1
    assert (labels == expected).float().mean() >= least


def mmseg_labels(model, image, mean, std, least=1, slide=None):
    """mmseg in float64: normalizing, SegDataPreProcessor's padding to (least, least), the windows
    or the whole, the removal of the padding, argmax."""
    model = copy.deepcopy(model).double()
    pixels = torch.from_numpy(image).double().permute(2, 0, 1)[None] / 255
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    shape = pixels.shape[2:]
    pixels = F.pad(pixels, (0, max(least - shape[1], 0), 0, max(least - shape[0], 0)))
    height, width = pixels.shape[2:]
    crop, stride = slide or (max(height, width), 1)
    canvas, count = torch.zeros(1, 1, height, width).double(), torch.zeros(1, 1, height, width)
    for row in range(max(height - crop + stride - 1, 0) // stride + 1):
        for column in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            window = pixels[:, :, top:bottom, left:right]
            with torch.no_grad():
                logits = model(window).logits
            logits = F.interpolate(logits, window.shape[2:], mode="bilinear", align_corners=False)
            canvas = canvas + F.pad(logits, (left, width - right, top, height - bottom))
            count[:, :, top:bottom, left:right] += 1
    return (canvas / count)[0, :, : shape[0], : shape[1]].argmax(0)


# -- floats


@pytest.mark.parametrize("slide", [None, (48, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_in_0_to_1_have_the_map_of_the_bytes(dtype, slide, recwarn):
    image = picture(*SIZE)
    expected = fastseg.segment(a_model(), image, processor=RESIZED, slide=slide)[0]
    tensor = (torch.from_numpy(image).permute(2, 0, 1) / 255).to(dtype)
    given = [tensor, tensor[None]]
    if dtype != torch.bfloat16:
        given.append(tensor.permute(1, 2, 0).numpy())
    for one in given:
        labels = fastseg.segment(a_model(), one, processor=RESIZED, slide=slide)[0]
        # bfloat16 has 8 bits, and rounds bytes of more than 7.
        agree(labels, expected, least=0.97 if dtype == torch.bfloat16 else 0.999)
    assert not recwarn.list


@pytest.mark.parametrize("slide", [None, (48, 32)])
def test_grey_floats_of_pil(slide, recwarn):
    grey = picture(*SIZE)[..., 0]
    expected = fastseg.segment(a_model(), grey, processor=RESIZED, slide=slide)[0]
    image = Image.fromarray((grey / 255).astype(np.float32))
    agree(fastseg.segment(a_model(), image, processor=RESIZED, slide=slide)[0], expected)
    assert not recwarn.list


def test_floats_stay_where_the_processor_does_not_rescale():
    processor = fastseg.SegformerImageProcessor(do_rescale=False, do_resize=False)
    image = picture(*SIZE)
    expected = mmseg_labels(a_model(), image, processor.image_mean, processor.image_std)
    agree(fastseg.segment(a_model(), image / 255, processor=processor)[0], expected)


@pytest.mark.parametrize("rescale_factor", [1 / 255, 1 / 127.5])
def test_floats_are_rescaled_as_the_processor_says(rescale_factor):
    """A processor for [-1, 1] divides by 127.5."""
    options = {"image_mean": [1.0] * 3, "image_std": [1.0] * 3, "do_resize": False}
    processor = fastseg.SegformerImageProcessor(rescale_factor=rescale_factor, **options)
    image = picture(*SIZE)
    scale = rescale_factor * 255
    expected = mmseg_labels(a_model(), image, [1 / scale] * 3, [1 / scale] * 3)
    agree(fastseg.segment(a_model(), image / 255, processor=processor)[0], expected)


def test_floats_of_another_range_are_told():
    normalized = np.linspace(-2, 2.6, 64 * 64 * 3).reshape(64, 64, 3)
    with pytest.raises(ValueError, match=r"images\[1\]: expected whole numbers in \[0, 255\] or"):
        fastseg.segment(a_model(), [picture(64, 64), normalized], processor=RESIZED)
    with pytest.warns(UserWarning, match="use an image processor with do_rescale=False"):
        fastseg.segment(a_model(), normalized, processor=RESIZED, slide=(64, 64))


# -- bands


@pytest.mark.every(5)
@pytest.mark.parametrize("slide", [None, (48, 32)])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bands", [1, 2, 4, 5, 6, 10])
def test_models_of_many_bands(bands, normalize, slide):
    """Where nothing is normalized the model's num_channels says where the bands are."""
    model = a_model(num_channels=bands)
    mean, std = [0.3 + 0.04 * i for i in range(bands)], [0.2 + 0.01 * i for i in range(bands)]
    options = {"image_mean": mean, "image_std": std} if normalize else {"do_normalize": False}
    processor = fastseg.SegformerImageProcessor(do_resize=False, **options)
    image = picture(*SIZE, bands)
    if not normalize:
        mean, std = [0.0], [1.0]
    expected = mmseg_labels(model, image, mean, std, slide=slide)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for given in (image, tensor, tensor / 255, image[None]):
        agree(fastseg.segment(model, given, processor=processor, slide=slide)[0], expected)


def test_six_bands_resized():
    model = a_model(num_channels=6)
    options = {"image_mean": [0.4] * 6, "image_std": [0.2] * 6}
    processor = fastseg.SegformerImageProcessor(size={"height": 64, "width": 96}, **options)
    image = picture(*SIZE, 6)
    bands = [Image.fromarray(image[..., i]) for i in range(6)]
    small = np.stack([one.resize((96, 64), Image.Resampling.BILINEAR) for one in bands], axis=-1)
    pixels = (torch.from_numpy(small).double().permute(2, 0, 1)[None] / 255 - 0.4) / 0.2
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(pixels).logits
    expected = F.interpolate(logits, SIZE, mode="bilinear", align_corners=False)[0].argmax(0)
    agree(fastseg.segment(model, image, processor=processor)[0], expected)


def test_a_processor_of_other_channels_than_the_model():
    model = a_model(num_channels=6)
    with pytest.raises(ValueError, match="processor: expected an image_mean.*of 6 values.*got 3"):
        fastseg.segment(model, picture(64, 64, 6))


def test_both_ends_could_be_the_channels():
    strip = picture(3, 64)
    with pytest.raises(ValueError, match=r"images\[0\]: .*both ends.*pass input_data_format="):
        fastseg.segment(a_model(), strip, processor=RESIZED)
    expected = fastseg.segment(a_model(), Image.fromarray(strip), processor=RESIZED)[0]
    for given, end in ((strip, "last"), (strip.transpose(2, 0, 1), "first")):
        labels = fastseg.segment(
            a_model(), given, processor=RESIZED, input_data_format=f"channels_{end}"
        )
        assert torch.equal(labels[0], expected)
    with pytest.raises(ValueError, match="input_data_format: expected None.*got 'HWC'"):
        fastseg.segment(a_model(), strip, input_data_format="HWC")


# -- small pictures


def least_that_runs(model, bands=3):
    """Found by trying."""
    for side in range(1, 100):
        try:
            with torch.no_grad():
                model(torch.zeros(1, bands, side, side))
        except (ValueError, RuntimeError):
            continue
        return side
    raise AssertionError


CONFIGS = [{}, {"sr_ratios": [4, 2, 2, 2]}, {"sr_ratios": [1, 1, 1, 1], "strides": [2, 2, 2, 2]}]


@pytest.mark.every(5)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("size", [(20, 300), (300, 20), (5, 7), (28, 28), (29, 30), (40, 1)])
@pytest.mark.parametrize("slide", [None, (64, 40)])
def test_small_pictures_are_padded_as_by_mmseg(config, size, slide):
    config = {name: tuple(values) for name, values in config.items()}
    model = a_model(**config)
    processor = fastseg.SegformerImageProcessor(do_resize=False)
    image = picture(*size)
    least = least_that_runs(model)
    expected = mmseg_labels(
        model, image, processor.image_mean, processor.image_std, least=least, slide=slide
    )
    labels = fastseg.segment(model, image, processor=processor, slide=slide)[0]
    assert labels.shape == expected.shape == size
    assert (labels == expected).float().mean() >= 0.999


def test_small_pictures_among_others():
    processor = fastseg.SegformerImageProcessor(do_resize=False)
    images = [picture(*size, seed=i) for i, size in enumerate([(20, 64), (29, 64), (20, 64)])]
    together = fastseg.segment(a_model(), images, processor=processor)
    for labels, image in zip(together, images, strict=True):
        expected = mmseg_labels(
            a_model(), image, processor.image_mean, processor.image_std, least=29
        )
        agree(labels, expected)


@pytest.mark.parametrize("slide", [None, (64, 40)])
def test_a_small_picture_and_transformers_model(slide):
    theirs, ours = twins(**TINY)
    processor = fastseg.SegformerImageProcessor(do_resize=False)
    image = picture(20, 120)
    expected = mmseg_labels(theirs, image, processor.image_mean, processor.image_std, 29, slide)
    for model in (ours, theirs, fastseg.accelerate(theirs)):
        agree(fastseg.segment(model, image, processor=processor, slide=slide)[0], expected)


def test_one_class_of_a_small_picture():
    model = a_model(num_labels=1)
    processor = fastseg.SegformerImageProcessor(do_resize=False, size=(64, 64))
    labels = fastseg.segment(model, picture(20, 90), processor=processor)[0]
    assert labels.shape == (20, 90)
    assert set(labels.unique().tolist()) <= {0, 1}


def test_windows_that_are_too_small_for_the_model():
    with pytest.raises(ValueError, match="slide: expected a crop of at least 29 pixels.*got 20"):
        fastseg.segment(a_model(), picture(64, 64), slide=(20, 10))
    with pytest.raises(ValueError, match=r"slide: .*at least 29.*got \(64, 28\)"):
        fastseg.segment(a_model(), picture(64, 64), slide=((64, 28), 10))


def test_an_image_processor_of_transformers():
    theirs = transformers.SegformerImageProcessorPil(size={"height": 64, "width": 96})
    for image in (Image.fromarray(picture(*SIZE)), picture(*SIZE), picture(*SIZE) / 255):
        (labels,) = fastseg.segment(a_model(), image, processor=theirs)
        (expected,) = fastseg.segment(a_model(), image, processor=RESIZED)
        agree(labels, expected)

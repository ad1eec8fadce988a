"""Test-time augmentation against mmseg's way, step by step, with maps of all classes in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastseg

from .segment_cases import mmseg_logits, picture

SIZE = (90, 131)
PROCESSOR = fastseg.SegformerImageProcessor(size={"height": 64, "width": 96})


def make_model(num_labels: int) -> fastseg.SegformerForSemanticSegmentation:
    torch.manual_seed(0)
    config = fastseg.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=16,
        num_labels=num_labels,
    )
    model = fastseg.SegformerForSemanticSegmentation(config).eval()
    with torch.no_grad():  # no class ahead of the others on average
        pixels = PROCESSOR(picture(*SIZE), return_tensors="pt").pixel_values
        model.decode_head.classifier.weight *= 40
        model.decode_head.classifier.bias -= model(pixels).logits.mean(dim=(0, 2, 3))
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(5)


def mean_probabilities(model, image, size, scales, mirrored, slide=None) -> torch.Tensor:
    """SegTTAModel.merge_preds: (K, H, W) in float64. `size` is that of the view at scale 1."""
    total, views = 0, 0
    for scale, mirror in itertools.product(scales, mirrored):
        height, width = (int(side * scale + 0.5) for side in size)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = PROCESSOR(resized, return_tensors="pt", do_resize=False).pixel_values
        pixels = pixels.flip(3) if mirror else pixels
        if slide is None:
            with torch.no_grad(), fastseg.plain_path():
                logits = model(pixels).logits
        else:
            logits = mmseg_logits(model, pixels, *slide)
        logits = logits.flip(3) if mirror else logits
        full = F.interpolate(
            logits.double(), size=image.size[::-1], mode="bilinear", align_corners=False
        )[0]
        total = total + (full.softmax(0) if len(full) > 1 else full.sigmoid())
        views += 1
    return total / views


def check(labels, scores, expected) -> None:
    top = expected.topk(2, dim=0).values
    clear = top[0] - top[1] > 1e-5
    assert clear.double().mean() > 0.99
    assert len(labels.unique()) > 2
    assert labels.dtype == torch.int64
    assert torch.equal(labels[clear], expected.argmax(0)[clear])
    torch.testing.assert_close(scores.double(), top[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("tta", "scales", "mirrored"),
    [
        (["flip"], [1], [False, True]),
        (("flip", 0.75, 1.25), [1, 0.75, 1.25], [False, True]),
        ([1.5, 1], [1, 1.5], [False]),
    ],
)
def test_whole_images_as_mmseg(model, tta, scales, mirrored):
    image = picture(*SIZE)
    labels, scores = fastseg.segment(
        *(model, [image]),
        processor=PROCESSOR,
        tta=tta,
        return_scores=True,
        scores_dtype=torch.float32,
    )
    check(labels[0], scores[0], mean_probabilities(model, image, (64, 96), scales, mirrored))
    # What the views change is more than what is compared.
    assert (labels[0] != fastseg.segment(model, image, processor=PROCESSOR)[0]).any()


def test_sliding_windows_as_mmseg(model, monkeypatch):
    monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", 1 << 14)
    image = picture(*SIZE)
    labels, scores = fastseg.segment(
        *(model, [image]),
        processor=PROCESSOR,
        slide=((64, 80), (48, 40)),
        tta=("flip", 0.75, 1.25),
        return_scores=True,
        scores_dtype=torch.float32,
    )
    expected = mean_probabilities(
        model, image, SIZE, [1, 0.75, 1.25], [False, True], ((64, 80), (48, 40))
    )
    check(labels[0], scores[0], expected)


def test_images_of_their_own_sizes_in_one_call(model):
    images = [picture(*SIZE), picture(50, 40, seed=1)]
    maps = fastseg.segment(model, images, processor=PROCESSOR, tta=["flip"])
    assert [tuple(labels.shape) for labels in maps] == [SIZE, (50, 40)]
    for image, labels in zip(images, maps, strict=True):
        alone = fastseg.segment(model, image, processor=PROCESSOR, tta=["flip"])[0]
        assert torch.equal(labels, alone)


def test_a_small_image_is_mirrored_within_its_padding(model):
    """Its mirror image gives the mirrored map, as views of both are the same."""
    image = picture(20, 23)
    assert fastseg.inference.steps.least_side(model) > 23
    options = {"processor": fastseg.SegformerImageProcessor(do_resize=False), "tta": ["flip"]}
    labels = fastseg.segment(model, image, **options)[0]
    mirror = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert (fastseg.segment(model, mirror, **options)[0].flip(1) == labels).double().mean() > 0.99
    assert len(labels.unique()) > 1


def test_one_class_is_there_where_its_mean_probability_is():
    model, image = make_model(1), picture(*SIZE)
    expected = mean_probabilities(model, image, (64, 96), [1, 0.75], [False, True])[0]
    for threshold in (None, expected.quantile(0.3).item()):
        labels = fastseg.segment(
            model, image, processor=PROCESSOR, tta=["flip", 0.75], threshold=threshold
        )[0]
        clear = (expected - (threshold or 0.5)).abs() > 1e-5
        assert torch.equal(labels[clear], (expected > (threshold or 0.5)).long()[clear])
        assert 0 < labels.double().mean() < 1


@pytest.mark.parametrize(
    ("tta", "text"),
    [
        ("flip", "tta: expected a list of 'flip' and scales, got 'flip'"),
        ([], "tta: expected a list"),
        (["mirror"], "tta: expected 'flip' or scales above 0, got 'mirror'"),
        ([0], "tta: expected 'flip' or scales above 0, got 0"),
        ([True], "tta: expected 'flip' or scales above 0, got True"),
    ],
)
def test_wrong_views(model, tta, text):
    with pytest.raises(ValueError, match=text):
        fastseg.segment(model, picture(*SIZE), processor=PROCESSOR, tta=tta)

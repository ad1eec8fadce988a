"""Scores beside label maps and labels by a threshold, against transformers' and mmseg's logits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.models.segformer.image_processing_pil_segformer import (
    SegformerImageProcessorPil,
)

import fastseg
from tests.inference.segment_cases import mmseg_logits, picture
from tests.memory_cases import LargestTensor
from tests.model_cases import TINY, tiny_model, twins

SIZE = {"height": 64, "width": 96}
SMALL = fastseg.SegformerImageProcessor(size=SIZE)
WHOLE = fastseg.SegformerImageProcessor(do_resize=False)
IMAGES = [picture(50, 70, 1), picture(131, 64, 2), picture(50, 70, 3)]


@pytest.fixture(scope="module")
def models():
    """transformers' and fastseg's."""
    torch.manual_seed(0)
    return twins(**TINY)


@pytest.fixture(scope="module")
def one_class():
    """A model whose logit is positive in about half of a picture."""
    torch.manual_seed(0)
    model = tiny_model(num_labels=1)
    pixels = WHOLE(picture(64, 80), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        classifier = model.decode_head.classifier
        scale = model(pixels).logits.std()
        classifier.weight /= scale
        classifier.bias -= model(pixels).logits.median()
    return model


def expected_probabilities(hf_model, image):
    """The softmax (K, H, W) of what transformers' post-processing gives, in float64."""
    processor = SegformerImageProcessorPil(size=SIZE)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        outputs = copy.deepcopy(hf_model).double()(pixels.double())
    (processed,) = processor.post_process_semantic_segmentation(
        outputs, target_sizes=[(image.height, image.width)], return_segmentation_scores=True
    )
    return processed["segmentation_scores"].softmax(dim=0)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_probability_of_the_winning_class(models, batch_size):
    hf_model, model = models
    labels, scores = fastseg.segment(
        model, IMAGES, processor=SMALL, batch_size=batch_size, return_scores=True
    )
    alone = fastseg.segment(model, IMAGES, processor=SMALL, batch_size=batch_size)
    for image, label_map, score, without in zip(IMAGES, labels, scores, alone, strict=True):
        expected = expected_probabilities(hf_model, image).amax(dim=0)
        assert score.dtype == torch.float16
        assert score.shape == label_map.shape == (image.height, image.width)
        assert score.std() > 0.02
        assert (score.double() - expected).abs().max() < 2.0**-11 + 1e-5
        assert torch.equal(label_map, without)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 5e-4), (torch.uint8, 0.501)]
)
def test_dtypes(models, dtype, bound):
    hf_model, model = models
    options = {"processor": SMALL, "return_scores": True, "scores_dtype": dtype}
    _, (score,) = fastseg.segment(model, IMAGES[0], **options)
    expected = expected_probabilities(hf_model, IMAGES[0]).amax(dim=0)
    expected = 255 * expected if dtype == torch.uint8 else expected
    assert score.dtype == dtype
    assert (score.double() - expected).abs().max() < bound


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [
        ((150, 201), (64, 64), (40, 40)),
        ((150, 90), (96, 64), (50, 30)),
        ((50, 60), (64, 64), (40, 40)),  # smaller than a window
        ((200, 70), (64, 64), (20, 20)),  # each row under several window rows
        ((20, 201), (64, 64), (40, 40)),  # padded
    ],
)
def test_sliding_windows_as_mmseg(models, monkeypatch, size, crop, stride):
    _, model = models
    image = picture(*size)
    pixels = WHOLE(image, return_tensors="pt")["pixel_values"]
    pixels = F.pad(pixels, (0, 0, 0, max(29 - size[0], 0)))
    expected = mmseg_logits(model, pixels, crop, stride).softmax(dim=1)[0, :, : size[0]]
    for stripe in (4 << 20, 1000):
        monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", stripe)
        options = {"slide": (crop, stride), "return_scores": True, "scores_dtype": torch.float32}
        (labels,), (score,) = fastseg.segment(model, image, processor=WHOLE, **options)
        assert score.shape == labels.shape == size
        torch.testing.assert_close(score, expected.amax(dim=0), rtol=1e-4, atol=1e-5)
        taken = expected.gather(0, labels[None])[0]
        torch.testing.assert_close(taken, score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slide", [None, (64, 40)])
@pytest.mark.parametrize("scores", [False, True])
def test_what_is_not_certain_is_left_out(models, slide, scores):
    _, model = models
    image = IMAGES[1]
    options = {"processor": WHOLE, "slide": slide}
    (plain,), (score,) = fastseg.segment(
        model, image, return_scores=True, scores_dtype=torch.float32, **options
    )
    threshold = score.median().item()
    result = fastseg.segment(model, image, threshold=threshold, return_scores=scores, **options)
    labels = result[0][0] if scores else result[0]
    assert labels.dtype == torch.int64
    assert torch.equal(labels, torch.where(score < threshold, 255, plain))
    assert 0.4 < (labels == 255).float().mean() < 0.6
    if scores:  # of the class that was left out, too
        assert torch.equal(result[1][0], score.half())


def test_thresholds_that_leave_all_and_none(models):
    _, model = models
    options = {"processor": SMALL}
    plain = fastseg.segment(model, IMAGES[0], **options)[0]
    assert torch.equal(fastseg.segment(model, IMAGES[0], threshold=0, **options)[0], plain)
    assert (fastseg.segment(model, IMAGES[0], threshold=1.0, **options)[0] == 255).all()


@pytest.mark.parametrize("slide", [None, (64, 40)])
@pytest.mark.parametrize("threshold", [None, 0.3, 0.7])
def test_one_class_by_its_probability(one_class, slide, threshold):
    image = picture(64, 80)
    options = {"processor": WHOLE, "slide": slide, "threshold": threshold}
    (labels,), (score,) = fastseg.segment(one_class, image, return_scores=True, **options)
    pixels = WHOLE(image, return_tensors="pt")["pixel_values"]
    if slide is None:
        with torch.no_grad(), fastseg.plain_path():
            logits = one_class(pixels).logits
        logits = F.interpolate(logits, size=(64, 80), mode="bilinear", align_corners=False)
    else:
        logits = mmseg_logits(one_class, pixels, (64, 64), (40, 40))
    probability = logits[0, 0].sigmoid()
    limit = 0.5 if threshold is None else threshold
    clear = (probability - limit).abs() > 1e-5
    assert torch.equal(labels[clear], (probability > limit).long()[clear])
    assert 0.05 < labels.float().mean() < 0.95
    of_label = torch.where(labels == 1, probability, 1 - probability)
    assert (score - of_label).abs().max() < 1e-3
    assert torch.equal(fastseg.segment(one_class, image, **options)[0], labels)


def test_no_number_is_not_certain():
    torch.manual_seed(0)
    model = tiny_model()
    with torch.no_grad():
        model.decode_head.classifier.bias[2] = torch.nan
    options = {"processor": SMALL, "return_scores": True, "threshold": 0.1}
    (labels,), (score,) = fastseg.segment(model, IMAGES[0], **options)
    assert (labels == 255).all()
    assert score.isnan().all()
    _, (score,) = fastseg.segment(model, IMAGES[0], scores_dtype=torch.uint8, **options)
    assert not score.any()


@pytest.mark.parametrize("slide", [None, (64, 64)])
def test_no_map_of_all_classes_is_made(slide):
    """Of 150 classes at full size, whatever stands beside the label map."""
    torch.manual_seed(0)
    model = tiny_model(num_labels=150)
    image = picture(600, 800)
    processor = WHOLE if slide else SMALL
    with LargestTensor() as largest:
        options = {"return_scores": True, "threshold": 0.5, "slide": slide}
        (labels,), _ = fastseg.segment(model, image, processor=processor, **options)
    assert labels.shape == (600, 800)
    assert largest.elements < 150 * 600 * 800 / 10


def test_half_precision(models):
    hf_model, model = models
    half = copy.deepcopy(model).bfloat16()
    options = {"processor": SMALL, "return_scores": True, "scores_dtype": torch.float32}
    _, (score,) = fastseg.segment(half, IMAGES[0], **options)
    expected = expected_probabilities(hf_model, IMAGES[0]).amax(dim=0)
    assert score.dtype == torch.float32
    assert (score - expected).abs().max() < 0.1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"threshold": 1.5}, ValueError, "threshold: expected a number from 0 to 1, got 1.5"),
        ({"threshold": -0.1}, ValueError, "threshold: .*-0.1"),
        ({"threshold": "0.5"}, ValueError, "threshold: .*'0.5'"),
        ({"threshold": True}, ValueError, "threshold: .*True"),
        ({"threshold": float("nan")}, ValueError, "threshold: .*nan"),
        ({"scores_dtype": torch.int64}, ValueError, "scores_dtype: expected one of .*int64"),
        ({"scores_dtype": "float16"}, ValueError, "scores_dtype: .*'float16'"),
    ],
)
def test_wrong_options(models, options, error, text):
    with pytest.raises(error, match=text):
        fastseg.segment(models[1], IMAGES[0], **options)


@pytest.mark.parametrize("slide", [None, (64, 64)])
def test_255_must_not_be_a_class(slide):
    model = tiny_model(num_labels=256)
    options = {"processor": SMALL, "slide": slide}
    with pytest.raises(ValueError, match="threshold: expected a model of at most 255 .* got 256"):
        fastseg.segment(model, IMAGES[0], threshold=0.5, **options)
    assert fastseg.segment(model, IMAGES[0], return_scores=True, **options)[1][0].max() <= 1

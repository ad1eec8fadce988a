"""From logits to label maps, against transformers' PIL image processor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers.models.segformer.image_processing_pil_segformer import (
    SegformerImageProcessorPil,
)

from fastseg.images.processor import SegformerImageProcessor
from fastseg.models.outputs import SemanticSegmenterOutput


def smooth_logits(batch: int, classes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, classes, 4, 5, generator=generator)
    return F.interpolate(coarse, size=(24, 31), mode="bicubic")


def resized(logits: torch.Tensor, size) -> torch.Tensor:
    return F.interpolate(logits[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("classes", [1, 2, 19])
@pytest.mark.parametrize("smooth", [True, False])
def test_post_processing(classes, smooth):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(3, classes, 24, 31, generator=generator)
    logits = smooth_logits(3, classes, classes) if smooth else logits
    ours, theirs = SegformerImageProcessor(), SegformerImageProcessorPil()
    outputs = SemanticSegmenterOutput(logits=logits)
    for sizes in (
        None,
        [(96, 124)] * 3,
        [(96, 124), (33, 97), (96, 124)],
        [[24, 31], [1, 1], [7, 300]],
        torch.tensor([[50, 60], [50, 60], [10, 9]]),
    ):
        # transformers documents tensors too, and fails on them
        listed = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        expected = theirs.post_process_semantic_segmentation(outputs, target_sizes=listed)
        for given in (outputs, logits):
            maps = ours.post_process_semantic_segmentation(given, target_sizes=sizes)
            for one, label_map, reference in zip(logits, maps, expected, strict=True):
                assert label_map.dtype == torch.int64
                assert label_map.shape == reference.shape
                assert (label_map == reference).float().mean() > 0.9999
                # Where they differ, the two best classes tie to rounding.
                exact = resized(one.double(), label_map.shape)
                taken = exact.gather(0, label_map[None])[0]
                assert (exact.amax(dim=0) - taken).max() < 1e-6


def test_post_processing_scores():
    logits = smooth_logits(2, 5, 0)
    ours, theirs = SegformerImageProcessor(), SegformerImageProcessorPil()
    for sizes in (None, [(40, 50), (9, 70)]):
        call = {"target_sizes": sizes, "return_segmentation_scores": True}
        outputs = SemanticSegmenterOutput(logits=logits)
        expected = theirs.post_process_semantic_segmentation(outputs, **call)
        found = ours.post_process_semantic_segmentation(logits, **call)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.segmentation, b.segmentation)
            assert torch.equal(a.segmentation_scores, b.segmentation_scores)


@pytest.mark.parametrize(
    ("outputs", "sizes", "error", "match"),
    [
        ({"logits": 3}, None, TypeError, "outputs: expected the output of a model.*dict"),
        (torch.zeros(3, 4, 4), None, ValueError, r"outputs.*\(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), None, ValueError, "outputs.*int64"),
        (torch.zeros(2, 3, 4, 4), [(5, 5)], ValueError, "target_sizes.*each of 2 images"),
        (torch.zeros(1, 3, 4, 4), (5, 5), ValueError, "target_sizes.*each of 1 images"),
        (torch.zeros(1, 3, 4, 4), [5], ValueError, "target_sizes: expected pairs.*got 5"),
        (torch.zeros(1, 3, 4, 4), [(0, 5)], ValueError, "positive ints"),
        (torch.zeros(1, 3, 4, 4), [(2.5, 5)], ValueError, "positive ints"),
    ],
)
def test_wrong_post_processing(outputs, sizes, error, match):
    with pytest.raises(error, match=match):
        SegformerImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=sizes)

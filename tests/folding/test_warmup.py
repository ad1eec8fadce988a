"""`fastseg.warmup` and `refold` on a CPU: what they fold and drop, and what is refused."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastseg
from tests.folding.fold_cases import is_folded, parts_of
from tests.model_cases import TINY, randomize
from tests.models.seggpt.cases import SMALL as SEGGPT


@pytest.fixture
def model():
    model = fastseg.SegformerForSemanticSegmentation(fastseg.SegformerConfig(**TINY)).eval()
    randomize(model)
    return model


def test_it_folds_and_changes_nothing(model):
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels).logits
    model.refold()
    fastseg.warmup(model, [(1, 3, 64, 64), (2, 3, 33, 70)])
    assert all(map(is_folded, parts_of(model)))
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, expected)


@pytest.mark.parametrize("class_name", ["SegformerModel", "SegformerForImageClassification"])
def test_models_without_label_maps(class_name):
    model = getattr(fastseg, class_name)(fastseg.SegformerConfig(**TINY)).eval()
    fastseg.warmup(model, [(1, 3, 64, 64)])


@pytest.mark.parametrize("library", [fastseg, transformers], ids=["fastseg", "transformers"])
def test_models_of_several_inputs(library):
    model = library.SegGptForImageSegmentation(library.SegGptConfig(**SEGGPT)).eval()
    fastseg.accelerate(model)
    fastseg.warmup(model, [(1, 3, 32, 32)])
    assert all(map(is_folded, parts_of(model)))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 0, 64), (1, 3, 64)])
def test_wrong_shapes(model, shape):
    with pytest.raises(
        ValueError, match=r"shapes: expected a list of \(batch, channels, height, width\)"
    ):
        fastseg.warmup(model, [shape])


def test_one_shape_is_no_list_of_shapes(model):
    with pytest.raises(ValueError, match=r"got 1 in \[1, 3, 64, 64\]"):
        fastseg.warmup(model, (1, 3, 64, 64))


def test_training_mode_is_refused(model):
    with pytest.raises(ValueError, match="model: expected a model in eval mode"):
        fastseg.warmup(model.train(), [(1, 3, 64, 64)])


def test_refold_drops_what_is_folded(model):
    for call in (model.refold, lambda: fastseg.refold(model)):
        fastseg.warmup(model, [(1, 3, 64, 64)])
        assert all(map(is_folded, parts_of(model)))
        call()
        assert not any(map(is_folded, parts_of(model)))

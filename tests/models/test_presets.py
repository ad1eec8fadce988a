"""Sizes of the presets against transformers and the published tables."""

from __future__ import annotations

import pytest
import torch
import transformers

import fastseg
from fastseg.models.segformer.presets import preset_config

# Millions of weights. KerasCV's tables: mit_* is the encoder alone; segformer_* has 19 classes and
# a 256-wide decode head at every size.
KERAS_CV_MIT = [3.32, 13.16, 24.20, 44.08, 60.85, 81.45]
KERAS_CV_SEGFORMER = [3.72, 13.68, 24.73, 44.60, 61.37, 81.97]
# The paper's table of classifiers. Its figures are not those of the released code, transformers'
# included, which has 3.58, 13.66, 24.71, 44.59, 61.36 and 81.96.
PAPER_CLASSIFIER = [3.7, 14.0, 25.4, 45.2, 62.6, 82.0]
# The paper's table 7, encoder and decoder of segmentation models.
PAPER_ENCODER = [3.4, 13.1, 24.2, 44.0, 60.8, 81.4]
PAPER_DECODER = [0.4, 0.6, 3.3, 3.3, 3.3, 3.3]


@pytest.fixture(autouse=True)
def without_storage():
    with torch.device("meta"):
        yield


def millions(model) -> float:
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


@pytest.mark.every(5)
@pytest.mark.parametrize("size", range(6))
def test_counts_of_keras_cv(size):
    encoder = fastseg.from_preset(f"mit_b{size}", num_classes=0)
    assert isinstance(encoder, fastseg.SegformerModel)
    assert millions(encoder) == pytest.approx(KERAS_CV_MIT[size], abs=0.01)
    model = fastseg.from_preset(f"segformer_b{size}", num_classes=19, projection_filters=256)
    assert isinstance(model, fastseg.SegformerForSemanticSegmentation)
    assert round(millions(model), 2) == KERAS_CV_SEGFORMER[size]


@pytest.mark.every(3)
@pytest.mark.parametrize("size", range(6))
def test_counts_of_the_paper(size):
    classifier = fastseg.from_preset(f"mit_b{size}")
    assert millions(classifier) == pytest.approx(PAPER_CLASSIFIER[size], rel=0.04)
    model = fastseg.from_preset(f"segformer_b{size}", num_classes=150)
    assert millions(model.segformer) == pytest.approx(PAPER_ENCODER[size], abs=0.1)
    assert millions(model.decode_head) == pytest.approx(PAPER_DECODER[size], abs=0.2)


@pytest.mark.every(5)
@pytest.mark.parametrize("name", fastseg.PRESETS)
def test_counts_of_transformers(name):
    model = fastseg.from_preset(name)
    fields = model.config.to_dict()
    config = transformers.SegformerConfig(
        **{
            field: fields[field]
            for field in ("depths", "hidden_sizes", "decoder_hidden_size", "id2label")
        }
    )
    hf_model = getattr(transformers, type(model).__name__)(config)
    assert model.num_parameters() == hf_model.num_parameters()
    assert model.config.num_labels == (1000 if name.startswith("mit") else 150)


def test_arguments():
    model = fastseg.from_preset("segformer_b1", num_classes=7, projection_filters=64)
    assert model.decode_head.classifier.weight.shape == (7, 64, 1, 1)
    config = preset_config("mit_b2", id2label={0: "cat", 1: "dog"}, drop_path_rate=0.3)
    assert config.num_labels == 2
    assert config.id2label[1] == "dog"
    assert config.drop_path_rate == 0.3
    assert fastseg.from_preset("segformer_b0").training


@pytest.mark.parametrize("name", ["segformer_b6", "mit-b0", "", "b0"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="name: expected one of mit_b0.*got '" + name):
        fastseg.from_preset(name)

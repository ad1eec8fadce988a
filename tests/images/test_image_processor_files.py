"""preprocessor_config.json: read from and written for transformers 4.x and 5.x."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from transformers.models.segformer.image_processing_pil_segformer import (
    SegformerImageProcessorPil,
)

from fastseg.checkpoints.report import CheckpointError
from fastseg.images.processor import SegformerImageProcessor
from tests.images.image_cases import assert_same, noise, photograph

CHANGED = {
    "size": {"height": 96, "width": 160},
    "resample": 3,
    "rescale_factor": 1 / 127.5,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "do_reduce_labels": True,
}


@pytest.mark.parametrize("options", [{}, CHANGED, {"do_resize": False, "do_normalize": False}])
def test_files_both_ways(tmp_path, options):
    image, labels = photograph("coffee"), noise((400, 600))
    expected = SegformerImageProcessorPil(**options)(image, labels.copy())
    SegformerImageProcessorPil(**options).save_pretrained(tmp_path / "theirs")
    ours = SegformerImageProcessor.from_pretrained(tmp_path / "theirs")
    assert_same(ours(image, labels), expected)
    assert ours.save_pretrained(tmp_path / "ours") == [
        str(tmp_path / "ours" / "preprocessor_config.json")
    ]
    theirs = SegformerImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert_same(theirs(image, labels.copy()), expected)
    for name in ("theirs", "ours"):
        saved = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        assert saved == ours.to_dict()
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["preprocessor_config.json"]


RUN_WITH_4 = """
import sys, numpy as np
from transformers import SegformerImageProcessor, __version__
assert __version__.startswith("4."), __version__
theirs, ours, data = sys.argv[1:]
image, labels = np.load(data + "/image.npy"), np.load(data + "/labels.npy")
processor = SegformerImageProcessor.from_pretrained(ours)
np.savez(data + "/out.npz", **processor(image, labels, return_tensors="np"))
processor.save_pretrained(theirs)
"""


@pytest.mark.slow
def test_files_of_transformers_4(run_transformers4, tmp_path):
    """fastseg saves, 4.57 loads, computes and saves, fastseg loads: the same throughout."""
    image, labels = photograph("coffee"), noise((400, 600))
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "labels.npy", labels)
    processor = SegformerImageProcessor(**CHANGED)
    processor.save_pretrained(tmp_path / "ours")
    run_transformers4(RUN_WITH_4, tmp_path / "theirs", tmp_path / "ours", tmp_path)
    with np.load(tmp_path / "out.npz") as theirs:
        assert_same(processor(image, labels, return_tensors="np"), dict(theirs))
    reloaded = SegformerImageProcessor.from_pretrained(tmp_path / "theirs")
    assert reloaded.to_dict() == processor.to_dict()


def test_old_file(tmp_path):
    """As SegformerFeatureExtractor wrote it, before sizes were dicts."""
    old = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "SegformerFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "reduce_labels": True,
        "resample": 2,
        "size": 640,
        "somebody": {"else": "s"},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    processor = SegformerImageProcessor.from_pretrained(tmp_path)
    assert processor.size == {"height": 640, "width": 640}
    assert processor.do_reduce_labels is True
    image = photograph("chelsea")
    expected = SegformerImageProcessorPil(size=640)(image)
    assert_same(processor(image), expected)
    processor.save_pretrained(tmp_path / "new")
    new = json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())
    assert new["somebody"] == {"else": "s"}
    assert new["image_processor_type"] == "SegformerImageProcessor"
    assert not {"reduce_labels", "feature_extractor_type"} & set(new)
    assert_same(SegformerImageProcessorPil.from_pretrained(tmp_path / "new")(image), expected)


def test_other_files(tmp_path):
    """The nested form, a file by its path, and options that replace the file's."""
    nested = {"processor_class": "P", "image_processor": {"size": {"height": 9, "width": 8}}}
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(nested))
    for where in (tmp_path, str(tmp_path), path):
        assert SegformerImageProcessor.from_pretrained(where).size == {"height": 9, "width": 8}
    processor = SegformerImageProcessor.from_pretrained(tmp_path, do_resize=False, size=5)
    assert processor.size == {"height": 5, "width": 5}
    assert processor.do_resize is False
    with pytest.raises(TypeError, match="do_resise: no such option"):
        SegformerImageProcessor.from_pretrained(tmp_path, do_resise=False)
    with pytest.warns(UserWarning, match="do_center_crop: kept but not applied"):
        cropping = SegformerImageProcessor.from_dict({"do_center_crop": True, "crop_size": 8})
    image = noise((30, 20, 3))
    assert_same(
        cropping(image), SegformerImageProcessorPil(do_center_crop=True, crop_size=8)(image)
    )


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        SegformerImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no/such-model"):
        SegformerImageProcessor.from_pretrained(
            "no/such-model", cache_dir=tmp_path / "cache", local_files_only=True
        )
    path = tmp_path / "preprocessor_config.json"
    for text, match in [
        ('{"size": 5', "expected JSON"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"size": {"height": 3}}', r"preprocessor_config\.json: size: expected"),
        ('{"resample": "x"}', r"preprocessor_config\.json: resample"),
    ]:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=match):
            SegformerImageProcessor.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    SegformerImageProcessor(size=7).save_pretrained(tmp_path)

    def fail(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            SegformerImageProcessor(size=9).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert SegformerImageProcessor.from_pretrained(tmp_path).size["height"] == 7

"""`fastseg.export`: its arguments, its check, and what an error leaves behind."""

from __future__ import annotations

import stat
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fastseg
from fastseg.exporting import onnx_forms
from fastseg.exporting.check import compare
from tests.model_cases import TINY, randomize


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = fastseg.SegformerForSemanticSegmentation(fastseg.SegformerConfig(**TINY)).eval()
    randomize(model)
    return model


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "tflite"}, ValueError, "format: expected one of onnx, torch-export"),
        ({"labels": (0, 5)}, ValueError, "labels: expected a bool or a positive"),
        ({"labels": (5,)}, ValueError, "labels: expected a bool or a positive"),
        ({"labels": "yes"}, ValueError, "labels: expected a bool or a positive"),
        ({"labels": True, "label_dtype": torch.int32}, TypeError, "label_dtype: expected"),
        ({"label_dtype": torch.uint8}, ValueError, "label_dtype: expected None as labels"),
        ({"batch": 0}, ValueError, "batch: expected an integer from 1"),
        ({"batch": True}, ValueError, "batch: expected an integer from 1"),
        ({"height": 28}, ValueError, "height: expected an integer from 29, or None, got 28"),
        ({"width": 64.0}, ValueError, "width: expected an integer from 29"),
        ({"format": "torch-export", "width": 60}, ValueError, "width: expected .* from 61"),
        ({"opset": 10}, ValueError, "opset: expected an integer from 11 to"),
        ({"opset": 999}, ValueError, "opset: expected an integer from 11 to"),
        ({"opset": "20"}, ValueError, "opset: expected an integer from 11 to"),
        ({"format": "torch-export", "opset": 20}, ValueError, "opset: expected None"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype: expected torch.float32, or torch.float16"),
        ({"format": "torch-export", "dtype": torch.float16}, ValueError, "dtype: expected torch"),
    ],
)
def test_wrong_arguments(model, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        fastseg.export(model, tmp_path / "model", **{"format": "onnx", **options})
    assert files(tmp_path) == []


def test_the_suffix_tells_the_format(model, tmp_path):
    assert fastseg.export(model, tmp_path / "model.onnx", check=False).format == "onnx"
    with pytest.raises(ValueError, match="path: expected no suffix of onnx for torch-export"):
        fastseg.export(model, tmp_path / "other.onnx", format="torch-export")
    with pytest.raises(ValueError, match="path: expected a suffix of .onnx, .pt2, or a format"):
        fastseg.export(model, tmp_path / "other")
    with pytest.raises(TypeError, match="path: expected a path, got int"):
        fastseg.export(model, 3)
    assert files(tmp_path) == ["model.onnx"]


def test_models_that_cannot_be_exported(model, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(
        TypeError,
        match="model: expected a model of fastseg.*, got a .*Linear; call fastseg.accelerate",
    ):
        fastseg.export(torch.nn.Linear(3, 3).eval(), path)
    config = fastseg.SegformerConfig(**TINY)
    with pytest.raises(ValueError, match="training mode"):
        fastseg.export(fastseg.SegformerForSemanticSegmentation(config), path)
    hooked = fastseg.SegformerForSemanticSegmentation(config).eval()
    hooked.decode_head.classifier.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match="decode_head folded, but classifier: .* has forward hooks"
    ):
        fastseg.export(hooked, path)
    replaced = fastseg.SegformerForSemanticSegmentation(config).eval()
    replaced.decode_head.classifier = torch.nn.Sequential(torch.nn.Conv2d(24, 5, 1)).eval()
    with pytest.raises(ValueError, match="decode_head folded, but classifier: .* is a Sequential"):
        fastseg.export(replaced, path)
    classifier = fastseg.SegformerForImageClassification(config).eval()
    with pytest.raises(ValueError, match="labels: expected False"):
        fastseg.export(classifier, path, labels=True)
    many = fastseg.SegformerConfig(**{**TINY, "num_labels": 257})
    with pytest.raises(ValueError, match=r"label_dtype: torch.uint8 tells 256 .* got 257"):
        fastseg.export(
            fastseg.SegformerForSemanticSegmentation(many).eval(),
            path,
            labels=True,
            label_dtype=torch.uint8,
        )
    assert files(tmp_path) == []


@pytest.mark.parametrize("labels", [False, True])
def test_a_graph_that_gives_something_else_is_not_left_there(model, tmp_path, monkeypatch, labels):
    path = tmp_path / "model.onnx"
    path.write_text("an older export")
    wrong = {**onnx_forms.BILINEAR, "coordinate_transformation_mode": "align_corners"}
    monkeypatch.setattr(onnx_forms, "BILINEAR", wrong)
    with pytest.raises(fastseg.ExportError, match="does not give what the model gives"):
        fastseg.export(model, path, labels=labels)
    assert files(tmp_path) == ["model.onnx"]
    assert path.read_text() == "an older export"


def test_labels_that_are_no_near_ties_are_an_error(model):
    def run(pixels):
        with torch.no_grad():
            logits = model(torch.from_numpy(pixels)).logits
        labels = logits.argmax(dim=1).numpy()
        labels[0, 3, 3] = logits[0, :, 3, 3].argmin()  # one pixel
        return [labels]

    with pytest.raises(fastseg.ExportError, match="share of differing labels"):
        compare(model, model.folded_model(), run, [(1, 3, 64, 64)], (16, 16))


def test_values_that_are_no_numbers_are_an_error(model):
    def run(pixels):
        return [np.full((1, 5, 16, 16), np.nan, np.float32)]

    with pytest.raises(fastseg.ExportError, match="relative RMS error is nan"):
        compare(model, model.folded_model(), run, [(1, 3, 64, 64)], False)


def test_places_that_cannot_be_written(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="path: there is no folder .*missing"):
        fastseg.export(model, tmp_path / "missing" / "model.onnx")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="path: expected a file, got the folder"):
        fastseg.export(model, tmp_path / "folder")
    assert files(tmp_path) == ["folder"]
    assert files(tmp_path / "folder") == []


def test_an_older_file_is_replaced_whole(model, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x" * 10_000_000)
    result = fastseg.export(model, str(path), check=False)
    assert result.path == path
    assert path.stat().st_size == result.size_bytes < 10_000_000
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_without_onnxruntime_the_file_is_written_and_a_warning_says_what_is_missing(
    model, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(fastseg.ExportWarning, match="onnxruntime is not installed"):
        result = fastseg.export(model, tmp_path / "model.onnx")
    assert result.checked == ()
    assert "fastseg-segformer[export]" in result.unchecked
    assert result.path.exists()


def test_unchecked_as_asked_for(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastseg.ExportWarning)
        result = fastseg.export(model, tmp_path / "model.onnx", check=False)
    assert result.checked == ()
    assert result.unchecked == "check=False"


def test_without_onnx_the_error_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "fastseg-segformer\[export\]"'):
        fastseg.export(model, tmp_path / "model.onnx")
    assert files(tmp_path) == []


def test_the_model_stays_as_it_was(model, tmp_path):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    fastseg.export(model, tmp_path / "model.onnx", labels=True)
    assert not model.training
    assert model.dtype == torch.float32
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # Gradients are left on, as they were.
    assert model(torch.randn(1, 3, 64, 64)).logits.requires_grad

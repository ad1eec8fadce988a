"""KerasHub's `.keras` archives: the HDF5 file and the configuration that the real library wrote."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import fastseg
from fastseg.checkpoints.load import CheckpointError
from fastseg.models.auto import from_pretrained
from tests.model_cases import relative_error

pytestmark = pytest.mark.filterwarnings("error::fastseg.CheckpointWarning")

FIXTURES = Path(__file__).parents[1] / "fixtures"
BOUND = 2e-6


@pytest.fixture(scope="module")
def keras(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keras_hub")
    with tarfile.open(FIXTURES / "keras_hub.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def outputs(keras) -> dict[str, torch.Tensor]:
    """Of KerasHub's models; maps as (B, C, H, W)."""
    with np.load(keras / "outputs.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]).float() for name in arrays}
    return {name: t.permute(0, 3, 1, 2) if t.ndim == 4 else t for name, t in found.items()}


def archive(path: Path, config: object, weights: bytes | None) -> Path:
    """What `model.save(path)` writes: these files, the weights named as by `save_weights`."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        if config is not None:
            file.writestr("config.json", json.dumps(config))
        if weights is not None:
            file.writestr("model.weights.h5", weights)
    return path


def saved(keras: Path, name: str, path: Path) -> Path:
    """A task of the fixture as an archive, or the encoder, whose weights have the same names."""
    if name == "encoder":
        config = json.loads((keras / name / "config.json").read_text())
        return archive(path, config, (keras / name / "model.weights.h5").read_bytes())
    config = json.loads((keras / name / "task.json").read_text())
    return archive(path, config, (keras / f"{name}.weights.h5").read_bytes())


@torch.no_grad()
def test_segmenter(keras, outputs, tmp_path):
    model = from_pretrained(saved(keras, "segmenter", tmp_path / "it.keras"))
    assert type(model) is fastseg.SegformerForSemanticSegmentation
    assert not model.load_report
    assert model.config.hidden_act == "gelu_pytorch_tanh"
    assert model.config.drop_path_rate == 0.2  # the configuration says so, the weights cannot
    assert model.config.num_attention_heads == [1, 2, 3, 4]
    assert relative_error(model(outputs["pixels"]).logits, outputs["logits"]) <= BOUND
    with fastseg.plain_path():
        assert relative_error(model(outputs["pixels"]).logits, outputs["logits"]) <= BOUND


@torch.no_grad()
def test_classifier_and_encoder(keras, outputs, tmp_path):
    model = from_pretrained(saved(keras, "classifier", tmp_path / "classifier.keras"))
    assert type(model) is fastseg.SegformerForImageClassification
    assert relative_error(model(outputs["pixels"]).logits, outputs["classes"]) <= BOUND
    model = from_pretrained(saved(keras, "encoder", tmp_path / "encoder.keras"))
    assert type(model) is fastseg.SegformerModel
    found = model(outputs["pixels"], output_hidden_states=True).hidden_states
    for stage, ours in enumerate(found, start=1):
        assert relative_error(ours, outputs[f"P{stage}"]) <= BOUND


def test_under_another_name(keras, tmp_path):
    model = from_pretrained(saved(keras, "segmenter", tmp_path / "model.zip"))
    assert type(model) is fastseg.SegformerForSemanticSegmentation


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("keras_cv>SegFormer", "got one of keras_cv>SegFormer"),
        ("keras_hub>ResNetBackbone", "got one of keras_hub>ResNetBackbone"),
        (None, "got one of Functional"),
    ],
)
def test_another_network(name, told, keras, tmp_path):
    config = {"class_name": "Functional", "config": {"layers": []}, "registered_name": name}
    weights = (keras / "segmenter.weights.h5").read_bytes()
    text = error_of(archive(tmp_path / "it.keras", config, weights))
    assert "KerasHub's SegFormer or MiT" in text
    assert told in text


def test_weights_of_keras_cv(keras, tmp_path):
    """Whatever the configuration says: its layers have no dropout in the attention."""
    path = tmp_path / "it.h5"
    path.write_bytes((keras / "segmenter.weights.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        found: list[str] = []
        file.visit(lambda name: found.append(name) if name.endswith("/attn/dropout") else None)
        file.visit(lambda name: found.append(name) if name.endswith("/padding") else None)
        for name in found:
            del file[name]
    config = json.loads((keras / "segmenter" / "task.json").read_text())
    assert "KerasCV" in error_of(archive(tmp_path / "it.keras", config, path.read_bytes()))


def test_max_pooling(keras, tmp_path):
    config = json.loads((keras / "classifier" / "task.json").read_text())
    config["config"]["pooling"] = "max"
    weights = (keras / "classifier.weights.h5").read_bytes()
    assert "expected average pooling" in error_of(archive(tmp_path / "it.keras", config, weights))


@pytest.mark.parametrize(
    ("config", "weights", "told"),
    [
        (None, b"", "config.json"),
        ([], b"", "expected a JSON object in config.json, got list"),
        ({}, b"not HDF5", "expected an HDF5 file of numbers"),
    ],
)
def test_archives_with_something_wrong_inside(config, weights, told, tmp_path):
    assert told in error_of(archive(tmp_path / "it.keras", config, weights))


@pytest.mark.parametrize("kept", [100, 20_000, -200])
def test_truncated(kept, keras, tmp_path):
    path = saved(keras, "segmenter", tmp_path / "it.keras")
    path.write_bytes(path.read_bytes()[:kept])
    assert "archive of Keras" in error_of(path)
    assert "truncated or corrupt" in error_of(path)


def test_a_damaged_member(keras, tmp_path):
    path = saved(keras, "segmenter", tmp_path / "it.keras")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert "corrupt" in error_of(path)  # its checksum says so

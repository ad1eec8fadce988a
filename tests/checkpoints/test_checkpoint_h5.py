"""TensorFlow's and KerasHub's files, made by the real libraries, against their own outputs."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastseg
from fastseg.checkpoints.load import CheckpointError, CheckpointWarning
from fastseg.models.auto import from_pretrained
from tests.checkpoints.checkpoint_cases import assert_same_tensors
from tests.model_cases import relative_error

pytestmark = pytest.mark.filterwarnings("error::fastseg.CheckpointWarning")

FIXTURES = Path(__file__).parents[1] / "fixtures"
TENSORFLOW = FIXTURES / "tf_segformer"
BOUND = 2e-6
HEADS = {"num_attention_heads": [1, 2, 3, 4]}


@pytest.fixture(scope="module")
def keras(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keras_hub")
    with tarfile.open(FIXTURES / "keras_hub.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def outputs(keras) -> dict[str, torch.Tensor]:
    """Of KerasHub's models, in float32; maps as (B, C, H, W)."""
    with np.load(keras / "outputs.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]).float() for name in arrays}
    return {name: t.permute(0, 3, 1, 2) if t.ndim == 4 else t for name, t in found.items()}


@pytest.fixture
def copied(keras, tmp_path) -> Path:
    """A preset that a test may change."""
    shutil.copytree(keras / "segmenter", tmp_path / "preset")
    return tmp_path / "preset"


@torch.no_grad()
def assert_parity(model, pixels, expected) -> None:
    """Folded and plain, in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        model = model.to(dtype)
        assert relative_error(model(pixels.to(dtype))[0], expected) <= BOUND
        with fastseg.plain_path():
            assert relative_error(model(pixels.to(dtype))[0], expected) <= BOUND


@pytest.mark.parametrize("source", ["segmentation", "segmentation/tf_model.h5", "safetensors"])
def test_tensorflow(source):
    model = from_pretrained(TENSORFLOW / source)
    assert type(model) is fastseg.SegformerForSemanticSegmentation
    assert not model.load_report
    pixels = torch.linspace(-1, 1, 2 * 3 * 64 * 64, dtype=torch.float64).reshape(2, 3, 64, 64)
    folder = TENSORFLOW / "segmentation"
    assert_parity(model, pixels, torch.from_numpy(np.load(folder / "logits.npy")))
    with torch.no_grad():
        found = model(pixels, output_hidden_states=True).hidden_states
    with np.load(folder / "hidden_states.npz") as arrays:
        for ours, name in zip(found, sorted(arrays), strict=True):
            assert relative_error(ours, torch.from_numpy(arrays[name])) <= BOUND


def test_tensorflow_classifier():
    model = from_pretrained(TENSORFLOW / "classification")
    assert type(model) is fastseg.SegformerForImageClassification
    with h5py.File(TENSORFLOW / "classification" / "tf_model.h5") as file:
        layer = "classifier/tf_segformer_for_image_classification/classifier"
        kernel, bias = file[f"{layer}/kernel:0"][()], file[f"{layer}/bias:0"][()]
        block = file["segformer/tf_segformer_for_image_classification/segformer/encoder/block.1.0"]
        depthwise = block["mlp/dwconv/dwconv/kernel:0"][()]
    assert np.array_equal(model.classifier.weight.detach().numpy(), kernel.T)
    assert np.array_equal(model.classifier.bias.detach().numpy(), bias)
    weight = model.segformer.encoder.block[1][0].mlp.dwconv.dwconv.weight
    assert np.array_equal(weight.detach().numpy()[:, 0], depthwise[:, :, 0].transpose(2, 0, 1))


def test_tensorflow_without_config(tmp_path):
    shutil.copy(TENSORFLOW / "segmentation" / "tf_model.h5", tmp_path / "weights.h5")
    with pytest.raises(CheckpointError, match=r"weights\.h5: num_attention_heads"):
        from_pretrained(tmp_path / "weights.h5")
    model = from_pretrained(tmp_path / "weights.h5", **HEADS)
    expected = from_pretrained(TENSORFLOW / "segmentation")
    assert_same_tensors(model.state_dict(), dict(expected.state_dict()))


def test_tensorflow_safetensors_with_names_of_pytorch(tmp_path):
    """Nothing tells the axis order of such a file."""
    shutil.copy(TENSORFLOW / "safetensors" / "config.json", tmp_path)
    tensors = from_pretrained(TENSORFLOW / "safetensors").state_dict()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "tf"})
    with pytest.raises(CheckpointError, match="'pt'.*'tf'"):
        from_pretrained(tmp_path)


def test_one_error_lists_the_variables(tmp_path):
    path = TENSORFLOW / "safetensors" / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["decode_head/linear_fuse/extra:0"] = torch.zeros(3)
    del tensors["segformer/encoder/layer_norm.2/beta:0"]
    tensors["decode_head/classifier/kernel:0"] = torch.zeros(1, 1, 7, 5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "tf"})
    shutil.copy(TENSORFLOW / "safetensors" / "config.json", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path)
    text = str(caught.value)
    assert "segformer.encoder.layer_norm.2.bias: expected (24,)" in text
    assert "decode_head/linear_fuse/extra:0: got (3,)" in text
    assert "decode_head.classifier.weight: expected (5, 16, 1, 1), got (5, 7, 1, 1)" in text


@pytest.mark.parametrize(
    ("source", "given"),
    [
        ("segmenter", {}),
        ("segmenter/model.weights.h5", {}),
        ("segmenter.weights.h5", HEADS),
    ],
)
def test_keras_segmenter(source, given, keras, outputs):
    model = from_pretrained(keras / source, **given)
    assert type(model) is fastseg.SegformerForSemanticSegmentation
    assert not model.load_report
    assert model.config.hidden_act == "gelu_pytorch_tanh"
    assert model.config.num_labels == 5
    assert model.config.drop_path_rate == (0.1 if given else 0.2)
    assert_parity(model, outputs["pixels"], outputs["logits"])


def test_keras_epsilons(keras, tmp_path):
    """Those that KerasHub's layers have, kept by a save."""
    from_pretrained(keras / "segmenter").save_pretrained(tmp_path)
    encoder = from_pretrained(tmp_path).segformer.encoder
    for stage in range(4):
        assert encoder.patch_embeddings[stage].layer_norm.eps == 1e-5
        assert encoder.layer_norm[stage].eps == 1e-5
        for block in encoder.block[stage]:
            assert block.layer_norm_1.eps == block.layer_norm_2.eps == 1e-6
            if stage < 3:
                assert block.attention.self.layer_norm.eps == 1e-5


@pytest.mark.parametrize(
    ("source", "given"), [("classifier", {}), ("classifier.weights.h5", HEADS)]
)
def test_keras_classifier(source, given, keras, outputs):
    model = from_pretrained(keras / source, **given)
    assert type(model) is fastseg.SegformerForImageClassification
    assert model.config.num_labels == 7
    assert_parity(model, outputs["pixels"], outputs["classes"])


def test_keras_encoder(keras, outputs):
    model = from_pretrained(keras / "encoder")
    assert type(model) is fastseg.SegformerModel
    with torch.no_grad():
        found = model(outputs["pixels"], output_hidden_states=True).hidden_states
    for stage, ours in enumerate(found, start=1):
        assert relative_error(ours, outputs[f"P{stage}"]) <= BOUND


def test_keras_backbone_has_no_classifier(keras):
    with pytest.raises(CheckpointError, match=r"missing \(2\):\n *decode_head\.classifier\.weight"):
        from_pretrained(keras / "backbone")
    with pytest.warns(CheckpointWarning, match="newly initialised"):
        model = from_pretrained(keras / "backbone", num_labels=3)
    assert set(model.load_report.reinitialized) == {
        "decode_head.classifier.weight",
        "decode_head.classifier.bias",
    }


def test_stages_of_the_same_width_need_depths(keras, tmp_path):
    """The blocks run through all stages, and only their widths tell them apart."""
    from fastseg.models.segformer.names.keras import translate

    def variables(width: int, block: int) -> dict[str, torch.Tensor]:
        name = f"layers/hierarchical_transformer_encoder{'_' * bool(block)}{block or ''}"
        return {f"{name}/norm1/vars/0": torch.zeros(width)}

    tensors = {
        f"layers/overlapping_patching_and_embedding{suffix}/norm/vars/0": torch.zeros(8)
        for suffix in ("", "_1")
    }
    for block in range(3):
        tensors.update(variables(8, block))
    with pytest.raises(CheckpointError, match=r"depths: .*\[8, 8\]"):
        translate(tensors)
    names = translate(tensors, depths=[1, 2]).names.values()
    assert [name for name in names if ".block." in name] == [
        f"segformer.encoder.block.{place}.layer_norm_1.weight" for place in ("0.0", "1.0", "1.1")
    ]


def without_groups(path: Path, *names: str) -> None:
    with h5py.File(path, "r+") as file:
        found: list[str] = []
        file.visit(lambda name: found.append(name) if name.endswith(names) else None)
        assert found
        for name in found:
            del file[name]


def test_keras_cv_is_refused(keras, copied, tmp_path):
    """Its layers have no dropout in the attention and no padding of their own."""
    path = tmp_path / "it.weights.h5"
    shutil.copy(keras / "segmenter.weights.h5", path)
    without_groups(path, "/padding", "/attn/dropout")
    with pytest.raises(CheckpointError, match=r"it\.weights\.h5: .*KerasCV.*another network"):
        from_pretrained(path, **HEADS)
    # A preset says itself that it is KerasHub's.
    without_groups(copied / "model.weights.h5", "/padding", "/attn/dropout")
    assert_same_tensors(
        from_pretrained(copied).state_dict(),
        dict(from_pretrained(keras / "segmenter").state_dict()),
    )


def edit_json(path: Path, change) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_other_presets_are_refused(copied, keras, tmp_path):
    shutil.copytree(keras / "classifier", tmp_path / "classifier")
    edit_json(
        tmp_path / "classifier" / "task.json", lambda task: task["config"].update(pooling="max")
    )
    with pytest.raises(CheckpointError, match=r"task\.json: expected average pooling"):
        from_pretrained(tmp_path / "classifier")

    def change(config) -> None:
        config["config"]["image_encoder"]["registered_name"] = "keras_hub>ResNetBackbone"

    edit_json(copied / "config.json", change)
    with pytest.raises(CheckpointError, match=r"preset/config\.json: expected a preset"):
        from_pretrained(copied)


def test_preset_without_weights(copied):
    (copied / "model.weights.h5").unlink()
    with pytest.raises(CheckpointError, match=r"expected a file model\.weights\.h5"):
        from_pretrained(copied)


@pytest.mark.parametrize("kept", [0, 100, 50_000])
@pytest.mark.parametrize("name", ["tf_model.h5", "it.weights.h5"])
def test_truncated_files(name, kept, keras, tmp_path):
    source = (
        TENSORFLOW / "segmentation" / name if name[0] == "t" else keras / "segmenter.weights.h5"
    )
    (tmp_path / name).write_bytes(source.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_arrays_outside_the_file_are_refused(tmp_path):
    """An HDF5 file can name any other file as the place of its numbers."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"\0" * 64)
    path = tmp_path / "it.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("a/kernel:0", (16,), "f4", external=[(str(secret), 0, 64)])
    with pytest.raises(CheckpointError, match=r"it\.h5: .*stored outside the file"):
        from_pretrained(path)


def test_strings_are_refused(tmp_path):
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file["a/kernel:0"] = "text"
    with pytest.raises(CheckpointError, match=r"it\.h5: expected an HDF5 file of numbers"):
        from_pretrained(tmp_path / "it.h5")


def test_without_h5py(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'tf_model\.h5: .*pip install "fastseg-segformer\[h5\]"'):
        from_pretrained(TENSORFLOW / "segmentation")

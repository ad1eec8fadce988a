"""Files that are not what their name says: read by what they are, or named with what to do."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from fastseg.checkpoints.load import CheckpointError
from fastseg.images.processor import SegformerImageProcessor
from fastseg.models.auto import from_pretrained
from tests.checkpoints.checkpoint_cases import SEGMENTATION, assert_same_tensors, ours

FIXTURES = Path(__file__).parents[1] / "fixtures"
HEADS = {"num_attention_heads": [1, 2, 3, 4]}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 14884776\n"
PAGE = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


def saved(save, *arguments) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arguments)
    return buffer.getvalue()


def torchscript() -> bytes:
    return saved(lambda file: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file))


def exported() -> bytes:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    return saved(lambda file: torch.export.save(program, file))


def onnx_model() -> bytes:
    graph = onnx.helper.make_graph([], "graph", [], [])
    return onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()


def arrays(protocol: int) -> bytes:
    """As paddle.save writes its .pdparams."""
    content = {"linear.weight": np.zeros((2, 2)), "StructuredToParameterName@@": {}}
    return pickle.dumps(content, protocol)


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return buffer.getvalue()


# What there is, and what of it must be said.
CONTENTS = {
    "lfs pointer": (lambda: POINTER, ["Git LFS", "git lfs pull"]),
    "page": (lambda: PAGE, ["a web page", "login"]),
    "openvino": (lambda: b'<?xml version="1.0"?>\n<net name="x" version="11">', ["OpenVINO"]),
    "empty": (lambda: b"", ["an empty file", "broke off"]),
    "message": (lambda: "404: Nicht gefunden, später".encode(), ["begins with '404: Nicht"]),
    "json": (lambda: b'{"error": "Repository not found"}', ["Repository not found"]),
    "torchscript": (torchscript, ["TorchScript", "state_dict()"]),
    "torch.export": (exported, ["torch.export", "exported from"]),
    "onnx": (onnx_model, ["ONNX", "exported from"]),
    "npz": (lambda: saved(np.savez, np.zeros(2)), [".npz", "safetensors"]),
    "npy": (lambda: saved(np.save, np.zeros(2)), [".npy"]),
    "paddle 2": (lambda: arrays(2), ["NumPy arrays", "PaddlePaddle"]),
    "paddle 4": (lambda: arrays(4), ["NumPy arrays", "PaddlePaddle"]),
    "folder in a zip": (
        lambda: zipped("model/config.json", "model/model.safetensors"),
        ["zip archive of model/config.json, model/model.safetensors", "unpack it"],
    ),
    "empty zip": (zipped, ["zip archive of nothing"]),
    "gzip": (lambda: gzip.compress(b"0" * 999), ["gzip", "unpack it"]),
    "tar": (tarred, ["tar", "unpack it"]),
    "tflite": (lambda: b"\x1c\x00\x00\x00TFL3" + bytes(99), ["TensorFlow Lite"]),
}


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "alone.pth", "a.h5"])
@pytest.mark.parametrize("content", CONTENTS)
def test_what_it_is_and_what_to_do(content, name, tmp_path):
    make, told = CONTENTS[content]
    ours(SEGMENTATION).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(path if name in ("alone.pth", "a.h5") else tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{path}: expected a file of weights, got ")
    assert "corrupt" not in text
    for part in told:
        assert part in text


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.onnx", "an ONNX model"),
        ("model.tflite", "TensorFlow Lite"),
        ("model.ENGINE", "TensorRT"),
        ("flax_model.msgpack", "Flax"),
        ("model.pdparams", "PaddlePaddle"),
        ("inference.pdmodel", "PaddlePaddle"),
        ("saved_model.pb", "TensorFlow"),
        ("model.ckpt.index", "TensorFlow"),
        ("model.ckpt.data-00000-of-00001", "TensorFlow"),
    ],
)
def test_what_the_name_tells(name, told, tmp_path):
    (tmp_path / name).write_bytes(b"\x85\x93\x00\xff" * 99)
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path / name)
    assert told in str(caught.value)


@pytest.mark.parametrize("content", [POINTER, PAGE])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_json_files(name, content, tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    load = from_pretrained if name == "config.json" else SegformerImageProcessor.from_pretrained
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert f"{name}: expected JSON, got a " in str(caught.value)
    assert ("Git LFS" if content is POINTER else "a web page") in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "weights.h5", "weights"])
def test_safetensors_under_other_names(name, tmp_path):
    model = ours(SEGMENTATION)
    save_file(model.state_dict(), tmp_path / name)
    assert_same_tensors(
        from_pretrained(tmp_path / name, **HEADS).state_dict(), dict(model.state_dict())
    )


@pytest.mark.parametrize("name", ["model.safetensors", "weights.keras", "weights"])
@pytest.mark.parametrize("in_zip", [True, False])
def test_pickles_under_other_names(name, in_zip, tmp_path):
    model = ours(SEGMENTATION)
    path = tmp_path / name
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=in_zip)
    assert_same_tensors(from_pretrained(path, **HEADS).state_dict(), dict(model.state_dict()))


def test_hdf5_under_another_name(tmp_path):
    source = FIXTURES / "tf_segformer" / "segmentation"
    shutil.copy(source / "tf_model.h5", tmp_path / "model.bin")
    assert_same_tensors(
        from_pretrained(tmp_path / "model.bin", **HEADS).state_dict(),
        dict(from_pretrained(source).state_dict()),
    )


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    """Tests may run as root, who may read anything."""
    ours(SEGMENTATION).save_pretrained(tmp_path)
    opened = Path.open

    def refuse(path, *arguments, **options):
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match="cannot be opened: Permission denied; make it read"):
        from_pretrained(tmp_path)


def test_a_link_that_leads_nowhere(tmp_path):
    """A snapshot of the hub's cache that was copied without what its links lead to."""
    ours(SEGMENTATION).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("../../blobs/0a1b")
    with pytest.raises(CheckpointError, match=r"a link to \.\./\.\./blobs/0a1b, .*cp -rL"):
        from_pretrained(tmp_path)

"""Checkpoints that must not load: one clear error that names the file and all that is wrong."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastseg.checkpoints.load import CheckpointError
from fastseg.models.auto import from_pretrained
from fastseg.models.segformer.modeling import SegformerForSemanticSegmentation, SegformerModel
from tests.checkpoints.checkpoint_cases import SEGMENTATION, ours


@pytest.fixture
def folder(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path, max_shard_size="30KB")
    return tmp_path


def error_of(folder, load=from_pretrained, **arguments) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder, **arguments)
    return str(caught.value)


def rewrite(folder: Path, change) -> None:
    """Save the tensors again after `change(tensors)` has edited them."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_one_error_lists_all_tensors(folder):
    def change(tensors):
        del tensors["segformer.encoder.layer_norm.2.weight"]
        del tensors["decode_head.linear_fuse.weight"]
        tensors["decode_head.extra"] = torch.zeros(3)
        tensors["segformer.encoder.block.0.1.mlp.dense1.bias"] = torch.zeros(32)
        tensors["decode_head.batch_norm.running_var"] = torch.zeros(17)
        tensors["decode_head.linear_c.0.proj.weight"] = torch.zeros(16, 8, dtype=torch.int8)

    rewrite(folder, change)
    text = error_of(folder)
    assert str(folder / "model.safetensors") in text
    assert "missing (2):" in text
    assert "segformer.encoder.layer_norm.2.weight: expected (24,)" in text
    assert "decode_head.linear_fuse.weight: expected (16, 64, 1, 1)" in text
    assert "unexpected (strict=False leaves them out) (2):" in text
    assert "decode_head.extra: got (3,)" in text
    assert "segformer.encoder.block.0.1.mlp.dense1.bias: got (32,)" in text
    assert "decode_head.batch_norm.running_var: expected (16,), got (17,)" in text
    assert "decode_head.linear_c.0.proj.weight: expected (16, 8), got (16, 8) int8" in text


def test_a_head_in_part_is_an_error(folder):
    rewrite(folder, lambda tensors: tensors.pop("decode_head.classifier.weight"))
    assert "decode_head.classifier.weight: expected (5, 16, 1, 1)" in error_of(folder)
    # A head that is not asked for may be incomplete.
    with pytest.warns(UserWarning, match="not used"):
        SegformerModel.from_pretrained(folder)


def test_missing_batch_counter_is_no_error(folder):
    rewrite(folder, lambda tensors: tensors.pop("decode_head.batch_norm.num_batches_tracked"))
    model = from_pretrained(folder)
    assert not model.load_report
    assert model.decode_head.batch_norm.num_batches_tracked == 0


def test_the_same_tensor_by_an_old_and_a_new_name(folder):
    def change(tensors):
        tensors["decode_head.linear_projections.0.proj.bias"] = torch.zeros(16)

    rewrite(folder, change)
    text = error_of(folder)
    assert "decode_head.linear_projections.0.proj.bias" in text
    assert "the same tensor as" in text


def test_another_number_of_classes_than_the_config_says(folder):
    edit_config(folder, id2label={"0": "sky", "1": "road"})
    text = error_of(folder)
    assert "decode_head.classifier.weight: expected (2, 16, 1, 1), got (5, 16, 1, 1)" in text
    assert "ignore_mismatched_sizes" in text


@pytest.mark.parametrize("kept", [0, 4, 1000, -1])
@pytest.mark.parametrize("form", ["safetensors", "zip", "old pickle"])
def test_truncated_weights(form, kept, folder):
    path = folder / "model.safetensors"
    if form != "safetensors":
        tensors = load_file(path)
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[:kept] if kept >= 0 else whole[: len(whole) * 2 // 3])
    text = error_of(folder)
    assert str(path) in text
    assert "expected" in text
    assert ("corrupt" if kept else "an empty file") in text


@pytest.mark.parametrize("content", [b"\xff" * 300, b"\x80\x02}q\x00."], ids=["noise", "pickle"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_of_nothing_known(name, content, folder):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    text = error_of(folder)
    assert str(folder / name) in text
    assert "truncated or corrupt" in text


class RunsCode:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False, None])
def test_pickles_are_never_executed(zipped, folder):
    mark = folder / "executed"
    path = folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    content = {"weight": RunsCode(mark)}
    if zipped is None:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    text = error_of(folder)
    assert str(path) in text
    assert "would run code" in text
    assert f"{os.mkdir.__module__}.mkdir" in text
    assert not mark.exists()
    torch.load(path, weights_only=False) if zipped is not None else pickle.loads(path.read_bytes())
    assert mark.exists()  # so the file was dangerous


def test_pickle_of_something_else_than_tensors(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"epoch": 3, "model": {"weight": torch.zeros(1)}}, folder / "pytorch_model.bin")
    text = error_of(folder)
    assert "'epoch' (int), 'model' (dict)" in text
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    assert "got list" in error_of(folder)


def test_safetensors_of_another_framework(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "flax"})
    text = error_of(folder)
    assert str(path) in text
    assert "'pt'" in text
    assert "'flax'" in text


def test_index_of_a_missing_shard(sharded):
    names = sorted(path.name for path in sharded.glob("model-*"))
    (sharded / names[1]).unlink()
    text = error_of(sharded)
    assert str(sharded / "model.safetensors.index.json") in text
    assert names[1] in text
    assert names[0] in text  # what is there


def test_index_that_names_tensors_its_shards_do_not_have(sharded):
    first = sorted(path.name for path in sharded.glob("model-*"))[0]
    edit_index(sharded, {"decode_head.extra": first})
    text = error_of(sharded)
    assert "model.safetensors.index.json" in text
    assert "decode_head.extra" in text


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a\\b", "..", ""])
def test_index_that_leads_out_of_its_directory(shard, sharded):
    edit_index(sharded, {"decode_head.classifier.bias": shard})
    assert "expected names of files beside it" in error_of(sharded)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"])
def test_broken_index(content, sharded):
    path = sharded / "model.safetensors.index.json"
    path.write_text(content)
    assert str(path) in error_of(sharded)


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "flax_model.msgpack")
    text = error_of(folder)
    assert "model.safetensors" in text
    assert "pytorch_model.bin" in text
    assert "found config.json, flax_model.msgpack" in text


def test_empty_directory(tmp_path):
    text = error_of(tmp_path)
    assert f"{tmp_path}: expected a file config.json, found nothing" in text


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\xfa", b"[]", b"3"])
def test_broken_config(content, folder):
    (folder / "config.json").write_bytes(content)
    assert str(folder / "config.json") in error_of(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_config_as_editors_of_windows_save_it(encoding, folder):
    path = folder / "config.json"
    edit_config(folder, drop_path_rate=0.3)
    path.write_bytes(path.read_text().encode(encoding))
    assert from_pretrained(folder).config.drop_path_rate == 0.3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "bert"}, "expected model_type 'segformer', got 'bert'"),
        ({"depths": [1, 2]}, "depths"),
        ({"depths": 3}, "config.json"),
        ({"hidden_act": "softplus"}, "hidden_act"),
        ({"id2label": {"zero": "sky"}}, "config.json"),
        ({"id2label": "sky"}, "id2label: expected names by number"),
        ({"id2label": {"zero": "sky"}, "num_labels": 5}, "id2label"),
        ({"dtype": "int8"}, "expected a floating dtype, got 'int8'"),
    ],
)
def test_wrong_config(change, told, folder):
    edit_config(folder, **change)
    text = error_of(folder, SegformerForSemanticSegmentation.from_pretrained)
    assert str(folder / "config.json") in text
    assert told in text


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_index(folder: Path, weights: dict[str, str]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(weights)
    path.write_text(json.dumps(index))

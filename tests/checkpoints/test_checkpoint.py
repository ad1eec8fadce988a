"""Checkpoints both ways between fastseg and transformers 5 and 4: every tensor bit for bit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastseg
from fastseg.checkpoints.load import CheckpointWarning
from fastseg.models.auto import from_pretrained
from fastseg.models.segformer.config import SegformerConfig
from tests.checkpoints.checkpoint_cases import (
    CLASSES,
    SEGMENTATION,
    SIZES,
    assert_same_tensors,
    ours,
    theirs,
)

pytestmark = pytest.mark.filterwarnings("error::fastseg.CheckpointWarning")

# Makes, under the folder argv[1], a random model of each class of argv[3:], the same one as
# half-precision shards, and a raw state dict. Then loads each folder of argv[2] and writes what
# came of it into the folder's loaded.pt.
WITH_4 = """
import json, pathlib, sys
import torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
folder, ours, sizes, *classes = sys.argv[1:]
folder, sizes = pathlib.Path(folder), json.loads(sizes)
torch.manual_seed(4)
for name in classes:
    model = getattr(transformers, name)(transformers.SegformerConfig(**sizes))
    for tensor in model.state_dict().values():
        tensor.normal_(0.2, 0.3) if tensor.is_floating_point() else tensor.fill_(7)
    model.save_pretrained(folder / name)
    model.save_pretrained(folder / (name + "-bin"), safe_serialization=False)
    model.half().save_pretrained(folder / (name + "-half"), max_shard_size="50KB")
for saved in sorted(pathlib.Path(ours).iterdir()):
    name = json.loads((saved / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(
        saved, output_loading_info=True, torch_dtype="auto"
    )
    torch.save(model.state_dict(), saved / "loaded.pt")
    info = {key: list(map(str, value)) for key, value in info.items()}
    (saved / "info.json").write_text(json.dumps(info))
"""


@pytest.fixture(scope="module")
def saved_for_4(tmp_path_factory):
    """A folder of fastseg's checkpoints, and the models by the folders' names."""
    folder = tmp_path_factory.mktemp("fastseg")
    models = {name: ours(name).to(torch.bfloat16) for name in CLASSES}
    models["sharded"] = ours(SEGMENTATION)
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="30KB" if name == "sharded" else None)
    assert (folder / "sharded" / "model.safetensors.index.json").exists()
    return folder, models


@pytest.fixture(scope="module")
def saved_by_4(run_transformers4, saved_for_4, tmp_path_factory):
    """A folder of transformers 4's, which in the same process loaded what fastseg saved."""
    folder = tmp_path_factory.mktemp("transformers4")
    run_transformers4(WITH_4, folder, saved_for_4[0], json.dumps(SIZES), *CLASSES)
    return folder


def by_transformers_5(name, folder, dtype=torch.float32):
    theirs(name).to(dtype).save_pretrained(folder)
    return load_file(folder / "model.safetensors")  # on disk transformers has fastseg's names


def raw_by_transformers_5(name, folder, prefix=""):
    model = theirs(name)
    model.save_pretrained(folder)
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    raw = {prefix + key: value for key, value in model.state_dict().items()}
    assert any("stages.0.blocks.0.attention.q_proj" in key for key in raw)
    torch.save(raw, folder / "pytorch_model.bin")
    return expected


def tensors_of_4(folder):
    if folder.name.endswith("-bin"):
        return torch.load(folder / "pytorch_model.bin", weights_only=True)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1 or not folder.name.endswith("-half")
    return {key: value for file in files for key, value in load_file(file).items()}


def in_pickled_shards(name, folder):
    """By fastseg, the second of PyTorch's old format."""
    model = ours(name)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    names = list(state)
    halves = {"one.bin": names[: len(names) // 2], "two.bin": names[len(names) // 2 :]}
    for file, part in halves.items():
        torch.save(
            {name: state[name] for name in part},
            folder / file,
            _use_new_zipfile_serialization=file == "one.bin",
        )
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return dict(state)


# Who wrote which kind of file: a function that does it, or the ending of transformers 4's folder.
FILES = {
    "transformers 5": by_transformers_5,
    "transformers 5, float16": partial(by_transformers_5, dtype=torch.float16),
    "transformers 5, bfloat16": partial(by_transformers_5, dtype=torch.bfloat16),
    "transformers 5, raw": raw_by_transformers_5,
    "transformers 5, raw, data parallel": partial(raw_by_transformers_5, prefix="module."),
    "transformers 5, raw, compiled": partial(raw_by_transformers_5, prefix="_orig_mod.module."),
    "transformers 4": "",
    "transformers 4, pickled": "-bin",
    "transformers 4, float16 shards": "-half",
    "fastseg, pickled shards": in_pickled_shards,
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", FILES)
def test_loads(kind, name, tmp_path, request):
    write = FILES[kind]
    if isinstance(write, str):
        folder = request.getfixturevalue("saved_by_4") / (name + write)
        expected = tensors_of_4(folder)
    else:
        folder, expected = tmp_path, write(name, tmp_path)
    loaded = from_pretrained(folder, dtype="auto")
    assert type(loaded) is getattr(fastseg, name)
    assert not loaded.training
    assert not loaded.load_report
    assert_same_tensors(loaded.state_dict(), expected)
    dtype = next((one for one in ("bfloat16", "float16") if one in kind), "float32")
    assert loaded.dtype == getattr(torch, dtype)
    if kind == "transformers 5":
        pixels = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            logits = getattr(transformers, name).from_pretrained(folder).eval()(pixels)[0]
            assert (loaded(pixels)[0] - logits).norm() <= 1e-5 * logits.norm()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("max_shard_size", [None, "30KB"])
def test_transformers_5_loads_what_fastseg_saves(name, max_shard_size, tmp_path):
    model = ours(name, id2label={0: "sky", 1: "road"}, num_labels=None, drop_path_rate=0.3)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.id2label == {0: "sky", 1: "road"}
    assert loaded.config.drop_path_rate == 0.3
    assert loaded.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "back")
    assert_same_tensors(load_file(tmp_path / "back" / "model.safetensors"), model.state_dict())


def test_transformers_4_loads_what_fastseg_saves(saved_for_4, saved_by_4):
    folder, models = saved_for_4
    for name, model in models.items():
        info = json.loads((folder / name / "info.json").read_text())
        assert not any(info.values()), info
        loaded = torch.load(folder / name / "loaded.pt", weights_only=True)
        assert_same_tensors(loaded, dict(model.state_dict()))


def test_base_prefix_is_optional(tmp_path):
    """Encoder tensors with the prefix into the bare encoder, and without it into a model."""
    model = ours("SegformerForImageClassification")
    model.save_pretrained(tmp_path)
    state = {name.removeprefix("segformer."): value for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert_same_tensors(from_pretrained(tmp_path).state_dict(), dict(model.state_dict()))

    with pytest.warns(CheckpointWarning, match=r"classifier\.weight"):
        encoder = fastseg.SegformerModel.from_pretrained(tmp_path)
    assert_same_tensors(encoder.state_dict(), dict(model.segformer.state_dict()))
    assert sorted(encoder.load_report.unexpected) == ["classifier.bias", "classifier.weight"]
    assert encoder.load_report.reinitialized == ()


@pytest.mark.parametrize("source", ["SegformerModel", "SegformerForImageClassification"])
def test_encoder_into_a_segmentation_model(source, tmp_path):
    encoder = theirs(source, initializer_range=0.01)
    encoder.save_pretrained(tmp_path)
    with pytest.warns(CheckpointWarning, match="newly initialised"):
        model = fastseg.SegformerForSemanticSegmentation.from_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    prefix = "segformer." if source == "SegformerModel" else ""
    expected = {prefix + name: value for name, value in stored.items() if "encoder." in name}
    state = model.state_dict()
    head = {name for name in state if name.startswith("decode_head.")}
    assert_same_tensors({name: state[name] for name in state.keys() - head}, expected)
    assert set(model.load_report.reinitialized) == head - {
        "decode_head.batch_norm.num_batches_tracked"
    }
    assert set(model.load_report.unexpected) == {
        name for name in stored if name.startswith("classifier.")
    }
    # As the model's own initialisation makes it: normal weights, zero biases, neutral BatchNorm.
    assert state["decode_head.linear_fuse.weight"].std().item() == pytest.approx(0.01, rel=0.15)
    assert not state["decode_head.classifier.bias"].any()
    assert not state["decode_head.linear_c.0.proj.bias"].any()
    assert (state["decode_head.batch_norm.weight"] == 1).all()
    assert (state["decode_head.batch_norm.running_var"] == 1).all()
    assert not state["decode_head.batch_norm.running_mean"].any()
    assert state["decode_head.batch_norm.num_batches_tracked"] == 0


def test_class_comes_from_the_names_without_architectures(tmp_path):
    for name in CLASSES:
        ours(name).save_pretrained(tmp_path / name)
        edit_config(tmp_path / name, architectures=None)
        assert type(from_pretrained(tmp_path / name)).__name__ == name


@pytest.mark.parametrize("change", [{"num_labels": 19}, {"id2label": {0: "sky", 1: "road"}}])
def test_other_classes(change, tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    with pytest.warns(CheckpointWarning, match=r"decode_head\.classifier\.weight") as caught:
        model = from_pretrained(tmp_path, **change)
    assert caught[0].filename == __file__
    number = change.get("num_labels") or len(change["id2label"])
    assert model.config.num_labels == number
    assert model.config.id2label == change.get(
        "id2label", {label: f"LABEL_{label}" for label in range(number)}
    )
    classifier = {"decode_head.classifier.weight", "decode_head.classifier.bias"}
    assert set(model.load_report.reinitialized) == classifier
    assert {mismatch.name for mismatch in model.load_report.mismatched} == classifier
    assert f"expected ({number}, 16, 1, 1), got (5, 16, 1, 1)" in str(model.load_report)
    state, stored = model.state_dict(), load_file(tmp_path / "model.safetensors")
    assert_same_tensors(
        {name: state[name] for name in state.keys() - classifier},
        {name: stored[name] for name in stored.keys() - classifier},
    )
    assert state["decode_head.classifier.weight"].shape == (number, 16, 1, 1)
    assert 0 < state["decode_head.classifier.weight"].std() < 0.04
    assert not state["decode_head.classifier.bias"].any()


def test_new_names_for_the_same_number_of_classes_keep_the_classifier(tmp_path):
    saved = ours(SEGMENTATION)
    saved.save_pretrained(tmp_path)
    names = dict(enumerate("abcde"))
    model = from_pretrained(tmp_path, id2label=names)
    assert model.config.id2label == names
    assert model.config.label2id == {name: label for label, name in names.items()}
    assert_same_tensors(model.state_dict(), dict(saved.state_dict()))


def test_ignore_mismatched_sizes(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    with pytest.warns(CheckpointWarning):
        model = from_pretrained(tmp_path, decoder_hidden_size=12, ignore_mismatched_sizes=True)
    state, stored = model.state_dict(), load_file(tmp_path / "model.safetensors")
    other = {name for name in state if state[name].shape != stored[name].shape}
    assert "decode_head.linear_fuse.weight" in other
    assert set(model.load_report.reinitialized) == other
    for name in state.keys() - other:  # the classifier's bias among them
        assert torch.equal(state[name], stored[name]), name


def test_config_of_an_old_transformers(tmp_path):
    """Fields that only old versions wrote are read, kept and written back."""
    model = ours(SEGMENTATION)
    model.save_pretrained(tmp_path)
    old = {
        "feature_strides": [4, 8, 16, 32],
        "downsampling_rates": [1, 4, 8, 16],
        "image_size": 224,
        "torch_dtype": "float32",
        "transformers_version": "4.12.0.dev0",
        "id2label": {str(label): f"class {label}" for label in range(5)},
        "reshape_last_stage": False,
        "dtype": None,
    }
    edit_config(tmp_path, **old)
    loaded = from_pretrained(tmp_path)
    assert loaded.config.reshape_last_stage is False
    assert loaded.config.id2label[4] == "class 4"
    loaded.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    changed = {**old, "dtype": "float32"}
    changed.pop("torch_dtype")
    assert changed.items() <= written.items()
    assert "torch_dtype" not in written
    transformers_model = transformers.AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path / "again"
    )
    assert transformers_model.config.image_size == 224


def test_num_labels_alone_in_the_config(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    edit_config(tmp_path, id2label=None, label2id=None, num_labels=5)
    assert from_pretrained(tmp_path).config.num_labels == 5


def test_loading_draws_no_random_numbers_and_keeps_no_file_open(tmp_path):
    saved = ours(SEGMENTATION)
    saved.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    # Weights are copies: overwriting the file in place leaves them alone.
    file = tmp_path / "model.safetensors"
    with file.open("rb+") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    assert_same_tensors(loaded.state_dict(), dict(saved.state_dict()))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_config_overrides(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    model = from_pretrained(tmp_path, drop_path_rate=0.25, torch_dtype=torch.float16)
    assert model.config.drop_path_rate == 0.25
    assert model.dtype == torch.float16
    with pytest.raises(TypeError, match="drop_path: expected an argument"):
        from_pretrained(tmp_path, drop_path=0.25)
    with pytest.raises(ValueError, match="dtype: expected"):
        from_pretrained(tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="num_labels"):
        from_pretrained(tmp_path, num_labels=0)


def test_saved_config_equals_the_models(tmp_path):
    model = ours(SEGMENTATION, hidden_act="relu", semantic_loss_ignore_index=0)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [SEGMENTATION]
    assert written["model_type"] == "segformer"
    assert written["dtype"] == "float32"
    loaded = from_pretrained(tmp_path).config
    assert isinstance(loaded, SegformerConfig)
    assert loaded.to_dict().items() >= model.config.to_dict().items()


def edit_config(folder: Path, **changes: object) -> None:
    """Change fields of a config.json; None removes one."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))

"""`subfolder=`, `variant=` and `device_map=`: files of transformers, and as it reads them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
import transformers

import fastseg
from fastseg.checkpoints.devices import chosen_device
from fastseg.checkpoints.load import CheckpointError
from tests.checkpoints.checkpoint_cases import SEGMENTATION, assert_same_tensors, ours, theirs

FIXTURES = Path(__file__).parents[1] / "fixtures"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(params=["one file", "shards"])
def variants(request, tmp_path):
    """A folder of transformers: a model, and another one as its variant "fp16"."""
    shards = {} if request.param == "one file" else {"max_shard_size": "15KB"}
    plain, half = theirs(SEGMENTATION), theirs(SEGMENTATION).half()
    plain.save_pretrained(tmp_path / "model", **shards)
    half.save_pretrained(tmp_path / "half")
    half.save_pretrained(tmp_path / "model", variant="fp16", **shards)
    plain.save_pretrained(tmp_path / "plain")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    if shards:
        assert {"model.safetensors.index.fp16.json", "model.safetensors.index.json"} <= names
    else:
        assert {"model.fp16.safetensors", "model.safetensors"} <= names
    return tmp_path


@pytest.mark.parametrize("by_class", [True, False])
def test_a_variant(by_class, variants):
    load = (
        fastseg.SegformerForSemanticSegmentation.from_pretrained
        if by_class
        else fastseg.from_pretrained
    )
    found = load(variants / "model", variant="fp16", dtype="auto")
    assert_same_tensors(
        found.state_dict(),
        dict(fastseg.from_pretrained(variants / "half", dtype="auto").state_dict()),
    )
    found = load(variants / "model", dtype=torch.float32)
    assert_same_tensors(
        found.state_dict(), dict(fastseg.from_pretrained(variants / "plain").state_dict())
    )


def test_a_variant_gives_what_transformers_gives(variants):
    reference = transformers.SegformerForSemanticSegmentation.from_pretrained(
        variants / "model", variant="fp16", dtype=torch.float32
    )
    found = fastseg.from_pretrained(variants / "model", variant="fp16", dtype=torch.float32)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found(pixels).logits, reference.eval()(pixels).logits)


def test_a_pickled_variant(tmp_path):
    model = ours(SEGMENTATION)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.ema.bin")
    found = fastseg.from_pretrained(tmp_path, variant="ema")
    assert_same_tensors(found.state_dict(), dict(model.state_dict()))
    (tmp_path / "config.json").unlink()  # weights alone
    heads = {"num_attention_heads": [1, 2, 3, 4]}
    found = fastseg.from_pretrained(tmp_path, variant="ema", **heads)
    assert_same_tensors(found.state_dict(), dict(model.state_dict()))
    with pytest.raises(CheckpointError, match=r"config\.json, found pytorch_model\.ema\.bin"):
        fastseg.from_pretrained(tmp_path, **heads)


def test_no_such_variant(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        fastseg.from_pretrained(tmp_path, variant="bf16")
    for part in ("model.bf16.safetensors", "pytorch_model.bf16.bin", "found config.json, model.s"):
        assert part in str(caught.value)


def test_a_variant_of_what_has_none(tmp_path):
    model = ours(SEGMENTATION)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"variant: expected None for the single file .*'fp16'"):
        fastseg.from_pretrained(tmp_path / "model.safetensors", variant="fp16")
    with pytest.raises(ValueError, match=r"variant: expected None with state_dict=, got 'fp16'"):
        fastseg.from_pretrained(tmp_path, state_dict=model.state_dict(), variant="fp16")
    with tarfile.open(FIXTURES / "keras_hub.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    with pytest.raises(ValueError, match="variant: expected None for a preset of KerasHub"):
        fastseg.from_pretrained(tmp_path / "segmenter", variant="fp16")


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "15KB"}])
def test_a_subfolder(shards, tmp_path):
    """Its files and none beside it: another model, processor and configuration are there."""
    place = tmp_path / "runs" / "best"
    theirs(SEGMENTATION).save_pretrained(place, **shards)
    fastseg.SegformerImageProcessor(size=32).save_pretrained(place)
    ours(SEGMENTATION, num_labels=7).save_pretrained(tmp_path)
    fastseg.SegformerImageProcessor(size=64).save_pretrained(tmp_path)
    where = {"subfolder": "runs/best"}
    found = fastseg.from_pretrained(tmp_path, **where)
    expected = fastseg.from_pretrained(place)
    assert_same_tensors(found.state_dict(), dict(expected.state_dict()))
    assert found.preprocessor_file == (place / "preprocessor_config.json").absolute()
    assert fastseg.SegformerConfig.from_pretrained(tmp_path, **where).num_labels == 5
    processor = fastseg.SegformerImageProcessor.from_pretrained(tmp_path, **where)
    assert processor.size == {"height": 32, "width": 32}
    for none in (None, ""):  # as in transformers
        assert fastseg.from_pretrained(tmp_path, subfolder=none).config.num_labels == 7
    reference = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path, **where)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found(pixels).logits, reference.eval()(pixels).logits)


def test_a_subfolder_without_a_config(tmp_path):
    model = ours(SEGMENTATION)
    (tmp_path / "run").mkdir()
    torch.save(model.state_dict(), tmp_path / "run" / "pytorch_model.bin")
    (tmp_path / "run" / "training_args.bin").touch()  # as transformers' Trainer leaves it
    with pytest.warns(fastseg.CheckpointWarning, match="Trainer"):
        found = fastseg.from_pretrained(tmp_path, subfolder="run", num_attention_heads=[1, 2, 3, 4])
    assert_same_tensors(found.state_dict(), dict(model.state_dict()))


def test_no_such_subfolder(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a file run/config\.json, found config\.j"):
        fastseg.from_pretrained(tmp_path, subfolder="run")
    with pytest.raises(ValueError, match="subfolder: expected None for the single file"):
        fastseg.from_pretrained(tmp_path / "model.safetensors", subfolder="run")


def test_both_of_a_hub_id(tmp_path, monkeypatch):
    """In a cache as huggingface_hub lays it out, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--someone--scenes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    place = repository / "snapshots" / COMMIT / "b0"
    half = theirs(SEGMENTATION).half()
    half.save_pretrained(place, variant="fp16", max_shard_size="15KB")
    half.save_pretrained(tmp_path / "half")
    found = fastseg.from_pretrained(
        "someone/scenes", cache_dir=tmp_path / "cache", subfolder="b0", variant="fp16", dtype="auto"
    )
    expected = fastseg.from_pretrained(tmp_path / "half", dtype="auto")
    assert_same_tensors(found.state_dict(), dict(expected.state_dict()))
    with pytest.raises(FileNotFoundError, match="someone/scenes"):
        fastseg.from_pretrained("someone/scenes", cache_dir=tmp_path / "cache", subfolder="b1")


def test_the_index_of_a_variant_stays_in_its_folder(tmp_path):
    theirs(SEGMENTATION).save_pretrained(tmp_path / "a", variant="x", max_shard_size="15KB")
    path = tmp_path / "a" / "model.safetensors.index.x.json"
    index = json.loads(path.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../secret.safetensors")
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.x\.json: expected names of files beside it"):
        fastseg.from_pretrained(tmp_path / "a", variant="x")


# Nothing else than a CPU is here but the device without memory.
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_map(device, tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    for given in (device, torch.device(device), {"": device}, {"": torch.device(device)}):
        assert fastseg.from_pretrained(tmp_path, device_map=given).device.type == device


@pytest.mark.parametrize("given", ["cuda:1", 1, {"": 1}, {"": "cuda:1"}, torch.device("cuda", 1)])
def test_device_map_of_a_gpu(given):
    assert chosen_device(None, given) == torch.device("cuda:1")


@pytest.mark.parametrize(
    "given",
    [
        *("auto", "balanced", "balanced_low_0", "sequential", "gpu", -1, True, 1.5, {}),
        {"": "disk"},
        {"encoder": "cpu", "decode_head": "cpu"},
        {"": "cpu", "decode_head": "cpu"},
    ],
)
def test_other_device_maps_are_an_error(given, tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map: expected one device for the whole model") as (
        caught
    ):
        fastseg.from_pretrained(tmp_path, device_map=given)
    assert str(caught.value).endswith(f"got {given!r}")


def test_device_and_device_map(tmp_path):
    with pytest.raises(ValueError, match="device_map: expected None beside device='cpu'"):
        fastseg.from_pretrained(tmp_path, device="cpu", device_map="cpu")
    with pytest.raises(ValueError, match="device: expected a device .* got 'gpu'"):
        fastseg.from_pretrained(tmp_path, device="gpu")

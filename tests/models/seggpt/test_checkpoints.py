"""Checkpoints of SegGPT: transformers' both ways, Painter's, sizes, and the memory of a load."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import fastseg
from fastseg.cli import main
from tests.model_cases import relative_error

from .cases import SMALL, inputs, theirs, twins

# Where the decoder takes every third layer, so that a file tells which.
EVEN = {"num_hidden_layers": 6, "merge_index": 2, "intermediate_hidden_state_indices": [2, 5]}
CLASSES = ("SegGptForImageSegmentation", "SegGptModel")


def assert_same_weights(ours, expected):
    state = ours.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("load", ["by class", "by architecture"])
def test_transformers_and_back(tmp_path, class_name, load):
    hosts = theirs(class_name)
    hosts.save_pretrained(tmp_path / "theirs")
    ours = (
        getattr(fastseg, class_name).from_pretrained(tmp_path / "theirs")
        if load == "by class"
        else fastseg.from_pretrained(tmp_path / "theirs")
    )
    assert type(ours).__name__ == class_name
    assert not ours.training
    assert not ours.load_report
    assert_same_weights(ours, hosts.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    again = type(hosts).from_pretrained(tmp_path / "ours")
    for name, tensor in hosts.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    given = inputs(hosts)
    with torch.no_grad():
        assert torch.equal(again(**given)[0], hosts(**given)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_transformers_4_loads_and_runs_what_is_saved(tmp_path, run_transformers4, dtype):
    """Also: there it is a host, whose result stays what it was."""
    hosts, ours = twins()
    ours.to(dtype).save_pretrained(tmp_path)
    given = inputs(hosts, 2)
    with torch.no_grad():
        expected = hosts(**given, feature_ensemble=True).pred_masks
    torch.save((given, expected), tmp_path / "given.pt")
    code = """
import sys, torch, transformers, fastseg
assert transformers.__version__.startswith("4.")
model = transformers.SegGptForImageSegmentation.from_pretrained(sys.argv[1]).float()
given, expected = torch.load(sys.argv[1] + "/given.pt")
with torch.no_grad():
    plain = model(**given, feature_ensemble=True).pred_masks
    fast = fastseg.accelerate(model, strict=True)(**given, feature_ensemble=True).pred_masks
    assert fastseg.report(model).count("folded") == 2
print(*(((one - expected).norm() / expected.norm()).item() for one in (plain, fast)))
"""
    errors = run_transformers4(code, tmp_path).split()
    limit = 4e-6 if dtype == torch.float32 else 0.05  # rounded weights
    assert all(float(error) < limit for error in errors)


@pytest.mark.parametrize("class_name", CLASSES)
def test_without_a_config(tmp_path, class_name):
    """The tensors tell the family and all sizes."""
    hosts = theirs(class_name, **EVEN)
    save_file(hosts.state_dict(), tmp_path / "weights.safetensors")
    if class_name == "SegGptModel":  # which four layers nobody takes is not told
        with pytest.raises(fastseg.CheckpointError, match="depth that 4 divides.* got 6: pass"):
            fastseg.SegGptModel.from_pretrained(tmp_path / "weights.safetensors")
    ours = fastseg.from_pretrained(
        tmp_path / "weights.safetensors", intermediate_hidden_state_indices=[2, 5]
    )
    assert type(ours).__name__ == class_name
    assert_same_weights(ours, hosts.state_dict())
    fields = ("image_size", "num_attention_heads", "mlp_dim", "pretrain_image_size", "patch_size")
    for name in fields:
        assert getattr(ours.config, name) == getattr(hosts.config, name), name


PAINTER = {
    "patch_embed.proj": "model.embeddings.patch_embeddings.projection",
    "pos_embed": "model.embeddings.position_embeddings",
    "mask_token": "model.embeddings.mask_token",
    "segment_token_x": "model.embeddings.segment_token_input",
    "segment_token_y": "model.embeddings.segment_token_prompt",
    "type_token_cls": "model.embeddings.type_token_semantic",
    "type_token_ins": "model.embeddings.type_token_instance",
    "norm": "model.encoder.layernorm",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_pred.0": "decoder.decoder_pred.conv",
    "decoder_pred.1": "decoder.decoder_pred.layernorm",
    "decoder_pred.3": "decoder.decoder_pred.head",
}
LAYER = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "attn.rel_pos_h": "attention.rel_pos_h",
    "attn.rel_pos_w": "attention.rel_pos_w",
    "mlp.fc1": "mlp.lin1",
    "mlp.fc2": "mlp.lin2",
}


def painters(state):
    """A state_dict under Painter's names, and those of its file in the same order."""
    names = {theirs: name for name, theirs in PAINTER.items()}
    inner = {theirs: name for name, theirs in LAYER.items()}
    found = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight").removesuffix(".bias")
        end = name.removeprefix(module)
        if layer := re.fullmatch(r"model\.encoder\.layers\.(\d+)\.(.+)", module):
            found[f"blocks.{layer[1]}.{inner[layer[2]]}{end}"] = tensor
        else:
            found[names[module] + end] = tensor
    return found


def test_painters_file(tmp_path, capsys):
    hosts = theirs(**EVEN)
    state = painters(hosts.state_dict())
    assert len(state) == len(hosts.state_dict())
    path = tmp_path / "seggpt_vit_large.pth"
    torch.save({"model": state, "epoch": 3}, path)
    ours = fastseg.from_pretrained(path)
    assert_same_weights(ours, hosts.state_dict())
    assert not ours.load_report
    with pytest.warns(fastseg.CheckpointWarning, match="not used"):
        encoder = fastseg.SegGptModel.from_pretrained(path)
    assert_same_weights(
        encoder,
        {n.removeprefix("model."): t for n, t in hosts.state_dict().items() if n[:6] == "model."},
    )
    assert main(["convert", str(path), str(tmp_path / "converted")]) == 0
    assert "SegGptForImageSegmentation, 0.2 M parameters, float32" in capsys.readouterr().out
    again = type(hosts).from_pretrained(tmp_path / "converted")
    given = inputs(hosts)
    with torch.no_grad():
        assert torch.equal(again(**given).pred_masks, hosts(**given).pred_masks)


def test_a_tensor_too_few_and_one_too_many(tmp_path):
    state = painters(theirs(**EVEN).state_dict())
    del state["blocks.3.attn.rel_pos_w"]
    state["blocks.3.attn.gate"] = torch.zeros(3)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(fastseg.CheckpointError) as raised:
        fastseg.from_pretrained(tmp_path / "weights.pth")
    assert "model.encoder.layers.3.attention.rel_pos_w: expected (7, 16)" in str(raised.value)
    assert "blocks.3.attn.gate: got (3,)" in str(raised.value)


def test_files_of_the_other_family(tmp_path):
    fastseg.from_preset("segformer_b0", num_classes=2).save_pretrained(tmp_path / "segformer")
    hosts = theirs()
    hosts.save_pretrained(tmp_path / "seggpt")
    with pytest.raises(fastseg.CheckpointError, match="model_type 'seggpt', got 'segformer'"):
        fastseg.SegGptModel.from_pretrained(tmp_path / "segformer")
    with pytest.raises(fastseg.CheckpointError, match="model_type 'segformer', got 'seggpt'"):
        fastseg.SegformerModel.from_pretrained(tmp_path / "seggpt")
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(fastseg.CheckpointError, match="expected tensors of a SegGPT"):
        fastseg.SegGptModel.from_pretrained(tmp_path / "weights.safetensors")


def test_fields_of_the_other_family(tmp_path):
    theirs().save_pretrained(tmp_path / "seggpt")
    fastseg.from_preset("segformer_b0", num_classes=2).save_pretrained(tmp_path / "segformer")
    with pytest.raises(TypeError, match="hidden_sizes: .* a field of SegGptConfig"):
        fastseg.from_pretrained(tmp_path / "seggpt", hidden_sizes=[1])
    with pytest.raises(TypeError, match="image_size: .* a field of SegformerConfig"):
        fastseg.from_pretrained(tmp_path / "segformer", image_size=[64, 64])


def test_another_image_size(tmp_path):
    """Tables are resized as transformers' forward resizes them, for the grid that it is given."""
    hosts = theirs()
    hosts.save_pretrained(tmp_path)
    with pytest.warns(fastseg.CheckpointWarning, match="for images of 96 x 40 instead of 64 x 32"):
        ours = fastseg.from_pretrained(tmp_path, image_size=[96, 40])
    assert ours.config.image_size == [96, 40]
    # The host takes other sizes where it is told not to look.
    patches = hosts.model.embeddings.patch_embeddings
    patches.image_size, patches.num_patches = [96, 40], 60
    given = inputs(ours)
    with torch.no_grad():
        expected = hosts(**given).pred_masks
        assert relative_error(ours(**given).pred_masks, expected) < 4e-6
    ours.save_pretrained(tmp_path / "resized")
    assert not fastseg.from_pretrained(tmp_path / "resized").load_report
    table = load_file(tmp_path / "model.safetensors")["model.encoder.layers.1.attention.rel_pos_w"]
    resized = F.interpolate(table.double().T[None], size=9, mode="linear")[0].T
    stored = ours.state_dict()["model.encoder.layers.1.attention.rel_pos_w"]
    assert torch.equal(stored, resized.float())


@pytest.mark.parametrize("size", [[128, 32], [32, 88]])
def test_painters_file_of_another_image_size(tmp_path, size):
    """Its tables tell the size."""
    hosts = theirs(**EVEN, image_size=size)
    torch.save({"model": painters(hosts.state_dict())}, tmp_path / "weights.pth")
    ours = fastseg.from_pretrained(tmp_path / "weights.pth")
    assert ours.config.image_size == size
    assert_same_weights(ours, hosts.state_dict())
    given = inputs(hosts)
    with torch.no_grad():
        expected = hosts(**given).pred_masks
        assert relative_error(ours(**given).pred_masks, expected) < 4e-6


@pytest.mark.parametrize(
    ("layers", "count", "message"),
    [
        (
            range(6),
            13,
            r"image_size: expected .* two pictures .* 16 and one of 8; got \[56, 32\]",
        ),
        (range(6), 16, r"layers.0.attention.rel_pos_h: expected \(15, 16\), got \(16, 16\)"),
        ([3], 27, r"layers.3.attention.rel_pos_h: expected \(15, 16\), got \(27, 16\)"),
    ],
    ids=["an odd number of rows", "of no grid", "of several grids"],
)
def test_tables_of_no_stacked_picture(tmp_path, layers, count, message):
    """Tables of several sizes, as those of layers with windows, are not resized to one."""
    state = painters(theirs(**EVEN).state_dict())
    for index in layers:
        state[f"blocks.{index}.attn.rel_pos_h"] = torch.zeros(count, 16)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(fastseg.CheckpointError, match=message):
        fastseg.from_pretrained(tmp_path / "weights.pth")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_copy_in_memory(tmp_path):
    wide = {**SMALL, "hidden_size": 768, "num_attention_heads": 12}
    fastseg.SegGptForImageSegmentation(fastseg.SegGptConfig(**wide)).save_pretrained(tmp_path)
    code = """
import sys, fastseg
def status(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(key))
fastseg.from_pretrained(sys.argv[1] + "/small")  # what is imported on the way
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = fastseg.from_pretrained(sys.argv[1])
weights = sum(p.numel() * 4 for p in model.parameters()) / 1024
# Pages of the mapped file count while they are read.
print((status("RssAnon") - before) / weights, (status("VmHWM") - before) / weights)
"""
    fastseg.SegGptModel(fastseg.SegGptConfig(**SMALL)).save_pretrained(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    anonymous, _ = map(float, done.stdout.split())
    assert anonymous < 1.1

"""Checkpoints that bitsandbytes has quantised."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastseg
from fastseg.cli import main

from .quantized_cases import eight_bit_weights, load_quantized, write_checkpoint

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of 8-bit weights, written by bitsandbytes."""
    whole, written = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("8bit")
    load_quantized(write_checkpoint(whole), load_in_8bit=True).save_pretrained(written)
    return written


def by_names_here(weights, model):
    """The same tensors by their names in `model`, which are those of transformers 4."""
    assert weights.keys() <= model.state_dict().keys()
    return {name: model.state_dict()[name] for name in weights}


@pytest.mark.parametrize("form", ["folder", "state_dict", "file"])
def test_codes_times_scale(folder, form):
    stored = load_file(folder / "model.safetensors")
    config = fastseg.SegformerConfig.from_pretrained(folder)
    if form == "folder":
        model = fastseg.from_pretrained(folder)
    elif form == "file":
        model = fastseg.from_pretrained(folder / "model.safetensors")
    else:
        model = fastseg.from_pretrained(None, state_dict=stored, config=config)
    expected = eight_bit_weights(stored)
    assert len(expected) == 34
    for name, weight in by_names_here(expected, model).items():
        assert torch.equal(weight, expected[name])
    assert not model.load_report
    if form != "state_dict":
        assert "quantization_config" not in model.config.to_dict()


def test_convert(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = eight_bit_weights(load_file(folder / "model.safetensors"))
    assert all(torch.equal(written[name], weight) for name, weight in expected.items())


def test_half_precision(folder):
    model = fastseg.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_other_order(folder, tmp_path):
    """Of the tiles of a GPU, as old versions wrote them."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("weight_format"))
    stored[name] = torch.tensor(2, dtype=torch.uint8)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fastseg.CheckpointError, match="in the order of a GPU's tiles"):
        fastseg.from_pretrained(tmp_path)


def test_codes_without_a_scale(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    stored = load_file(folder / "model.safetensors")
    name = next(name for name in stored if name.endswith("SCB"))
    del stored[name]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fastseg.CheckpointError, match=r"weight: .*int8"):
        fastseg.from_pretrained(tmp_path)


def test_four_bits(tmp_path):
    whole, written = tmp_path / "whole", tmp_path / "4bit"
    model = load_quantized(write_checkpoint(whole), load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model.save_pretrained(written)
    with pytest.raises(fastseg.CheckpointError) as error:
        fastseg.from_pretrained(written)
    assert "model.safetensors: expected floats or 8-bit weights, got 4-bit" in str(error.value)
    assert "model.dequantize()" in str(error.value)
    assert len(str(error.value).splitlines()) == 1

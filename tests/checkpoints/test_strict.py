"""`strict=False`: files with more than the model, or less, load and tell what differs."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import fastseg
from fastseg.checkpoints.load import CheckpointError, CheckpointWarning
from tests.checkpoints.checkpoint_cases import (
    SEGMENTATION,
    SIZES,
    assert_same_tensors,
    ours,
    theirs,
)
from tests.models.hosts import mmseg, nvlabs

HEADS = {"num_attention_heads": [1, 2, 3, 4]}


def counted(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model that thop has profiled: two counters in float64 in each module."""
    state = dict(model.state_dict())
    for place, _ in model.named_modules():
        for counter in ("total_ops", "total_params"):
            name = f"{place}.{counter}".removeprefix(".")
            state[name] = torch.zeros(1, dtype=torch.float64)
    return state


def counters(state) -> set[str]:
    return {name for name in state if name.rpartition(".")[2] in ("total_ops", "total_params")}


def test_counters_of_a_profiler(tmp_path):
    model = ours(SEGMENTATION)
    state = counted(model)
    torch.save(state, tmp_path / "it.pth")
    with pytest.raises(CheckpointError, match=r"unexpected \(strict=False leaves them out\)"):
        fastseg.from_pretrained(tmp_path / "it.pth", **HEADS)
    with pytest.warns(CheckpointWarning, match=r"dwconv\.total_ops"):
        loaded = fastseg.from_pretrained(tmp_path / "it.pth", strict=False, **HEADS)
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))  # in float32
    assert set(loaded.load_report.unexpected) == counters(state)
    assert not loaded.load_report.reinitialized


@pytest.mark.parametrize("library", [nvlabs, mmseg])
def test_counters_in_files_of_other_libraries(library, tmp_path):
    """There a layer's tensors may be those of several of fastseg's layers: counters are not."""
    network = library.MixVisionTransformer()
    torch.save({"state_dict": counted(network)}, tmp_path / "it.pth")
    heads = {"num_attention_heads": [1, 2, 5, 8]}
    with pytest.warns(CheckpointWarning):
        loaded = fastseg.from_pretrained(tmp_path / "it.pth", strict=False, **heads)
    assert set(loaded.load_report.unexpected) == counters(counted(network))
    assert not loaded.load_report.reinitialized
    assert loaded.dtype == torch.float32
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.eval()(pixels)[-1]
        torch.testing.assert_close(loaded(pixels)[0], expected, rtol=1e-4, atol=1e-5)


def test_what_is_beside_the_model(tmp_path):
    """A loss, a teacher of another network, buffers of mmcv's EMA hook, what is no tensor."""
    model = ours(SEGMENTATION)
    beside = {
        "criterion.weight": torch.ones(5),
        "teacher.conv1.weight": torch.ones(3, 3),
        "ema_segformer_encoder_layer_norm_0_bias": torch.ones(8),
        "epoch": 3,
    }
    torch.save({"state_dict": {**model.state_dict(), **beside}}, tmp_path / "it.ckpt")
    with pytest.raises(CheckpointError, match=r"'epoch' \(int\)"):
        fastseg.from_pretrained(tmp_path / "it.ckpt", **HEADS)
    with pytest.warns(CheckpointWarning, match="not used"):
        loaded = fastseg.from_pretrained(tmp_path / "it.ckpt", strict=False, **HEADS)
    assert set(loaded.load_report.unexpected) == beside.keys()
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))


def test_an_optimizer_is_still_an_error(tmp_path):
    torch.save({"state": {0: torch.zeros(1)}, "param_groups": []}, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"'state' \(dict\)"):
        fastseg.from_pretrained(tmp_path / "optimizer.pt", strict=False)


def test_the_lists_are_those_of_transformers(tmp_path):
    """It is never strict: what is missing is new, what is too much is left out."""
    theirs(SEGMENTATION).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    missing = {
        "segformer.encoder.layer_norm.2.weight",
        "decode_head.linear_fuse.weight",
        "segformer.encoder.block.0.0.mlp.dense1.bias",
    }
    for name in missing:
        del tensors[name]
    tensors["decode_head.total_ops"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, expected = transformers.SegformerForSemanticSegmentation.from_pretrained(
        tmp_path, output_loading_info=True
    )
    with pytest.raises(CheckpointError, match=r"missing \(3\)"):
        fastseg.from_pretrained(tmp_path)
    with pytest.warns(CheckpointWarning, match=r"newly initialised(.|\n)*not used"):
        model, info = fastseg.from_pretrained(tmp_path, strict=False, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    assert len(expected["missing_keys"]) == len(missing)  # by its names in memory
    assert set(info["unexpected_keys"]) == set(expected["unexpected_keys"])
    assert set(model.load_report.reinitialized) == missing
    state = model.state_dict()
    for name in tensors.keys() - {"decode_head.total_ops"}:
        assert torch.equal(state[name], tensors[name]), name
    assert torch.equal(state["segformer.encoder.layer_norm.2.weight"], torch.ones(24))
    assert state["decode_head.linear_fuse.weight"].std() > 0


def test_another_shape_is_still_an_error(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decode_head.classifier.bias"] = torch.zeros(9)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier\.bias: expected \(5,\), got \(9,\)"):
        fastseg.from_pretrained(tmp_path, strict=False)
    with pytest.warns(CheckpointWarning):
        fastseg.from_pretrained(tmp_path, strict=False, ignore_mismatched_sizes=True)


def test_weights_of_another_network_are_still_an_error(tmp_path):
    """Or else a model would come out that has nothing of the file."""
    ours(SEGMENTATION).save_pretrained(tmp_path)
    save_file(
        {"conv1.weight": torch.zeros(3, 3)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="none of the file's is the model's"):
        fastseg.from_pretrained(tmp_path, strict=False)


def test_the_same_tensor_twice_is_still_an_error():
    model = ours(SEGMENTATION)
    state = dict(model.state_dict())
    # The name of transformers 5's newer module tree.
    state["decode_head.linear_projections.0.proj.bias"] = torch.zeros(SIZES["decoder_hidden_size"])
    with pytest.raises(CheckpointError, match=r"there twice \(1\)"):
        fastseg.from_pretrained(None, config=model.config, state_dict=state, strict=False)

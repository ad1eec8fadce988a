"""`weights="ema"`: an average of the weights, or a teacher's, instead of the model's own."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import fastseg
from fastseg.checkpoints.load import CheckpointError, CheckpointWarning
from tests.checkpoints.checkpoint_cases import SEGMENTATION, assert_same_tensors, ours

HEADS = {"num_attention_heads": [1, 2, 3, 4]}


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def averaged(model):
    """What torch's AveragedModel, which torchvision's scripts use, stores of a model."""
    holder = AveragedModel(model)
    holder.n_averaged += 3
    return holder.state_dict()


FILES = {
    "torchvision": lambda own, average: {
        "model": own.state_dict(),
        "model_ema": averaged(average),
        "epoch": 3,
    },
    "timm": lambda own, average: {
        "state_dict": own.state_dict(),
        "state_dict_ema": average.state_dict(),
    },
    "detr": lambda own, average: {
        "ema": {"module": average.state_dict(), "updates": 100},
        "model": own.state_dict(),
    },
    "teacher": lambda own, average: {
        "student": own.state_dict(),
        "teacher": average.state_dict(),
    },
    "lightning module": lambda own, average: {
        "state_dict": {
            **prefixed(own.state_dict(), "model."),
            **prefixed(averaged(average), "ema_model."),
        }
    },
    "one state dict": lambda own, average: {
        **prefixed(average.state_dict(), "teacher.net."),
        **prefixed(own.state_dict(), "student.net."),
    },
    "average alone": lambda own, average: {"ema": average.state_dict()},
}


@pytest.mark.filterwarnings("ignore::fastseg.CheckpointWarning")
@pytest.mark.parametrize("name", FILES)
def test_on_request(name, tmp_path):
    own, average = ours(SEGMENTATION), ours(SEGMENTATION)
    torch.save(FILES[name](own, average), tmp_path / "it.pth")
    loaded = fastseg.from_pretrained(tmp_path / "it.pth", weights="ema", **HEADS)
    assert_same_tensors(loaded.state_dict(), dict(average.state_dict()))
    for default in ({}, {"weights": "model"}):
        loaded = fastseg.from_pretrained(tmp_path / "it.pth", **default, **HEADS)
        expected = average if name == "average alone" else own
        assert_same_tensors(loaded.state_dict(), dict(expected.state_dict()))


def test_in_safetensors_and_in_a_given_state_dict(tmp_path):
    own, average = ours(SEGMENTATION), ours(SEGMENTATION)
    state = {**own.state_dict(), **prefixed(average.state_dict(), "ema.")}
    save_file(state, tmp_path / "it.safetensors")
    model_class = fastseg.SegformerForSemanticSegmentation
    for arguments in ((tmp_path / "it.safetensors", None), (None, state)):
        with pytest.warns(CheckpointWarning, match="'ema.' was taken, those without a prefix left"):
            loaded = model_class.from_pretrained(
                arguments[0], state_dict=arguments[1], weights="ema", **HEADS
            )
        assert_same_tensors(loaded.state_dict(), dict(average.state_dict()))


def test_the_warning_names_the_option(tmp_path):
    own, average = ours(SEGMENTATION), ours(SEGMENTATION)
    torch.save(FILES["timm"](own, average), tmp_path / "it.pth")
    with pytest.warns(CheckpointWarning, match=r'weights="ema".*state_dict='):
        fastseg.from_pretrained(tmp_path / "it.pth", **HEADS)


def mmengine(own, average):
    """Its EMAHook trades the two: `state_dict` is what is deployed, with the average in it."""
    ema = {"steps": torch.tensor(3), **prefixed(own.state_dict(), "module.")}
    meta = {"mmengine_version": "0.10.4", "epoch": 3}
    return {"meta": meta, "state_dict": average.state_dict(), "ema_state_dict": ema}


def lightning(own, average):
    """So does its WeightAveraging."""
    return {
        "state_dict": prefixed(average.state_dict(), "model."),
        "current_model_state": prefixed(own.state_dict(), "model."),
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }


@pytest.mark.parametrize("weights", ["model", "ema"])
@pytest.mark.parametrize("program", [mmengine, lightning])
def test_programs_that_put_the_average_in_the_models_place(program, weights, tmp_path):
    own, average = ours(SEGMENTATION), ours(SEGMENTATION)
    torch.save(program(own, average), tmp_path / "it.pth")
    with pytest.warns(CheckpointWarning, match="'state_dict' holds an average of the weights"):
        loaded = fastseg.from_pretrained(tmp_path / "it.pth", weights=weights, **HEADS)
    assert_same_tensors(loaded.state_dict(), dict(average.state_dict()))


def test_an_entry_of_that_name_in_other_programs(tmp_path):
    own, average = ours(SEGMENTATION), ours(SEGMENTATION)
    content = {"state_dict": own.state_dict(), "ema_state_dict": average.state_dict()}
    torch.save(content, tmp_path / "it.pth")
    with pytest.warns(CheckpointWarning):
        loaded = fastseg.from_pretrained(tmp_path / "it.pth", weights="ema", **HEADS)
    assert_same_tensors(loaded.state_dict(), dict(average.state_dict()))


def test_there_is_none(tmp_path):
    model = ours(SEGMENTATION)
    model.save_pretrained(tmp_path)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "it.pth")
    for place in (tmp_path, tmp_path / "it.pth"):
        with pytest.raises(CheckpointError, match=r'weights="ema": expected an average.*none'):
            fastseg.from_pretrained(place, weights="ema", **HEADS)


@pytest.mark.parametrize("wrong", ["EMA", "average", None, True])
def test_wrong_values(wrong):
    model = ours(SEGMENTATION)
    with pytest.raises(ValueError, match=r"weights: expected 'model' or 'ema', got"):
        fastseg.from_pretrained(None, state_dict=copy.copy(model.state_dict()), weights=wrong)

"""Checkpoints as training programs write them: the weights among everything else."""

from __future__ import annotations

import argparse
import collections

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fastseg
from fastseg.checkpoints.load import CheckpointError, CheckpointWarning
from fastseg.models.auto import from_pretrained
from tests.checkpoints.checkpoint_cases import SEGMENTATION, assert_same_tensors, ours

HEADS = {"num_attention_heads": [1, 2, 3, 4]}


@pytest.fixture
def model():
    return ours(SEGMENTATION)


def prefixed(state, prefix):
    return collections.OrderedDict((prefix + name, tensor) for name, tensor in state.items())


def training_state(model):
    """What is beside the weights: an optimizer that has taken a step, a scheduler, a scaler."""
    model.train()(torch.zeros(2, 3, 64, 64)).logits.sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.step()
    model.load_state_dict(state)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    return optimizer.state_dict(), scheduler.state_dict()


def own_example(state, optimizer, scheduler):
    rng = torch.get_rng_state()
    return {"step": 10, "model": state, "optimizers": [optimizer], "rng": rng, "arguments": {}}


def torchvision_script(state, optimizer, scheduler):
    args = argparse.Namespace(lr=0.01, output_dir=".")
    return {"model": state, "optimizer": optimizer, "lr_scheduler": scheduler, "args": args}


def timm(state, optimizer, scheduler):
    args = argparse.Namespace(model="segformer")
    return {"epoch": 3, "arch": "x", "state_dict": state, "optimizer": optimizer, "args": args}


def lightning(state, optimizer, scheduler):
    return {
        "epoch": 1,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {
            **prefixed(state, "model."),
            "criterion.weight": torch.ones(5),
            "train_iou.confmat": torch.zeros(5, 5),
            "mean": torch.zeros(1, 3, 1, 1),
        },
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer],
        "lr_schedulers": [scheduler],
        "hparams_name": "kwargs",
        "hyper_parameters": argparse.Namespace(lr=1e-3),
    }


def deepspeed(state, optimizer, scheduler):
    shapes = [collections.OrderedDict((name, t.shape) for name, t in state.items())]
    return {
        "module": state,
        "param_shapes": shapes,
        "optimizer": None,
        "ds_config": {},
        "ds_version": "0.16",
    }


def nested(state, optimizer, scheduler):
    return {"state": {"network": {"weights": state}, "optimizer": optimizer}, "loss": 0.5}


def criterion_first(state, optimizer, scheduler):
    return {"criterion": {"ce.weight": torch.ones(5)}, "net": state}


PROGRAMS = [
    own_example,
    torchvision_script,
    timm,
    lightning,
    deepspeed,
    nested,
    criterion_first,
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(program, model, tmp_path):
    content = program(model.state_dict(), *training_state(model))
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    if program is lightning:
        with pytest.warns(CheckpointWarning, match="not used") as caught:
            loaded = from_pretrained(path, **HEADS)
        for name in ("criterion.weight", "train_iou.confmat", "mean"):
            assert name in str(caught[0].message)
            assert name in loaded.load_report.unexpected
    else:
        loaded = from_pretrained(path, **HEADS)
        assert not loaded.load_report
    assert type(loaded).__name__ == SEGMENTATION
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "_orig_mod.module.",
        "model._orig_mod.",
        "net.",
        "segformer.",
        "encoder.",
        "backbone.",
        "base_model.model.",
        "lit.student_net.model.",
        "_fsdp_wrapped_module.",
    ],
)
@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_prefixes(prefix, form, model, tmp_path):
    state = prefixed(model.state_dict(), prefix)
    path = tmp_path / f"it.{form}"
    torch.save(state, path) if form == "pt" else save_file(state, path)
    loaded = from_pretrained(path, **HEADS)
    assert not loaded.load_report
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))


def test_parts_that_were_compiled_or_sharded(model, tmp_path):
    def name_of(name):
        name = name.replace("segformer.", "segformer._orig_mod.")
        return name.replace("mlp.", "mlp._fsdp_wrapped_module._checkpoint_wrapped_module.")

    torch.save({name_of(n): t for n, t in model.state_dict().items()}, tmp_path / "it.pt")
    loaded = from_pretrained(tmp_path / "it.pt", **HEADS)
    assert not loaded.load_report
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))


def test_an_encoder_in_ones_own_model(tmp_path):
    """Its head is of another kind, outside of the encoder's names."""
    encoder = ours("SegformerModel")
    own = nn.ModuleDict({"backbone": encoder, "head": nn.Conv2d(32, 5, 1)})
    torch.save(own.state_dict(), tmp_path / "it.pt")
    with pytest.warns(CheckpointWarning, match=r"head\.weight"):
        loaded = from_pretrained(tmp_path / "it.pt", **HEADS)
    assert type(loaded) is fastseg.SegformerModel
    assert_same_tensors(loaded.state_dict(), dict(encoder.state_dict()))
    assert set(loaded.load_report.unexpected) == {"head.weight", "head.bias"}


def entries(own, other):
    """Two sets of weights in entries of their own."""
    return [
        ({"model_ema": other, "model": own}, "'model' was taken, 'model_ema' left out"),
        (
            {"state_dict": own, "state_dict_ema": prefixed(other, "module.")},
            "'state_dict' was taken, 'state_dict_ema' left out",
        ),
        (
            {
                "swa_model": {"n_averaged": torch.tensor(3), **prefixed(other, "module.")},
                "net": own,
            },
            "'net' was taken, 'swa_model' left out",
        ),
        ({"teacher": other, "student": own}, "'student' was taken, 'teacher' left out"),
        ({"nets": {"ema": other, "raw": own}}, "'nets.raw' was taken, 'nets.ema' left out"),
    ]


def modules(own, other):
    """The same in one state dict."""
    return [
        (
            {"state_dict": {**prefixed(other, "ema_model.module."), **prefixed(own, "model.")}},
            "'model.' was taken, 'ema_model.module.' left out",
        ),
        (
            {**prefixed(own, "student."), **prefixed(other, "teacher.")},
            "'student.' was taken, 'teacher.' left out",
        ),
        ({**own, **prefixed(other, "ema.")}, "those without a prefix were taken, 'ema.' left out"),
        (
            {**prefixed(other, "model.ema."), **prefixed(own, "model.")},
            "'model.' was taken, 'model.ema.' left out",
        ),
    ]


@pytest.mark.parametrize("number", range(9))
def test_of_two_sets_the_models_own_is_taken(number, model, tmp_path):
    averaged = ours(SEGMENTATION).state_dict()
    content, told = (entries(model.state_dict(), averaged) + modules(model.state_dict(), averaged))[
        number
    ]
    torch.save(content, tmp_path / "it.pt")
    with pytest.warns(CheckpointWarning) as caught:
        loaded = from_pretrained(tmp_path / "it.pt", **HEADS)
    assert told in str(caught[0].message)
    assert "state_dict=" in str(caught[0].message)
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))
    assert not loaded.load_report.unexpected
    # The way to the other set that the message names.
    other = fastseg.SegformerForSemanticSegmentation.from_pretrained(
        None, state_dict={"ema": averaged}, **HEADS
    )
    assert_same_tensors(other.state_dict(), dict(averaged))


@pytest.mark.parametrize("entry", ["ema", "averaged_model"])
def test_an_average_alone_is_taken(entry, model, tmp_path):
    state = {"n_averaged": torch.tensor(3), **prefixed(model.state_dict(), "module.")}
    torch.save({entry: state, "step": 3}, tmp_path / "it.pt")
    with pytest.warns(CheckpointWarning, match="n_averaged"):
        loaded = from_pretrained(tmp_path / "it.pt", **HEADS)
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))


def test_accelerates_folder(model, tmp_path):
    """save_state writes no config.json, and other files beside the weights."""
    torch.save(training_state(model)[0], tmp_path / "optimizer.bin")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "random_states_0.pkl").write_bytes(b"\x80\x04N.")
    loaded = from_pretrained(tmp_path, **HEADS)
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))


def test_weights_that_are_in_other_files(model, tmp_path):
    empty = {name: torch.empty(0) for name in model.state_dict()}
    torch.save({"module": empty, "ds_version": "0.16"}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"states\.pt: .*ZeRO-3.*zero_to_fp32\.py"):
        from_pretrained(tmp_path / "mp_rank_00_model_states.pt")


def test_an_optimizer_alone(model, tmp_path):
    torch.save(training_state(model)[0], tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"got entries 'state' \(dict\)"):
        from_pretrained(tmp_path / "optimizer.pt")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "adapter of PEFT: merge it"),
        (["latest", "zero_to_fp32.py"], "its zero_to_fp32.py makes pytorch_model.bin"),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch"),
        (["checkpoint-500", "checkpoint-1000"], "give one of the folders in it"),
        (["saved_model.pb"], "SavedModel of TensorFlow"),
    ],
)
def test_folders_of_something_else(names, told, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path)
    assert told in str(caught.value)
    assert names[0] in str(caught.value)

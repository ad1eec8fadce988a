"""Weights and configurations that the caller has, and what a load tells."""

from __future__ import annotations

import collections

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastseg
from fastseg.checkpoints.load import CheckpointError, CheckpointWarning
from tests.checkpoints.checkpoint_cases import (
    CLASSES,
    SEGMENTATION,
    SIZES,
    assert_same_tensors,
    ours,
    theirs,
)

HEADS = {"num_attention_heads": [1, 2, 3, 4]}
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("by_class", [True, False])
def test_both_given(name, by_class):
    """As transformers loads them; and from the tensors of its own newer module tree."""
    saved = ours(name, drop_path_rate=0.3)
    load = getattr(fastseg, name).from_pretrained if by_class else fastseg.from_pretrained
    loaded = load(None, config=saved.config, state_dict=saved.state_dict())
    assert type(loaded) is type(saved)
    assert not loaded.training
    assert_same_tensors(loaded.state_dict(), dict(saved.state_dict()))
    assert loaded.config == saved.config
    assert loaded.config is not saved.config
    reference = getattr(transformers, name).from_pretrained(
        None, config=transformers.SegformerConfig(**SIZES), state_dict=saved.state_dict()
    )
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels)[0], reference.eval()(pixels)[0])
        newer = load(None, config=saved.config, state_dict=reference.state_dict())
        torch.testing.assert_close(newer(pixels)[0], reference(pixels)[0])
    # Copies: neither side sees the other's changes.
    loaded.load_state_dict(ours(name).state_dict())
    assert not torch.equal(next(iter(saved.parameters())), next(iter(loaded.parameters())))


def test_weights_alone():
    saved = ours(SEGMENTATION)
    loaded = fastseg.from_pretrained(None, state_dict={"model": saved.state_dict()}, **HEADS)
    assert_same_tensors(loaded.state_dict(), dict(saved.state_dict()))
    parameters = collections.OrderedDict(saved.named_parameters())  # they want gradients
    parameters |= dict(saved.named_buffers())
    loaded = fastseg.from_pretrained(None, state_dict=parameters, **HEADS)
    assert all(parameter.is_leaf for parameter in loaded.parameters())
    assert_same_tensors(loaded.state_dict(), dict(saved.state_dict()))


def test_weights_instead_of_a_folders(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    fastseg.SegformerImageProcessor(size=32).save_pretrained(tmp_path)
    other = ours(SEGMENTATION)
    loaded = fastseg.from_pretrained(tmp_path, state_dict=other.state_dict())
    assert_same_tensors(loaded.state_dict(), dict(other.state_dict()))
    assert loaded.preprocessor_file == (tmp_path / "preprocessor_config.json").absolute()


def test_configuration_instead_of_a_folders(tmp_path):
    saved = ours(SEGMENTATION)
    saved.save_pretrained(tmp_path)
    config = fastseg.SegformerConfig(**SIZES | {"num_labels": None}, id2label=list("abcde"))
    loaded = fastseg.from_pretrained(tmp_path, config=config)
    assert loaded.config.id2label[4] == "e"
    assert_same_tensors(loaded.state_dict(), dict(saved.state_dict()))
    (tmp_path / "config.json").unlink()
    assert fastseg.from_pretrained(tmp_path, config=config).config == config
    assert fastseg.from_pretrained(tmp_path / "model.safetensors", config=config).config == config
    assert fastseg.from_pretrained(tmp_path, config=config, hidden_act="relu").config != config
    wrong = fastseg.SegformerConfig(**SIZES | {"depths": [1, 1, 1, 1]})
    with pytest.raises(CheckpointError, match=r"as config describes it\n.*unexpected"):
        fastseg.from_pretrained(tmp_path, config=wrong)


def test_the_class_that_a_model_was_loaded_from_is_not_meant(tmp_path):
    """A classifier's configuration stays with the segmentation model that was made of it."""
    ours("SegformerForImageClassification").save_pretrained(tmp_path)
    with pytest.warns(CheckpointWarning):
        model = fastseg.SegformerForSemanticSegmentation.from_pretrained(tmp_path)
    again = fastseg.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert type(again) is fastseg.SegformerForSemanticSegmentation


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({}, ValueError, "pretrained_model_name_or_path: expected .*state_dict="),
        ({"config": fastseg.SegformerConfig()}, ValueError, "state_dict="),
        ({"state_dict": [torch.zeros(1)]}, TypeError, "state_dict: expected a dictionary.*list"),
        ({"state_dict": {"epoch": 3}}, CheckpointError, r"state_dict: .*'epoch' \(int\)"),
        ({"state_dict": {}, "config": {}}, TypeError, "config: expected a SegformerConfig.*dict"),
        ({"state_dict": {"a.weight": torch.zeros(1)}}, CheckpointError, r"a\.weight"),
    ],
)
def test_wrong_arguments(arguments, error, told):
    with pytest.raises(error, match=told):
        fastseg.from_pretrained(None, **arguments)


def names_of(info, key):
    return {item if isinstance(item, str) else item[0] for item in info[key]}


@pytest.mark.filterwarnings("ignore::fastseg.CheckpointWarning")
@pytest.mark.parametrize(
    ("source", "target", "options"),
    [
        (SEGMENTATION, SEGMENTATION, {}),
        ("SegformerModel", SEGMENTATION, {}),
        ("SegformerForImageClassification", SEGMENTATION, {}),
        (SEGMENTATION, SEGMENTATION, {"num_labels": 7, "ignore_mismatched_sizes": True}),
    ],
)
def test_loading_info_is_that_of_transformers(source, target, options, tmp_path):
    theirs(source).save_pretrained(tmp_path)
    _, expected = getattr(transformers, target).from_pretrained(
        tmp_path, output_loading_info=True, **options
    )
    model, info = getattr(fastseg, target).from_pretrained(
        tmp_path, output_loading_info=True, **options
    )
    assert type(model) is getattr(fastseg, target)
    assert info.keys() >= expected.keys() - {"conversion_errors"} | {"error_msgs"}
    assert names_of(info, "unexpected_keys") == names_of(expected, "unexpected_keys")
    ignored = "num_batches_tracked"
    missing = {name for name in info["missing_keys"] if ignored not in name}
    # In memory transformers has other names.
    assert len(missing) == len([n for n in expected["missing_keys"] if ignored not in n])
    assert names_of(info, "mismatched_keys") == names_of(expected, "mismatched_keys")
    for name, in_file, in_model in info["mismatched_keys"]:
        shapes = {one[0]: tuple(map(tuple, one[1:])) for one in expected["mismatched_keys"]}
        assert shapes[name] == (in_file, in_model)
    assert info["error_msgs"] == []


def test_saving_given_weights(tmp_path):
    model, other = ours(SEGMENTATION), ours(SEGMENTATION)
    model.save_pretrained(tmp_path / "a", state_dict=other.state_dict(), safe_serialization=True)
    assert_same_tensors(load_file(tmp_path / "a" / "model.safetensors"), dict(other.state_dict()))
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="safe_serialization: expected True"):
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    prefixed = {f"module.{name}": value for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"state_dict: .*got others: .*module\.segformer"):
        model.save_pretrained(tmp_path / "b", state_dict=prefixed)
    assert not (tmp_path / "b").exists()

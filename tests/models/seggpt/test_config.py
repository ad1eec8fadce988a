"""SegGptConfig: the fields and files of transformers', and what it refuses."""

from __future__ import annotations

import json

import pytest
import transformers

import fastseg

from .cases import SMALL


@pytest.mark.parametrize("fields", [{}, SMALL, {"mlp_dim": 7, "num_labels": 3}])
def test_the_fields_are_transformers(fields):
    theirs, ours = transformers.SegGptConfig(**fields), fastseg.SegGptConfig(**fields)
    known = ours.to_dict()
    for name, value in theirs.to_dict().items():
        if name in known:
            assert json.loads(json.dumps(known[name])) == json.loads(json.dumps(value)), name
    assert known["model_type"] == "seggpt"
    assert set(theirs.to_dict()) - set(known) <= set(transformers.PretrainedConfig().to_dict())


def test_files_both_ways(tmp_path):
    theirs, ours = transformers.SegGptConfig(**SMALL), fastseg.SegGptConfig(**SMALL)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    loaded = fastseg.SegGptConfig.from_pretrained(tmp_path / "theirs")
    for name, value in ours.to_dict().items():
        assert getattr(loaded, name) == value, name
    again = transformers.SegGptConfig.from_pretrained(tmp_path / "ours")
    for name in (*SMALL, "mlp_dim", "beta", "num_labels"):
        expected = getattr(theirs, name)
        assert getattr(again, name) == (
            list(expected) if isinstance(expected, tuple) else expected
        ), name


def test_one_number_is_both_sides():
    assert fastseg.SegGptConfig(image_size=64).image_size == [64, 64]


WRONG = [
    ({"merge_index": 6}, "merge_index: expected none above the smallest of .* 5, got 6"),
    ({"intermediate_hidden_state_indices": [5, 24]}, "numbers of the 24 layers, from 0"),
    ({"intermediate_hidden_state_indices": []}, "intermediate_hidden_state_indices: expected"),
    ({"num_attention_heads": 7}, "num_attention_heads: expected a divisor of hidden_size, 1024"),
    ({"use_relative_position_embeddings": False}, "use_relative_position_embeddings: expected"),
    ({"hidden_act": "maxout"}, "hidden_act: expected one of"),
    ({"image_size": [48, 448]}, "image_size: expected .* a multiple of 32 and one of 16"),
    ({"image_size": [448, 440]}, "image_size: expected"),
    ({"image_size": [896, 448, 3]}, "image_size: expected"),
    ({"patch_size": [16, 16]}, "patch_size: expected an integer"),
    ({"pretrain_image_size": 8}, "pretrain_image_size: expected at least a patch"),
    ({"hidden_size": 0}, "hidden_size: expected at least 1"),
    ({"drop_path_rate": 2}, "drop_path_rate: expected a number from 0 to 1"),
    ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels and id2label: expected the same"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_values(fields, message):
    with pytest.raises(ValueError, match=message):
        fastseg.SegGptConfig(**fields)


def test_an_unknown_field():
    with pytest.raises(TypeError, match="merge_idx: .* did you mean merge_index"):
        fastseg.SegGptConfig(merge_idx=2)

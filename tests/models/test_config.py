"""SegformerConfig: fields, defaults and files of transformers, and errors."""

from __future__ import annotations

import json

import pytest
import transformers

import fastseg

FIELDS = [
    "num_channels",
    "num_encoder_blocks",
    "depths",
    "sr_ratios",
    "hidden_sizes",
    "patch_sizes",
    "strides",
    "num_attention_heads",
    "mlp_ratios",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout_prob",
    "initializer_range",
    "drop_path_rate",
    "layer_norm_eps",
    "decoder_hidden_size",
    "semantic_loss_ignore_index",
    "reshape_last_stage",
    "num_labels",
    "id2label",
    "label2id",
]


def values(config):
    fields = {
        name: list(value) if isinstance(value := getattr(config, name), tuple) else value
        for name in FIELDS
    }
    # An alias, which transformers 5.17 does not have.
    fields["num_hidden_layers"] = getattr(config, "num_hidden_layers", config.num_encoder_blocks)
    if fields["label2id"] is None:  # transformers 5.23 leaves it out; fastseg derives it
        fields["label2id"] = {name: number for number, name in fields["id2label"].items()}
    return fields


def test_defaults_are_those_of_transformers():
    assert values(fastseg.SegformerConfig()) == values(transformers.SegformerConfig())


def test_every_field_of_the_class_is_an_argument():
    own = vars(transformers.SegformerConfig)["__annotations__"]
    assert set(own) <= {*FIELDS, "num_hidden_layers"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_labels": 19},
        {"id2label": {0: "sky", 1: "road", 2: "tree"}},
        {"id2label": {"0": "sky", "1": "road"}, "label2id": {"sky": 0, "road": 1}},
        {"depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768},
    ],
)
def test_files_both_ways(arguments, tmp_path):
    hf_config = transformers.SegformerConfig(**arguments)
    hf_config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    config = fastseg.SegformerConfig.from_dict(fields)
    assert values(config) == values(hf_config)
    again = transformers.SegformerConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert values(again) == values(hf_config)


def test_unknown_keys_are_kept():
    config = fastseg.SegformerConfig.from_dict(
        {"downsampling_rates": [1, 4, 8, 16], "depths": [1] * 4}
    )
    assert config.downsampling_rates == [1, 4, 8, 16]
    assert config.to_dict()["downsampling_rates"] == [1, 4, 8, 16]
    assert config.to_dict()["model_type"] == "segformer"


def test_labels():
    config = fastseg.SegformerConfig(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.num_labels = 4
    assert config.label2id["LABEL_3"] == 3
    named = fastseg.SegformerConfig(id2label={0: "a", 1: "b"})
    named.num_labels = 2  # the same number leaves the names
    assert named.label2id == {"a": 0, "b": 1}


def test_a_config_is_not_shared_with_its_arguments():
    depths = [2, 2, 2, 2]
    config = fastseg.SegformerConfig(depths=depths)
    depths[0] = 7
    config.to_dict()["depths"][1] = 7
    assert config.depths == [2, 2, 2, 2]
    assert config == fastseg.SegformerConfig()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"depths": [2, 2]}, r"depths: .*4 encoder blocks.*\[2, 2\]"),
        ({"depths": [2, -1, 2, 2]}, "depths: .*at least 0"),
        ({"sr_ratios": [8, 4, 2, 0]}, "sr_ratios: .*at least 1"),
        ({"num_attention_heads": [3, 2, 5, 8]}, "num_attention_heads: .*3 heads.*32"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob: .*1.5"),
        ({"hidden_act": "sine"}, "hidden_act: .*gelu_new.*sine"),
        ({"num_labels": 0}, "num_labels: .*0"),
        ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels and id2label: .*3 and 1"),
        ({"num_labels": True}, "num_labels: .*True"),
        ({"num_channels": 0}, "num_channels: .*0"),
        ({"decoder_hidden_size": 2.5}, "decoder_hidden_size: .*2.5"),
        ({"problem_type": "ranking"}, "problem_type: .*ranking"),
    ],
)
def test_errors_name_the_field(arguments, text):
    with pytest.raises(ValueError, match=text):
        fastseg.SegformerConfig(**arguments)

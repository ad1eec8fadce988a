"""Values of a configuration as people and programs write them, and keywords that are none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers

import fastseg
from fastseg.checkpoints.load import CheckpointError, CheckpointWarning
from tests.checkpoints.checkpoint_cases import CLASSES, SEGMENTATION, SIZES, ours, theirs

PLAIN = {**SIZES, "depths": [1, 2, 1, 1], "mlp_ratios": [2, 4, 4, 4], "drop_path_rate": 0.25}


def by_numpy(value):
    if isinstance(value, list):
        return np.array(value)
    return np.int64(value) if isinstance(value, int) else np.float64(value)


def as_floats(value):
    return [float(one) for one in value] if isinstance(value, list) else float(value)


def as_text(value):
    return [str(one) for one in value] if isinstance(value, list) else str(value)


@pytest.mark.parametrize("form", [by_numpy, as_floats, as_text, lambda v: as_text(as_floats(v))])
@pytest.mark.parametrize("make", ["constructor", "from_dict", "from_pretrained"])
def test_numbers_in_other_forms(form, make, tmp_path):
    written = {name: form(value) for name, value in PLAIN.items()}
    if make == "constructor":
        config = fastseg.SegformerConfig(**written, reshape_last_stage=np.True_)
    elif make == "from_dict":
        config = fastseg.SegformerConfig.from_dict({"model_type": "segformer", **written})
    else:
        fastseg.SegformerConfig(num_labels=3).save_pretrained(tmp_path)
        config = fastseg.SegformerConfig.from_pretrained(tmp_path, **written)
    expected = fastseg.SegformerConfig(**PLAIN)
    assert config == expected
    assert json.loads(config.to_json_string()) == json.loads(expected.to_json_string())
    types = {type(value) for value in vars(config).values()}
    assert types <= {int, float, bool, str, list, dict, type(None)}
    assert all(type(one) is int for one in config.depths)
    fastseg.SegformerForSemanticSegmentation(config)  # its layers take no floats


def test_null_is_the_default(tmp_path):
    fields = json.loads(fastseg.SegformerConfig().to_json_string())
    empty = dict.fromkeys(fields) | {"num_labels": None, "classifier_dropout_prob": None}
    assert fastseg.SegformerConfig.from_dict(empty) == fastseg.SegformerConfig()
    assert transformers.SegformerConfig().num_labels == 2
    with pytest.raises(ValueError, match="depths: expected one value for each.*None"):
        fastseg.SegformerConfig(depths=None)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"depths": 2}, "depths: expected one value for each encoder block, got 2"),
        ({"depths": "2222"}, "depths: .*'2222'"),
        ({"depths": [2, 2.5, 2, 2]}, "depths: expected an integer, got 2.5"),
        ({"sr_ratios": [8, 4, 2, True]}, "sr_ratios: expected an integer, got True"),
        ({"num_channels": "three"}, "num_channels: expected an integer, got 'three'"),
        ({"num_channels": float("nan")}, "num_channels: expected an integer, got nan"),
        ({"num_channels": "inf"}, "num_channels: .*'inf'"),
        ({"mlp_ratios": [4, 4, 4, None]}, "mlp_ratios: expected a number, got None"),
        ({"drop_path_rate": "much"}, "drop_path_rate: expected a number, got 'much'"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate: expected a probability"),
        ({"reshape_last_stage": "false"}, "reshape_last_stage: expected true or false"),
        ({"return_dict": 1}, "return_dict: expected true or false, got 1"),
        ({"id2label": "sky"}, "id2label: expected names by number.*'sky'"),
        ({"id2label": {}}, "id2label: expected names by number"),
        ({"id2label": []}, "id2label: expected names by number"),
        ({"id2label": {"first": "sky"}}, "id2label: expected an integer, got 'first'"),
        ({"id2label": ["sky"], "label2id": ["sky"]}, "label2id: expected numbers by name"),
        ({"id2label": ["sky", "road"], "num_labels": 3}, "num_labels and id2label: .*3 and 2"),
        ({"num_labels": "many"}, "num_labels: expected an integer, got 'many'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers: .*num_encoder_blocks.*4; got 3"),
    ],
)
def test_errors_name_the_field(arguments, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        fastseg.SegformerConfig(**arguments)
    if "num_hidden_layers" in arguments or None in arguments.get("mlp_ratios", ()):
        return
    if arguments.get("id2label") in ({}, []) or len(arguments) == 2:
        return  # in a file these are no mistakes, or the number counts
    fields = {**json.loads(fastseg.SegformerConfig().to_json_string()), **arguments}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=rf"config\.json: not a valid.*{told}"):
        fastseg.SegformerConfig.from_pretrained(path)


@pytest.mark.parametrize(
    "names",
    [["road", "car"], ("road", "car"), np.array(["road", "car"]), {"0": "road", 1.0: "car"}],
)
def test_names_as_a_list(names, tmp_path):
    expected = {0: "road", 1: "car"}
    config = fastseg.SegformerConfig(id2label=names)
    assert config.id2label == expected
    assert config.label2id == {"road": 0, "car": 1}
    assert fastseg.from_preset("segformer_b0", id2label=names).config.id2label == expected
    ours(SEGMENTATION, num_labels=2).save_pretrained(tmp_path)
    assert fastseg.from_pretrained(tmp_path, id2label=names).config.id2label == expected
    fields = json.loads((tmp_path / "config.json").read_text()) | {"id2label": list(names)}
    if not isinstance(names, dict):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert fastseg.from_pretrained(tmp_path).config.id2label == expected


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def named(count):
    names = {str(label): f"c{label}" for label in range(count)}
    return {"id2label": names, "label2id": {name: int(label) for label, name in names.items()}}


@pytest.mark.parametrize(("count", "left"), [(3, 3), (7, 5)])
@pytest.mark.parametrize("stated", [5, "5", 5.0])
@pytest.mark.parametrize("name", CLASSES)
def test_num_labels_beside_other_names(name, stated, count, left, tmp_path):
    """The weights have `num_labels` classes, as transformers 5 loads them."""
    theirs(name).save_pretrained(tmp_path)
    edited(tmp_path, num_labels=stated, **named(count))
    if isinstance(stated, int):
        reference = getattr(transformers, name).from_pretrained(tmp_path)
        assert reference.config.num_labels == 5
    with pytest.warns(CheckpointWarning, match=rf"config\.json is 5, and id2label has {count}"):
        model = fastseg.from_pretrained(tmp_path)
    assert model.load_report.notes
    assert not model.load_report.reinitialized
    expected = {label: f"c{label}" if label < left else f"LABEL_{label}" for label in range(5)}
    assert model.config.id2label == expected
    assert model.config.label2id == {name: label for label, name in expected.items()}


def test_names_that_the_weights_agree_with(tmp_path):
    """As transformers 4 takes it, which then loads the same file."""
    ours(SEGMENTATION).save_pretrained(tmp_path)
    edited(tmp_path, num_labels=9, **named(5))
    with pytest.warns(CheckpointWarning, match="the weights have 5 classes"):
        model = fastseg.from_pretrained(tmp_path)
    assert model.config.id2label == {label: f"c{label}" for label in range(5)}


def test_other_classes_than_a_file_that_disagrees(tmp_path):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    edited(tmp_path, num_labels=5, **named(3))
    with pytest.warns(CheckpointWarning, match="newly initialised"):
        model = fastseg.from_pretrained(tmp_path, num_labels=2)
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    with pytest.raises(ValueError, match="num_labels and id2label: .*2 and 3"):
        fastseg.from_pretrained(tmp_path, num_labels=2, id2label=["a", "b", "c"])


def from_file(**fields):
    return fastseg.SegformerConfig.from_dict(fields)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("drop_path", "drop_path_rate"),
        ("in_chans", "num_channels"),
        ("in_channels", "num_channels"),
        ("num_classes", "num_labels"),
        ("num_lables", "num_labels"),
        ("hidden_size", "hidden_sizes"),
        ("embed_dims", "hidden_sizes"),
        ("attention_dropout_prob", "attention_probs_dropout_prob"),
        ("id2labels", "id2label"),
    ],
)
def test_unknown_keywords_are_refused(name, nearest, tmp_path):
    saved = ours(SEGMENTATION)
    saved.save_pretrained(tmp_path)
    calls = [
        lambda **given: fastseg.SegformerConfig(**given),
        lambda **given: fastseg.from_pretrained(tmp_path, **given),
        lambda **given: fastseg.SegformerModel.from_pretrained(tmp_path, **given),
        lambda **given: fastseg.SegformerConfig.from_pretrained(tmp_path, **given),
    ]
    if name != "num_classes":  # an argument of it
        calls.append(lambda **given: fastseg.from_preset("segformer_b0", **given))
    for call in calls:
        with pytest.raises(TypeError, match=rf"{name}: expected .*did you mean {nearest}\?"):
            call(**{name: 0.1})
    # A file may carry anything, as of a version to come.
    assert getattr(from_file(**{name: 0.1}), name) == 0.1


def test_nothing_is_near():
    with pytest.raises(TypeError, match=r"xyz: expected a field of SegformerConfig .*got xyz=1$"):
        fastseg.SegformerConfig(xyz=1)
    with pytest.raises(TypeError, match=r"devise: .*did you mean device\?"):
        fastseg.from_pretrained("anywhere", devise="cpu")


def test_what_transformers_writes_is_taken(tmp_path):
    """All keys of its files, and what its Trainer adds."""
    config = transformers.SegformerConfig(num_labels=4)
    config.architectures = [SEGMENTATION]
    config.use_cache = False
    config.dtype = torch.float16
    config.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for made in (
        fastseg.SegformerConfig(**fields),
        fastseg.SegformerConfig.from_dict(fields),
        fastseg.SegformerConfig.from_dict(config.to_dict()),
        fastseg.SegformerConfig.from_pretrained(tmp_path),
    ):
        assert made.num_labels == 4
        assert made.use_cache is False
        assert made.architectures == [SEGMENTATION]
    again = fastseg.SegformerConfig(**made.to_dict())
    assert again == made


class Wider(fastseg.SegformerConfig):
    """A user's own."""

    def __init__(self, extra=1, **kwargs):
        super().__init__(**kwargs)
        self.extra = extra


def test_a_subclass_has_fields_of_its_own():
    config = Wider.from_dict({"extra": 5, "depths": [1, 1, 1, 1], "from_elsewhere": 2})
    assert (config.extra, config.depths, config.from_elsewhere) == (5, [1, 1, 1, 1], 2)
    with pytest.raises(TypeError, match=r"extras: expected .*did you mean extra\?"):
        Wider(extras=1)


def test_json_files(tmp_path):
    config = fastseg.SegformerConfig(id2label=["a", "b"], depths=(1, 1, 1, 1))
    config.to_json_file(tmp_path / "it.json")
    assert (tmp_path / "it.json").read_text() == config.to_json_string()
    theirs_read = transformers.SegformerConfig.from_json_file(tmp_path / "it.json")
    assert theirs_read.id2label == config.id2label
    assert list(theirs_read.depths) == config.depths
    assert fastseg.SegformerConfig.from_pretrained(tmp_path / "it.json") == config
    theirs_read.to_json_file(tmp_path / "theirs.json")
    read = fastseg.SegformerConfig.from_pretrained(tmp_path / "theirs.json")
    assert (read.id2label, read.depths) == (config.id2label, config.depths)
    config.save_pretrained(tmp_path / "new" / "folder")
    assert fastseg.SegformerConfig.from_pretrained(tmp_path / "new" / "folder") == config
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(CheckpointError, match="expected model_type 'segformer', got 'bert'"):
        fastseg.SegformerConfig.from_pretrained(tmp_path / "bert")
    (tmp_path / "smp.json").write_text('{"encoder_name": "mit_b0", "in_channels": 3}')
    with pytest.raises(CheckpointError, match="expected model_type 'segformer', got None"):
        fastseg.SegformerConfig.from_pretrained(tmp_path / "smp.json")
    processor = fastseg.SegformerImageProcessor(size=64)
    processor.to_json_file(tmp_path / "processor.json")
    assert json.loads((tmp_path / "processor.json").read_text()) == processor.to_dict()


def test_preset_fields_that_have_two_names():
    assert fastseg.from_preset("segformer_b0", num_labels=4).config.num_labels == 4
    assert fastseg.from_preset("segformer_b0", depths=[1] * 4).config.depths == [1] * 4
    for given in ({"num_classes": 3, "num_labels": 4}, {"num_classes": 3, "num_labels": 3}):
        with pytest.raises(TypeError, match="num_labels: given twice, as .* and as 3"):
            fastseg.from_preset("segformer_b0", **given)

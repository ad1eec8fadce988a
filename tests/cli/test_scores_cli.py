"""`fastseg predict --scores` and `--threshold`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.cli import main
from tests.cli.cli_cases import photo, read_labels, save_model, tree


def scores_of(model_folder, name, **options):
    model = fastseg.from_pretrained(model_folder, dtype=torch.float32)
    processor = fastseg.SegformerImageProcessor.from_pretrained(model_folder)
    options |= {"return_scores": True, "scores_dtype": torch.float32}
    (labels,), (scores,) = fastseg.segment(model, photo(name), processor=processor, **options)
    return labels.numpy(), scores.numpy()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The tiny model, more certain of some pixels than of others."""
    return certain(save_model(tmp_path_factory.mktemp("models") / "certain"))


def certain(folder):
    model = fastseg.from_pretrained(folder, dtype=torch.float32)
    processor = fastseg.SegformerImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        pixels = processor(photo("coffee"), return_tensors="pt").pixel_values
        scale = model(pixels).logits.std()
        for parameter in model.decode_head.classifier.parameters():
            parameter /= scale
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def coffee(tmp_path):
    photo("coffee").save(tmp_path / "coffee.png")
    return tmp_path / "coffee.png"


@pytest.mark.parametrize("slide", [None, (40, 30)])
def test_grey_pictures_of_scores(coffee, predict, model_folder, tmp_path, slide):
    windows = ["--slide", *slide] if slide else []
    assert predict(coffee, "--scores", "--no-overlay", *windows) == 0
    assert tree(tmp_path / "out") == {"coffee_labels.png", "coffee_scores.png"}
    labels, expected = scores_of(model_folder, "coffee", slide=slide)
    with Image.open(tmp_path / "out" / "coffee_scores.png") as image:
        assert image.mode == "L"
        found = np.asarray(image).astype(float)
    assert found.std() > 5
    assert np.abs(found - 255 * expected).max() <= 0.501
    assert np.array_equal(read_labels(tmp_path / "out" / "coffee_labels.png"), labels)


def test_without_the_option_there_are_none(coffee, predict, tmp_path):
    assert predict(coffee) == 0
    assert tree(tmp_path / "out") == {"coffee_labels.png", "coffee_overlay.jpg"}


def test_scores_are_no_inputs_and_are_replaced(coffee, predict, tmp_path, capsys):
    folder = coffee.parent
    for _ in range(2):
        assert predict(folder, "--scores", output=folder) == 0
    names = {"coffee.png", "coffee_labels.png", "coffee_overlay.jpg", "coffee_scores.png"}
    assert {name for name in tree(folder) if "/" not in name} == names
    assert "3 outputs of earlier runs left out" in capsys.readouterr().err


def test_a_threshold(coffee, predict, model_folder, tmp_path):
    labels, scores = scores_of(model_folder, "coffee")
    threshold = float(np.median(scores))
    assert predict(coffee, "--threshold", threshold, "--json") == 0
    found = read_labels(tmp_path / "out" / "coffee_labels.png")
    assert np.array_equal(found, np.where(scores < threshold, 255, labels))
    classes = json.loads((tmp_path / "out" / "coffee.json").read_text())["classes"]
    left_out = [one for one in classes if one["id"] == 255]
    assert [(one["name"], one["pixels"]) for one in left_out] == [
        ("not certain", int((found == 255).sum()))
    ]


def test_a_threshold_of_one_class(coffee, tmp_path):
    folder = certain(save_model(tmp_path / "one", num_labels=1))
    arguments = ["predict", str(coffee), "--model", str(folder), "--no-overlay", "--device", "cpu"]
    shares = []
    for threshold in ("0.3", "0.5", "0.7"):
        out = tmp_path / threshold
        assert main([*arguments, "--output", str(out), "--threshold", threshold]) == 0
        labels = read_labels(out / "coffee_labels.png")
        assert set(np.unique(labels)) <= {0, 1}
        shares.append(labels.mean())
    assert shares[0] > shares[1] > shares[2] > 0


def test_wrong_threshold(coffee, predict, capsys):
    assert predict(coffee, "--threshold", "50") == 2
    assert "--threshold: expected a number from 0 to 1, got '50'" in capsys.readouterr().err

"""`fastseg predict --prompt`: pictures by an example, with a SegGPT."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.cli import main
from tests.cli.cli_cases import read_labels, save_seggpt


@pytest.fixture
def seggpt(tmp_path):
    return save_seggpt(tmp_path / "seggpt")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, classes in (("one", 1), ("two", 3)):
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        labels = rng.integers(0, classes + 1, (20, 30)).astype(np.uint8)
        Image.fromarray(labels * (255 if classes == 1 else 1)).save(tmp_path / f"{name}-mask.png")
    return folder


def predict(seggpt, tmp_path, *arguments):
    where = ["--model", str(seggpt), "--output", str(tmp_path / "out"), "--device", "cpu"]
    return main(["predict", *map(str, arguments), *where])


def test_a_folder_by_one_example_and_by_two(seggpt, pictures, tmp_path, capsys):
    one = (pictures / "one.png", tmp_path / "one-mask.png")
    two = (pictures / "two.png", tmp_path / "two-mask.png")
    model = fastseg.from_pretrained(seggpt)
    image = Image.open(two[0])
    for pairs in ([one], [one, two]):
        options = [part for pair in pairs for part in ("--prompt", *pair)]
        assert predict(seggpt, tmp_path, *options, pictures, "--json") == 0
        assert "2 of 2 images segmented" in capsys.readouterr().out
        prompts = [tuple(map(Image.open, pair)) for pair in pairs]
        (expected,) = fastseg.segment(model, image, prompts=prompts)
        (labels,) = (tmp_path / "out").rglob("two_labels.png")
        assert np.array_equal(read_labels(labels), expected)
        (found,) = (tmp_path / "out").rglob("two.json")
        names = {one["name"] for one in json.loads(found.read_text())["classes"]}
        most = 1 if len(pairs) == 1 else 3
        assert names <= {"background", *(f"class {n}" for n in range(1, most + 1))}


def test_wrong_options(seggpt, pictures, tmp_path, model_folder, capsys):
    pair = ("--prompt", pictures / "one.png", tmp_path / "one-mask.png")
    absent = ("--prompt", pictures / "one.png", tmp_path / "absent.png")
    colours = ("--prompt", pictures / "one.png", pictures / "two.png")
    for model, options, status, message in (
        (seggpt, (), 2, "--model: a SegGPT needs an example: --prompt IMAGE MASK"),
        (model_folder, pair, 2, "--prompt: expected a SegGPT by --model, got a Segformer"),
        (seggpt, (*pair, "--scores"), 2, "--scores: not with --prompt"),
        (seggpt, (*pair, "--threshold", "0.5"), 2, "--threshold: not with --prompt"),
        (seggpt, (*pair, "--slide", "16", "8"), 2, "--slide: not with --prompt"),
        (seggpt, absent, 1, "absent.png: No such file"),
        (seggpt, colours, 1, "as in a mask of colours"),
    ):
        assert predict(model, tmp_path, *options, pictures) == status
        assert message in capsys.readouterr().err

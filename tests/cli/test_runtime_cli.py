"""`fastseg predict --runtime`."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.exporting.runtimes import RUNTIMES

from .cli_cases import photo, read_labels, segmented


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_same_results(runtime, model_folder, photos, predict, tmp_path, capsys):
    arguments = ["--runtime", runtime, "--dtype", "float32"]
    assert predict(photos, "--json", *arguments) == 0
    assert f"folded, {runtime} " in capsys.readouterr().err
    labels = read_labels(tmp_path / "out" / "coffee_labels.png")
    with Image.open(photos / "coffee.jpg") as image:
        assert (labels == segmented(model_folder, image)).mean() > 0.999
    exported = tmp_path / "model.onnx"
    assert main(["export", str(model_folder), "--output", str(exported)]) == 0
    where = ["--model", str(exported), "--output", str(tmp_path / "other")]
    assert main(["predict", str(photos), *where, *arguments]) == 0
    assert (read_labels(tmp_path / "other" / "coffee_labels.png") == labels).all()
    said = json.loads((tmp_path / "out" / "coffee.json").read_text())
    assert said["model"] == str(model_folder)


def test_file_without_a_runtime(model_folder, tmp_path, capsys):
    exported = tmp_path / "model.onnx"
    fastseg.export(fastseg.from_pretrained(model_folder), exported, check=False)
    photo("cat").save(tmp_path / "cat.png")
    assert main(["predict", str(tmp_path / "cat.png"), "--model", str(exported)]) == 1
    assert "--runtime of predict" in capsys.readouterr().err

"""The command line but for what `predict` writes: usage, models, `info` and `demo`."""

from __future__ import annotations

import importlib.metadata
import json

import numpy as np
import pytest
import torch

import fastseg
from fastseg.cli import demo, main, options
from tests.cli.cli_cases import photo, read_labels, save_model, tree


def test_a_model_without_image_processor_file_gets_the_default_one(photos, tmp_path, capsys):
    folder = save_model(tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    out = tmp_path / "out"
    assert main(["predict", str(photos), "--model", str(folder), "--output", str(out)]) == 0
    assert "no preprocessor_config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "--dtype"),
        (["--device", "tpu"], "--device"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--batch-size", "0"], "--batch-size"),
        (["--slide", "32"], "--slide"),
        (["--slide", "16", "32"], "--slide"),
        (["--alpha", "2"], "--alpha"),
        (["--output", __file__], "--output"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage(photos, model_folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)  # where the default --output would be made
    assert main(["predict", str(photos), "--model", str(model_folder), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("argv", [[], ["predict"], ["unknown"], ["demo", "--seed", "x"]])
def test_wrong_usage_without_pictures(argv, capsys):
    assert main(argv) == 2
    assert "usage: fastseg" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert main(["predict", "--help"]) == 0
    assert "--slide CROP STRIDE" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastseg {fastseg.__version__}\n"


@pytest.mark.parametrize("kind", ["missing", "corrupt", "classifier", "without head"])
def test_models_that_cannot_be_used(photos, tmp_path, capsys, kind):
    folder = tmp_path / "model"
    if kind != "missing":
        save_model(folder)
    if kind == "corrupt":
        (folder / "model.safetensors").write_bytes(b"\0" * 40)
    config = fastseg.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1, 1, 1, 1]
    )
    if kind == "classifier":
        fastseg.SegformerForImageClassification(config).save_pretrained(folder)
    if kind == "without head":
        fastseg.SegformerModel(config).save_pretrained(folder)
        saved = json.loads((folder / "config.json").read_text())
        saved["architectures"] = ["SegformerForSemanticSegmentation"]
        (folder / "config.json").write_text(json.dumps(saved))
    out = tmp_path / "out"
    assert main(["predict", str(photos), "--model", str(folder), "--output", str(out)]) == 1
    assert f"error: --model {folder}: " in capsys.readouterr().err
    assert not out.exists()


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["versions"]["fastseg"] == fastseg.__version__
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["transformers"] == importlib.metadata.version("transformers")
    cpu = info["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["threads"] == torch.get_num_threads()
    assert cpu["backend"] == "eager"
    assert len(info["devices"]) == 1 + torch.cuda.device_count()
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for expected in (fastseg.__version__, torch.__version__, cpu["name"], cpu["reason"]):
        assert expected in text


def test_info_tells_of_a_backend_that_cannot_run(monkeypatch, capsys):
    monkeypatch.setenv("FASTSEG_BACKEND", "nonsense")
    assert main(["info"]) == 0
    assert "backend none: FASTSEG_BACKEND: expected" in capsys.readouterr().out


@pytest.mark.parametrize("source", [["--image", "photo.png"], ["--seed", "7"]])
def test_demo_with_another_model(model_folder, tmp_path, monkeypatch, capsys, source):
    """All of the demo but the embedded model itself."""
    monkeypatch.setattr(options, "EMBEDDED_MODEL", model_folder)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.chdir(tmp_path)
    photo("coffee").save("photo.png")
    assert main(["demo", *source, "--output", "out", "--device", "cpu"]) == 0
    stem = {"--image": "photo", "--seed": "scene-7"}[source[0]]
    assert tree(tmp_path / "out") == {f"{stem}_labels.png", f"{stem}_overlay.png"}
    printed = capsys.readouterr().out
    assert ("true labels" in printed) == (source[0] == "--seed")
    assert "picture to label map" in printed
    labels = read_labels(tmp_path / "out" / f"{stem}_labels.png")
    for index in np.unique(labels):
        assert f"{(labels == index).sum()}\n" in printed


def test_demo_of_what_cannot_be_read(tmp_path, capsys):
    assert main(["demo", "--image", str(tmp_path / "nowhere.png")]) == 1
    assert "nowhere.png: No such file" in capsys.readouterr().err
    assert main(["demo", "--seed", "-1"]) == 2
    assert "--seed" in capsys.readouterr().err


def test_agreement_with_true_labels():
    labels, truth = np.array([[0, 0], [1, 1]]), np.array([[0, 1], [1, 1]])
    agreement, mean_iou = demo._compare(labels, truth)
    assert agreement == 0.75
    assert mean_iou == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "ROUNDS", 1)
    assert main(["demo", "--output", str(tmp_path)]) == 0
    assert tree(tmp_path) == {"scene_labels.png", "scene_overlay.png"}
    printed = capsys.readouterr().out
    assert "forward" in printed
    assert "picture to label map" in printed
    labels = read_labels(tmp_path / "scene_labels.png")
    assert len(np.unique(labels)) >= 4


@pytest.mark.slow
def test_demo_of_a_new_scene_agrees_with_its_true_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "ROUNDS", 1)
    assert main(["demo", "--seed", "777777", "--output", str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "true labels" in line)
    share = float(line.split(": ")[1].split("%")[0])
    assert share > 85


def test_the_default_model_comes_with_a_notice(photos, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["predict", str(photos), "--output", out, "--no-overlay"]) == 0
    assert "trained on drawn scenes only" in capsys.readouterr().err


def test_tune_without_a_gpu_says_so(capsys, tmp_path):
    assert main(["tune", "--output", str(tmp_path / "x.json"), "--device", "cpu"]) == 1
    assert "tuning needs a GPU" in capsys.readouterr().err
    assert main(["tune", "--output", str(tmp_path / "x.json"), "--minutes", "0"]) == 2
    assert "expected a number above 0, got '0'" in capsys.readouterr().err

"""`fastseg evaluate`, and the drawn scenes that it can be tried on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fastseg.cli import main
from fastseg.demo.scenes import CLASSES, draw_scene
from tests.cli.cli_cases import photo, save_model, segmented, tree

NAMES = ("coffee", "astronaut", "rocket")


@pytest.fixture(scope="module")
def data(model_folder, tmp_path_factory):
    """Photographs with masks that the tiny model gets right for the most part."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for name in NAMES:
        image = photo(name)
        image.save(root / "images" / f"{name}.png")
        labels = segmented(model_folder, image).astype(np.uint8)
        wrong = rng.random(labels.shape) < 0.2
        labels[wrong] = rng.integers(0, 6, wrong.sum())
        labels[0] = 255
        Image.fromarray(labels).save(root / "masks" / f"{name}.png")
    return root


@pytest.fixture
def evaluate(model_folder, tmp_path):
    """Runs `fastseg evaluate` with the tiny model and the folder `out`; gives status, metrics."""

    def run(data, *arguments):
        out = tmp_path / "out"
        where = ["--model", str(model_folder), "--output", str(out), "--device", "cpu"]
        status = main(["evaluate", str(data), *where, *map(str, arguments)])
        metrics = out / "metrics.json"
        return status, json.loads(metrics.read_text()) if status == 0 else None

    return run


def expected(data, model_folder, names=NAMES):
    """The confusion matrix, pixel by pixel."""
    found = np.zeros((6, 6), np.int64)
    for name in names:
        with Image.open(data / "masks" / f"{name}.png") as mask:
            truth = np.asarray(mask)
        labels = segmented(model_folder, photo(name))
        for true, label in zip(truth.ravel(), labels.ravel(), strict=True):
            if true != 255:
                found[true, label] += 1
    return found


def test_figures_and_files(evaluate, data, model_folder, tmp_path, capsys):
    status, metrics = evaluate(data, "--worst", 2, "--boundary")
    assert status == 0
    matrix = expected(data, model_folder)
    assert metrics["confusion_matrix"] == matrix.tolist()
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert metrics["mean_iou"] == pytest.approx(iou.mean())
    assert (metrics["pictures"], metrics["software"]) == (3, "fastseg")
    assert metrics["settings"]["mode"] == "whole"
    assert 0 < metrics["mean_boundary_f1"] < 1
    printed = capsys.readouterr()
    assert f"{100 * iou.mean():.2f} %" in printed.out
    assert "(images/ and masks/)" in printed.out
    assert "whole pictures; labels as they are, 255 ignored" in printed.out
    assert "pictures a second: reading" in printed.out
    assert printed.err == ""
    out = tmp_path / "out"
    assert tree(out) == {"metrics.json", "confusion.png", "worst-01.png", "worst-02.png"}
    with Image.open(out / "confusion.png") as image:
        assert image.mode == "RGB"
        assert image.width > 300
        assert len(image.getcolors(1 << 20)) > 20
    with Image.open(out / "worst-01.png") as image:
        assert image.width > 2 * 60
    # What an earlier run had more of goes, what is not fastseg's stays.
    (out / "worst-99.png").write_bytes(b"of someone else")
    assert evaluate(data, "--worst", 0)[0] == 0
    assert tree(out) == {"metrics.json", "confusion.png", "worst-99.png"}


def test_which_pictures(evaluate, data, model_folder, tmp_path):
    _, metrics = evaluate(data, "--limit", 2)
    first = sorted(NAMES)[:2]
    assert metrics["confusion_matrix"] == expected(data, model_folder, first).tolist()
    (tmp_path / "list.txt").write_text("rocket\n")
    _, metrics = evaluate(data, "--split-file", tmp_path / "list.txt")
    assert metrics["confusion_matrix"] == expected(data, model_folder, ["rocket"]).tolist()


@pytest.mark.parametrize("other", ["plain", "bfloat16", "model"])
def test_against(evaluate, data, tmp_path, capsys, other):
    named = str(save_model(tmp_path / "other", num_labels=6)) if other == "model" else other
    _, metrics = evaluate(data, "--against", named)
    against = metrics["against"]
    assert metrics["compared_with"] == named
    assert against["equal_labels"] > (0.9 if other == "bfloat16" else 0.999)
    assert against["settings"]["path"] == ("plain" if other == "plain" else "fast")
    assert against["settings"]["dtype"] == ("bfloat16" if other == "bfloat16" else "float32")
    difference = metrics["mean_iou"] - against["mean_iou"]
    assert against["difference_of_mean_iou"] == pytest.approx(difference)
    low, high = against["interval"]
    assert low <= high
    assert "equal labels in" in capsys.readouterr().out


def test_windows_and_views(evaluate, data, capsys):
    _, metrics = evaluate(data, "--slide", 40, 30, "--tta", "flip,0.75", "--limit", 1)
    assert metrics["settings"]["slide"] == [40, 30]
    assert metrics["settings"]["tta"] == ["flip", 0.75]
    assert "windows of 40 pixels, 30 apart, tta flip,0.75;" in capsys.readouterr().out


def test_numbers_of_masks(evaluate, data, model_folder, tmp_path, capsys):
    raised = tmp_path / "raised"
    for folder in ("images", "masks"):
        (raised / folder).mkdir(parents=True)
    photo("coffee").save(raised / "images" / "a.png")
    with Image.open(data / "masks" / "coffee.png") as mask:
        labels = np.asarray(mask)
    Image.fromarray(np.where(labels == 255, 0, labels + 1).astype(np.uint8)).save(
        raised / "masks" / "a.png"
    )
    assert evaluate(raised) == (1, None)
    said = capsys.readouterr().err
    assert "a.png: expected classes from 0 to 5, or 255 to be left out, got 6 in" in said
    assert "--reduce-labels on" in said
    _, metrics = evaluate(raised, "--reduce-labels", "on")
    assert metrics["confusion_matrix"] == expected(data, model_folder, ["coffee"]).tolist()
    assert "labels lowered by one" in capsys.readouterr().out
    Image.fromarray((labels % 2 * 255).astype(np.uint8)).save(raised / "masks" / "a.png")
    assert evaluate(raised) == (1, None)
    assert "the masks hold 0 and 255 alone" in capsys.readouterr().err
    _, metrics = evaluate(raised, "--map", "binary")
    assert [one["pixels"] > 0 for one in metrics["classes"]] == [True, True] + 4 * [False]


def test_classes_of_the_data_and_of_the_model(evaluate, data, capsys):
    names = data / "classes.txt"
    names.write_text("a\nb\nc\n")
    try:
        assert evaluate(data) == (1, None)
        assert "dataset: expected the 6 classes of the model" in capsys.readouterr().err
        names.write_text("LABEL_1\nLABEL_0\nLABEL_2\nLABEL_3\nLABEL_4\nLABEL_5\n")
        assert evaluate(data) == (1, None)
        assert "where class 0 is LABEL_0, got LABEL_1" in capsys.readouterr().err
    finally:
        names.unlink()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--tta", "flip,wide"], 2, "expected flip and scales above 0 with commas"),
        (["--slide", "16", "32"], 2, "--slide"),
        (["--ignore", "void"], 2, "expected an integer or none, got 'void'"),
        (["--reduce-labels", "maybe"], 2, "--reduce-labels"),
        (["--worst", "-1"], 2, "--worst"),
        (["--output", __file__], 2, "--output"),
        (["--split", "test"], 1, "no split 'test'; there are none"),
        (["--against", "nowhere/at-all/x"], 1, "--model nowhere/at-all/x"),
    ],
)
def test_wrong_usage(evaluate, data, capsys, arguments, status, message):
    assert evaluate(data, *arguments)[0] == status
    assert message in capsys.readouterr().err


def test_files_of_others_stay(evaluate, data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    assert evaluate(data)[0] == 2
    assert "metrics.json is not fastseg's: choose another --output" in capsys.readouterr().err
    assert (tmp_path / "out" / "metrics.json").read_text() == "{}"
    assert evaluate(tmp_path / "absent", "--output", tmp_path / "new")[0] == 1
    assert "absent: expected a folder of pictures and masks" in capsys.readouterr().err


def test_drawn_scenes_and_the_embedded_model(tmp_path, capsys):
    """The way of the README: scenes in a folder, and two ways of computing against each other."""
    scenes, out = tmp_path / "scenes", tmp_path / "evaluation"
    draw = ["demo", "--scenes", "1", "--seed", "6", "--output", str(scenes)]
    assert main(draw) == 0
    names = ("images/scene-0006.png", "masks/scene-0006.png")
    assert tree(scenes) == {"classes.txt", *names}
    scene = draw_scene(6)
    for name, pixels in zip(names, (scene.image, scene.labels), strict=True):
        with Image.open(scenes / name) as image:
            assert np.array_equal(np.asarray(image), pixels)
    assert (scenes / "classes.txt").read_text().split("\n")[:-1] == list(CLASSES)
    arguments = ["--output", str(out), "--device", "cpu", "--against", "plain", "--worst", "0"]
    assert main(["evaluate", str(scenes), *arguments]) == 0
    assert "using the embedded model" in capsys.readouterr().err
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["mean_iou"] > 0.7
    assert metrics["against"]["equal_labels"] > 0.9999
    # Files of others stay.
    (scenes / names[1]).write_bytes(b"of someone else")
    assert main(draw) == 1
    assert "scene-0006.png is not fastseg's" in capsys.readouterr().err
    (scenes / "classes.txt").write_text("of someone else")
    assert main(draw) == 1
    assert "classes.txt lists other classes" in capsys.readouterr().err
    assert main([*draw[:3], "--image", "a.png"]) == 2
    assert main([*draw[:3], "--seed", "-3", "--output", str(tmp_path / "x")]) == 2

"""Which classes results show, and how: `--classes`, `--palette`, `--map` and `--labels`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.cli import main
from fastseg.images.palettes import dataset, palette
from tests.cli.cli_cases import SIZE, photo, save_model, segmented

CITYSCAPES = dict(enumerate(dataset("cityscapes").names))
# As cityscapesScripts has them, of each train id.
LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Path:
    """A model of Cityscapes' classes."""
    folder = tmp_path_factory.mktemp("models") / "street"
    return save_model(folder, num_labels=19, id2label=CITYSCAPES)


@pytest.fixture
def run(tmp_path):
    photo("coffee").save(tmp_path / "a.png")

    def predict(model: Path, *options: object) -> int:
        where = ["--model", str(model), "--output", str(tmp_path / "out"), "--device", "cpu"]
        return main(["predict", str(tmp_path / "a.png"), *where, *map(str, options)])

    return predict


def read(tmp_path: Path) -> tuple[str, np.ndarray]:
    with Image.open(tmp_path / "out" / "a_labels.png") as image:
        return image.mode, np.asarray(image)


def described(tmp_path: Path) -> dict[int, tuple[str, int]]:
    content = json.loads((tmp_path / "out" / "a.json").read_text())
    return {item["id"]: (item["name"], item["pixels"]) for item in content["classes"]}


def two_classes(labels: np.ndarray) -> list[int]:
    """Not the largest, which is to be left out."""
    return np.argsort(np.bincount(labels.ravel(), minlength=19))[-3:-1].tolist()


def test_chosen_classes(run, street, tmp_path):
    labels = segmented(street, photo("coffee"))
    first, second = two_classes(labels)
    chosen = f"{CITYSCAPES[first].upper()},{second}"  # a name and a number
    assert run(street, "--classes", chosen, "--json", "--alpha", 1, "--overlay", "png") == 0
    expected = np.where((labels == first) | (labels == second), labels, 255)
    mode, written = read(tmp_path)
    assert mode == "P"
    np.testing.assert_array_equal(written, expected)
    names = {**CITYSCAPES, 255: "unlabeled"}
    assert described(tmp_path) == {
        int(number): (names[number], int((expected == number).sum()))
        for number in np.unique(expected)
    }
    with Image.open(tmp_path / "out" / "a_overlay.png") as overlay:
        shown = np.asarray(overlay)[: SIZE[1], : SIZE[0]].astype(int)
    picture = np.asarray(photo("coffee")).astype(int)
    left_out = expected == 255
    same = (shown == picture).all(axis=2)
    assert same[left_out].mean() > 0.8  # but for borders
    coloured = (shown == dataset("cityscapes").colours[labels]).all(axis=2)
    assert coloured[~left_out].mean() > 0.3


@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [("traffic_light", {6}), ("Traffic  Light, 3", {3, 6}), ("7,7,traffic sign", {7})],
)
def test_ways_to_name_classes(run, street, tmp_path, chosen, numbers):
    assert run(street, "--classes", chosen, "--no-overlay") == 0
    labels = segmented(street, photo("coffee"))
    expected = np.where(np.isin(labels, list(numbers)), labels, 255)
    np.testing.assert_array_equal(read(tmp_path)[1], expected)


def test_names_with_synonyms(run, tmp_path):
    names = {0: "building, edifice", 1: "door, double door", 2: "c", 3: "d", 4: "e", 5: "1"}
    folder = save_model(tmp_path / "model", id2label=names)
    labels = segmented(folder, photo("coffee"))
    for chosen, numbers in (
        ("building, edifice", [0]),
        ("door,c", [1, 2]),
        ("1", [5]),
        ("0", [0]),
    ):
        assert run(folder, "--classes", chosen, "--no-overlay") == 0
        expected = np.where(np.isin(labels, numbers), labels, 255)
        np.testing.assert_array_equal(read(tmp_path)[1], expected)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("road,raod", "no class 'raod'; the nearest: road"),
        ("trafic lite", "no class 'trafic lite'; the nearest: traffic light"),
        ("19", "no class '19'; it has road (0), sidewalk (1)"),
        ("zzz", "and 11 more"),
        ("road,", "no class ''"),
    ],
)
def test_unknown_classes(run, street, tmp_path, capsys, chosen, message):
    assert run(street, "--classes", chosen) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("num_labels", "mode", "ignored"), [(255, "P", 255), (256, "I;16", 65535)])
def test_left_out_of_many_classes(run, tmp_path, num_labels, mode, ignored):
    """A number that is no class."""
    folder = save_model(tmp_path / "model", num_labels=num_labels)
    labels = segmented(folder, photo("coffee"))
    number = int(np.bincount(labels.ravel()).argmax())
    assert run(folder, "--classes", number) == 0
    assert read(tmp_path)[0] == mode
    np.testing.assert_array_equal(read(tmp_path)[1], np.where(labels == number, number, ignored))


@pytest.mark.parametrize("form", ["palette", "grey"])
def test_label_ids_of_cityscapes(run, street, tmp_path, form):
    labels = segmented(street, photo("coffee"))
    assert run(street, "--map", "labelIds", "--labels", form, "--json") == 0
    mode, written = read(tmp_path)
    assert mode == {"palette": "P", "grey": "L"}[form]
    np.testing.assert_array_equal(written, LABEL_IDS[labels])
    assert described(tmp_path) == {
        int(LABEL_IDS[number]): (CITYSCAPES[number], int((labels == number).sum()))
        for number in np.unique(labels).tolist()
    }
    if form == "palette":
        with Image.open(tmp_path / "out" / "a_labels.png") as image:
            colours = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(colours, dataset("cityscapes").colours[labels])
    first, second = two_classes(labels)
    assert run(street, "--map", "labelIds", "--classes", f"{first},{second}", "--json") == 0
    chosen = np.isin(labels, [first, second])
    np.testing.assert_array_equal(read(tmp_path)[1], np.where(chosen, LABEL_IDS[labels], 0))
    assert described(tmp_path)[0] == ("unlabeled", int((~chosen).sum()))


def test_label_ids_of_another_order_and_without_names(run, tmp_path):
    reverse = {18 - number: name for number, name in CITYSCAPES.items()}
    backward = save_model(tmp_path / "backward", num_labels=19, id2label=reverse)
    assert run(backward, "--map", "labelIds", "--no-overlay") == 0
    labels = segmented(backward, photo("coffee"))
    np.testing.assert_array_equal(read(tmp_path)[1], LABEL_IDS[::-1][labels])
    nameless = save_model(tmp_path / "nameless", num_labels=19)
    options = ["--palette", "cityscapes", "--map", "labelIds", "--json", "--classes", "sky,car"]
    assert run(nameless, *options) == 0
    labels = segmented(nameless, photo("coffee"))
    expected = np.where(np.isin(labels, [10, 13]), LABEL_IDS[labels], 0)
    np.testing.assert_array_equal(read(tmp_path)[1], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "labelIds"], "--map labelIds: expected the classes of Cityscapes"),
        (["--palette", "voc"], "--palette voc: expected a model of 21 classes, got one of 6"),
        (["--palette", "coco"], "--palette"),
        (["--map", "ids"], "--map"),
        (["--labels", "none"], "--labels"),
    ],
)
def test_options_that_do_not_fit_the_model(run, model_folder, tmp_path, capsys, options, message):
    assert run(model_folder, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "voc"])
def test_palettes_of_data_sets(run, tmp_path, name):
    """By the names of the model; by the option, which brings the names along; over its own."""
    data = dataset(name)
    count = len(data.names)
    own = {"palette": [[number, 0, 9] for number in range(count)]}
    models = {
        "named": ({"id2label": dict(enumerate(data.names))}, [], data.colours),
        "nameless": ({}, [], palette(count)),
        "told": ({}, ["--palette", name], data.colours),
        "own": (own, [], np.array(own["palette"])),
        "own and told": (own, ["--palette", name], data.colours),
    }
    for title, (fields, options, colours) in models.items():
        folder = save_model(tmp_path / title, num_labels=count, **fields)
        labels = segmented(folder, photo("coffee"))
        assert run(folder, *options, "--json", "--no-overlay") == 0
        np.testing.assert_array_equal(read(tmp_path)[1], labels)
        with Image.open(tmp_path / "out" / "a_labels.png") as image:
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), colours[labels])
        found = {number: found_name for number, (found_name, _) in described(tmp_path).items()}
        named = title == "named" or options
        assert found == {
            number: data.names[number] if named else f"LABEL_{number}" for number in found
        }


@pytest.mark.parametrize(("num_labels", "mode"), [(6, "L"), (300, "I;16")])
def test_grey_label_maps(run, tmp_path, num_labels, mode):
    folder = save_model(tmp_path / "model", num_labels=num_labels)
    for _ in range(2):  # the second replaces the first
        assert run(folder, "--labels", "grey") == 0
    labels = segmented(folder, photo("coffee"))
    assert read(tmp_path)[0] == mode
    np.testing.assert_array_equal(read(tmp_path)[1], labels)
    assert run(folder) == 0
    assert read(tmp_path)[0] == ("P" if mode == "L" else mode)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_model_of_one_class(run, tmp_path):
    """Its label maps hold 1 where the class is."""
    folder = save_model(tmp_path / "model", num_labels=1, id2label={0: "crack"})
    labels = segmented(folder, photo("coffee"))
    assert set(np.unique(labels)) == {0, 1}
    assert run(folder, "--json") == 0
    np.testing.assert_array_equal(read(tmp_path)[1], labels)
    crack = int((labels == 1).sum())
    expected = {1: ("crack", crack), 0: ("background", labels.size - crack)}
    assert described(tmp_path) == expected
    assert run(folder, "--classes", "crack", "--json") == 0
    np.testing.assert_array_equal(read(tmp_path)[1], np.where(labels == 1, 1, 255))

"""`fastseg predict` in process on tiny checkpoints: what it reads, and what it writes where."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.images.palettes import palette
from fastseg.inference.steps import Steps
from tests.cli.cli_cases import SIZE, photo, read_labels, save_model, segmented, tree


def test_folder(predict, photos, tmp_path, capsys):
    assert predict(photos) == 0
    assert tree(tmp_path / "out") == {
        "coffee_labels.png",
        "coffee_overlay.jpg",
        "below/astronaut_labels.png",
        "below/astronaut_overlay.jpg",
    }
    printed = capsys.readouterr()
    assert "2 of 2 images segmented" in printed.out
    assert "1 .txt" in printed.err


def test_label_map_and_overlay(predict, photos, tmp_path, model_folder):
    assert predict(photos / "coffee.jpg") == 0
    with Image.open(photos / "coffee.jpg") as image:
        expected = segmented(model_folder, image)
        labels = read_labels(tmp_path / "out" / "coffee_labels.png")
        np.testing.assert_array_equal(labels, expected)
        assert labels.shape == (image.height, image.width)
        assert len(np.unique(labels)) > 1
    with Image.open(tmp_path / "out" / "coffee_labels.png") as indexed:
        np.testing.assert_array_equal(np.asarray(indexed.convert("RGB")), palette(6)[labels])
    with Image.open(tmp_path / "out" / "coffee_overlay.jpg") as shown:
        assert shown.mode == "RGB"
        assert shown.width >= SIZE[0]
        assert shown.height > SIZE[1]


def test_json_agrees_with_the_label_map(predict, photos, tmp_path, model_folder):
    assert predict(photos / "coffee.jpg", "--json", "--no-overlay") == 0
    assert tree(tmp_path / "out") == {"coffee_labels.png", "coffee.json"}
    content = json.loads((tmp_path / "out" / "coffee.json").read_text())
    labels = read_labels(tmp_path / "out" / "coffee_labels.png")
    assert content["model"] == str(model_folder)
    assert content["image"] == str(photos / "coffee.jpg")
    assert (content["width"], content["height"]) == SIZE
    assert content["version"] == fastseg.__version__
    assert {item["id"]: item["pixels"] for item in content["classes"]} == {
        int(index): int((labels == index).sum()) for index in np.unique(labels)
    }
    for item in content["classes"]:
        assert item["share"] == item["pixels"] / labels.size
        assert item["name"] == f"LABEL_{item['id']}"
    pixels = [item["pixels"] for item in content["classes"]]
    assert pixels == sorted(pixels, reverse=True)


def test_globs_and_several_paths(predict, photos, tmp_path):
    photo("chelsea").save(tmp_path / "chelsea.jpg")
    assert predict(photos / "**" / "*.png", photos / "*.jp*", tmp_path / "chelsea.jpg") == 0
    assert {name for name in tree(tmp_path / "out") if "labels" in name} == {
        "chelsea_labels.png",
        "photos/coffee_labels.png",
        "photos/below/astronaut_labels.png",
    }


def test_a_picture_reached_twice_is_segmented_once(predict, photos, capsys):
    assert predict(photos, photos / "coffee.jpg", photos / "below") == 0
    assert "2 of 2 images" in capsys.readouterr().out


def test_unreadable_pictures_are_reported_and_the_others_go_on(predict, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no jpeg at all")
    whole = (photos / "below" / "astronaut.png").read_bytes()
    (photos / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((4, 4), 255.5, np.float32)).save(photos / "float.tif")
    assert predict(photos, photos / "notes.txt", "--batch-size", 2) == 1
    printed = capsys.readouterr()
    assert "2 of 6 images segmented" in printed.out
    for name in ("broken.jpg", "cut.png", "float.tif", "notes.txt"):
        line = next(line for line in printed.err.splitlines() if f"{photos / name}: " in line)
        assert len(line.split(": ", 1)[1]) > 10  # a reason
    assert "truncated" in printed.err
    assert {name for name in tree(tmp_path / "out") if "labels" in name} == {
        "coffee_labels.png",
        "below/astronaut_labels.png",
    }


def test_a_picture_that_fails_in_a_batch_is_reported_and_the_others_go_on(
    predict, tmp_path, capsys, monkeypatch
):
    label_maps = Steps.label_maps

    def fail_on_few_rows(self, inputs):
        if any(one.size[0] == 20 for one in inputs):
            raise ValueError("pixel_values: expected more rows")
        return label_maps(self, inputs)

    monkeypatch.setattr(Steps, "label_maps", fail_on_few_rows)
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in (("a", (90, 80)), ("flat", (300, 20)), ("z", (70, 70))):
        photo("coffee", size).save(folder / f"{name}.png")
    assert predict(folder, "--slide", 64, 32, "--batch-size", 3, "--no-overlay") == 1
    printed = capsys.readouterr()
    assert "2 of 3 images segmented" in printed.out
    assert f"{folder / 'flat.png'}: pixel_values: expected" in printed.err
    assert tree(tmp_path / "out") == {"a_labels.png", "z_labels.png"}


def test_a_picture_narrower_than_the_model_takes_is_padded(predict, tmp_path):
    photo("coffee", (300, 20)).save(tmp_path / "strip.png")
    assert predict(tmp_path / "strip.png", "--slide", 64, 64, "--no-overlay") == 0
    assert read_labels(tmp_path / "out" / "strip_labels.png").shape == (20, 300)


def test_12_bits_in_16_are_told(predict, tmp_path, capsys):
    values = np.linspace(0, 4095, 60 * 80).reshape(60, 80).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "camera.tif")
    assert predict(tmp_path / "camera.tif", "--no-overlay") == 0
    assert f"{tmp_path / 'camera.tif'}: 16-bit pixels of at most 4095" in capsys.readouterr().err


def test_a_path_that_is_not_there_is_reported_and_the_others_go_on(predict, photos, capsys):
    assert predict(photos, photos / "nowhere.jpg", photos / "*.webp") == 1
    printed = capsys.readouterr()
    assert "nowhere.jpg: no such file" in printed.err
    assert "*.webp: no such file" in printed.err
    assert "2 of 2 images segmented" in printed.out


@pytest.mark.parametrize("kind", ["missing", "empty folder", "glob"])
def test_nothing_found_is_an_error(predict, tmp_path, capsys, kind):
    (tmp_path / "empty").mkdir()
    path = {"missing": "nowhere", "empty folder": "empty", "glob": "*.jpg"}[kind]
    assert predict(tmp_path / path) == 1
    assert "error: no images to segment" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_same_names_do_not_collide(predict, tmp_path):
    names = ["coffee", "astronaut", "chelsea", "rocket", "coffee"]
    places = ["one/a.jpg", "one/a.png", "one/a.jpg.png", "two/a.jpg", "two/A_.png"]
    for name, place in zip(names, places, strict=True):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        photo(name).save(tmp_path / place)
    assert predict(tmp_path / "one", tmp_path / "two", "--json", "--no-overlay") == 0
    out = tmp_path / "out"
    assert {name for name in tree(out) if name.endswith(".json")} == {
        "one/a.jpg.json",
        "one/a.jpg-2.json",  # of a.jpg.png
        "one/a.png.json",
        "two/a.json",
        "two/A_.json",
    }
    for found in out.rglob("*.json"):  # each goes with its own label map
        content = json.loads(found.read_text())
        labels = read_labels(found.with_name(found.stem + "_labels.png"))
        assert Path(content["image"]).name.startswith(found.stem.removesuffix("-2"))
        assert content["classes"][0]["pixels"] == np.bincount(labels.ravel()).max()


@pytest.mark.parametrize("through_link", [False, True])
def test_outputs_beside_the_inputs_never_replace_anything(predict, photos, tmp_path, through_link):
    """Files of the user stand where the outputs would go."""
    photo("rocket").save(photos / "coffee_labels.png")
    (photos / "coffee.json").write_text('{"shapes": []}')
    (photos / "below" / "astronaut_overlay.jpg").symlink_to(photos / "coffee.jpg")
    before = {name: (photos / name).read_bytes() for name in tree(photos)}
    output = photos
    if through_link:
        output = tmp_path / "link"
        output.symlink_to(photos, target_is_directory=True)
    for _ in range(2):  # the second run replaces the outputs of the first
        assert predict(photos, "--json", output=output) == 0
        assert {name: (photos / name).read_bytes() for name in before} == before
        outputs = tree(photos) - set(before)
        assert outputs == {
            f"{stem}{ending}"
            for stem in (
                "coffee-2",
                "coffee_labels",
                "below/astronaut-2",
                "below/astronaut_overlay",
            )
            for ending in ("_labels.png", "_overlay.jpg", ".json")
        }


def test_a_second_run_leaves_outputs_inside_the_inputs_out(predict, photos, capsys):
    output = photos / "results"
    assert predict(photos, output=output) == 0
    first = {name: (output / name).read_bytes() for name in tree(output)}
    assert predict(photos, output=output) == 0
    assert {name: (output / name).read_bytes() for name in tree(output)} == first
    # Elsewhere, too, and named one by one, outputs of earlier runs are no inputs.
    capsys.readouterr()
    assert predict(*output.glob("coffee_*")) == 1
    printed = capsys.readouterr().err
    assert "2 outputs of earlier runs left out" in printed
    assert "no images to segment" in printed


def test_an_output_folder_inside_the_inputs_is_not_searched(predict, photos, capsys):
    """Even where another program has rewritten the outputs, without fastseg's mark."""
    output = photos / "results"
    assert predict(photos, output=output) == 0
    for path in output.rglob("*.png"):
        with Image.open(path) as image:
            image.convert("RGB").save(path)
    before = {name: (output / name).read_bytes() for name in tree(output)}
    capsys.readouterr()
    assert predict(photos, output=output) == 0
    assert "2 of 2 images" in capsys.readouterr().out
    assert {name: (output / name).read_bytes() for name in before} == before


def test_a_failed_write_leaves_nothing_behind(predict, photos, tmp_path, monkeypatch, capsys):
    def fail(self, file, **options):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    assert predict(photos) == 1
    assert tree(tmp_path / "out") == set()
    expected = f"{photos / 'coffee.jpg'}: cannot write to {tmp_path / 'out'}: no space left"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_modes(predict, tmp_path, model_folder, mode):
    picture = photo("coffee")
    if mode == "I;16":
        grey = np.asarray(picture.convert("L"))
        shown = Image.fromarray(grey).convert("RGB")
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
        if mode == "RGBA":
            picture.putalpha(photo("rocket").convert("L"))
        shown = picture.convert("RGB")
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    picture.save(path)
    assert predict(path, "--alpha", 0, "--overlay", "png") == 0
    labels = read_labels(tmp_path / "out" / "picture_labels.png")
    np.testing.assert_array_equal(labels, segmented(model_folder, shown))
    with Image.open(tmp_path / "out" / "picture_overlay.png") as overlay:
        visible = np.asarray(overlay)[: SIZE[1], : SIZE[0]]
    np.testing.assert_array_equal(visible, np.asarray(shown))


def test_exif_orientation_is_applied(predict, tmp_path, model_folder):
    picture = photo("coffee")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned by 90 degrees clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    assert predict(tmp_path / "turned.png", "--json") == 0
    labels = read_labels(tmp_path / "out" / "turned_labels.png")
    upright = Image.fromarray(np.rot90(np.asarray(picture), k=-1))
    np.testing.assert_array_equal(labels, segmented(model_folder, upright))
    content = json.loads((tmp_path / "out" / "turned.json").read_text())
    assert (content["width"], content["height"]) == SIZE[::-1]


def test_batches_of_different_sizes(predict, tmp_path):
    folder = tmp_path / "sizes"
    folder.mkdir()
    for index, size in enumerate([(60, 48), (31, 77), (1, 1), (120, 90), (60, 48)]):
        photo(("coffee", "astronaut")[index % 2], size).save(folder / f"{index}.png")
    for batch_size in (1, 3):
        output = tmp_path / f"by {batch_size}"
        assert predict(folder, "--batch-size", batch_size, output=output) == 0
    for index in range(5):
        one, three = (
            read_labels(tmp_path / f"by {size}" / f"{index}_labels.png") for size in (1, 3)
        )
        with Image.open(folder / f"{index}.png") as image:
            assert one.shape == three.shape == (image.height, image.width)
        assert (one == three).mean() > 0.99  # sums of another order decide ties


def test_sliding_windows(predict, photos, tmp_path, model_folder):
    assert predict(photos / "coffee.jpg", "--slide", 32, 16) == 0
    labels = read_labels(tmp_path / "out" / "coffee_labels.png")
    with Image.open(photos / "coffee.jpg") as image:
        np.testing.assert_array_equal(labels, segmented(model_folder, image, slide=(32, 16)))
        assert not np.array_equal(labels, segmented(model_folder, image))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(predict, photos, tmp_path, dtype):
    for name in ("float32", dtype):
        run = predict(photos / "coffee.jpg", "--dtype", name, output=tmp_path / name)
        assert run == 0
    full, half = (read_labels(tmp_path / name / "coffee_labels.png") for name in ("float32", dtype))
    assert (full == half).mean() > 0.8


def test_more_than_256_classes(photos, tmp_path):
    folder = save_model(tmp_path / "model", num_labels=300)
    out = tmp_path / "out"
    assert main(["predict", str(photos), "--model", str(folder), "--output", str(out)]) == 0
    with Image.open(out / "coffee_labels.png") as image, Image.open(photos / "coffee.jpg") as given:
        assert image.mode == "I;16"
        labels = np.asarray(image)
        np.testing.assert_array_equal(labels, segmented(folder, given))
    assert labels.max() > 255


def test_palette_of_the_configuration(photos, tmp_path):
    colours = [[10 * index, 0, 255 - index] for index in range(6)]
    folder = save_model(tmp_path / "model", palette=colours)
    out = tmp_path / "out"
    assert main(["predict", str(photos), "--model", str(folder), "--output", str(out)]) == 0
    labels = read_labels(out / "coffee_labels.png")
    with Image.open(out / "coffee_labels.png") as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.array(colours)[labels])

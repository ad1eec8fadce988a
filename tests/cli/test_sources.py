"""Whose results stand in an output folder: those of another picture are never replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastseg.cli import demo, main, options
from tests.cli.cli_cases import SIZE, photo, read_labels, segmented, tree

CAMERAS = {"left": "coffee", "right": "astronaut", "top": "chelsea"}


@pytest.fixture
def cameras(tmp_path) -> Path:
    """A folder of each camera, and in each a frame.png."""
    for camera, name in CAMERAS.items():
        (tmp_path / camera).mkdir()
        photo(name).save(tmp_path / camera / "frame.png")
    return tmp_path


@pytest.mark.parametrize("options_given", [["--no-overlay"], ["--json"]])
def test_runs_into_one_folder_keep_all_results(
    predict, cameras, model_folder, capsys, monkeypatch, options_given
):
    stems = {"left": "frame", "right": "frame-2", "top": "frame-3"}
    endings = ["_labels.png", ".json" if "--json" in options_given else None]
    endings += [None if "--no-overlay" in options_given else "_overlay.jpg"]
    for turn in range(2):  # in the second each replaces its own
        for camera, stem in stems.items():
            path = cameras / camera / "frame.png"
            if turn:
                photo("rocket", SIZE[::-1]).save(path)
                monkeypatch.chdir(cameras)
                path = Path(camera) / "frame.png"  # another name of the same picture
            assert predict(path, *options_given) == 0
            said = capsys.readouterr().err
            assert (f"{stem}_labels.png: the name is taken" in said) == (stem != "frame")
            with Image.open(path) as image:
                expected = segmented(model_folder, image)
            labels = read_labels(cameras / "out" / f"{stem}_labels.png")
            np.testing.assert_array_equal(labels, expected)
            if "--json" in options_given:
                content = json.loads((cameras / "out" / f"{stem}.json").read_text())
                assert content["image"] == str(cameras / camera / "frame.png")
    assert tree(cameras / "out") == {
        f"{stem}{ending}" for stem in stems.values() for ending in endings if ending
    }


def test_results_of_an_older_version_are_kept(predict, cameras, capsys):
    """They do not say of which picture they are."""
    out = cameras / "out"
    out.mkdir()
    older = PngInfo()
    older.add_text("Software", "fastseg 0.1.0")
    for ending in ("labels", "overlay"):
        photo("rocket").save(out / f"frame_{ending}.png", pnginfo=older)
    (out / "frame.json").write_text('{"software": "fastseg", "version": "0.1.0"}')
    before = {name: (out / name).read_bytes() for name in tree(out)}
    for _ in range(2):
        assert predict(cameras / "left", "--json") == 0
        assert "a file that is not known to be an earlier result" in capsys.readouterr().err
        assert {name: (out / name).read_bytes() for name in before} == before
        assert tree(out) - set(before) == {
            "frame-2_labels.png",
            "frame-2_overlay.jpg",
            "frame-2.json",
        }
    assert predict(out) == 1  # and they are still no inputs
    assert "4 outputs of earlier runs left out" in capsys.readouterr().err


def test_several_that_get_a_number_are_told_in_one_line(predict, cameras, capsys):
    for number in range(3):
        photo("rocket").save(cameras / "left" / f"{number}.png")
        photo("rocket").save(cameras / "right" / f"{number}.png")
    assert predict(cameras / "left") == 0
    assert "taken" not in capsys.readouterr().err
    assert predict(cameras / "right") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "taken" in line]
    assert len(lines) == 1
    first = cameras / "right" / "0.png"
    expected = f"note: {first} goes to {cameras / 'out' / '0-2_labels.png'}, and 3 more "
    assert lines[0].startswith(expected)


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, '{"software": 3}', "\xff"])
def test_any_json_file_of_others_is_left(predict, cameras, content):
    out = cameras / "out"
    out.mkdir()
    (out / "frame.json").write_text(content, encoding="latin-1")
    assert predict(cameras / "left", "--json", "--no-overlay") == 0
    assert (out / "frame.json").read_text(encoding="latin-1") == content
    assert tree(out) == {"frame.json", "frame-2.json", "frame-2_labels.png"}


@pytest.mark.skipif(os.name != "posix", reason="names that are any bytes")
def test_a_name_that_is_not_utf_8(predict, tmp_path, capsys):
    """In JSON and in what is printed its odd bytes are replaced; files have the name itself."""
    folder = tmp_path / os.fsdecode(b"in\xe9")
    folder.mkdir()
    for name in (b"a.png", b"caf\xe9.png", b"caf\xea.png", b"z.png"):
        photo("coffee").save(folder / os.fsdecode(name))
    (folder / os.fsdecode(b"no\xe9.png")).write_bytes(b"no picture")
    out = tmp_path / os.fsdecode(b"out\xe9")
    for _ in range(2):
        assert predict(folder, "--json", "--no-overlay", output=out) == 1
        printed = capsys.readouterr()
        assert "4 of 5 images segmented, in " in printed.out
        assert "out\\udce9" in printed.out
        assert "no\\udce9.png: " in printed.err
        assert {os.fsencode(name) for name in tree(out)} == {
            stem + ending
            for stem in (b"a", b"caf\xe9", b"caf\xea", b"z")
            for ending in (b"_labels.png", b".json")
        }
    content = json.loads((out / os.fsdecode(b"caf\xe9.json")).read_text(encoding="utf-8"))
    assert (
        content["image"]
        == f"{tmp_path}/in\N{REPLACEMENT CHARACTER}/caf\N{REPLACEMENT CHARACTER}.png"
    )


def test_a_name_that_is_hardly_more_than_a_suffix_stays_in_the_folder(predict, tmp_path):
    photo("coffee").save(tmp_path / "..png", format="PNG")
    assert predict(tmp_path / "..png", "--no-overlay") == 0
    assert tree(tmp_path / "out") == {"..png_labels.png"}


@pytest.mark.every(3)
@pytest.mark.parametrize("source", [[], ["--seed", "7"], ["--image", "a.png"]])
def test_a_second_demo_replaces_the_first(model_folder, tmp_path, monkeypatch, capsys, source):
    monkeypatch.setattr(options, "EMBEDDED_MODEL", model_folder)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        photo("coffee").save("a.png")
        assert main(["demo", *source, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    # But for a picture of one's own, of which there are two.
    assert len(tree(tmp_path / "out")) == (4 if "--image" in source else 2)

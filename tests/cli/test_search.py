"""What is left out of files, folders and globs is counted or named, with its reason."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

import fastseg
from fastseg.cli.files import read_mark
from fastseg.cli.images import page_numbers, read_pages
from fastseg.images.formats import IMAGE_SUFFIXES, RAW_SUFFIXES, UNREADABLE
from tests.cli.cli_cases import photo, tree

ROOT = Path(fastseg.__file__).parents[1]


def test_formats_are_those_of_pillow():
    Image.init()
    readable = {s for s, name in Image.registered_extensions().items() if name in Image.OPEN}
    readable |= {".mpo", ".pnm", ".jpe"}  # by what is in them
    assert readable >= IMAGE_SUFFIXES
    assert not UNREADABLE.keys() & readable


@pytest.mark.parametrize("suffix", [".HEIC", ".heif", ".dng", ".CR2", ".cr3", ".jxl", ".exr"])
@pytest.mark.parametrize("given", ["folder", "glob", "itself"])
def test_formats_that_cannot_be_read(predict, tmp_path, capsys, suffix, given):
    folder = tmp_path / "in"
    folder.mkdir()
    photo("coffee").save(folder / "a.png")
    path = folder / f"IMG_0001{suffix}"
    path.write_bytes(bytes(64))
    paths = {"folder": [folder], "glob": [folder / "*"], "itself": [folder / "a.png", path]}[given]
    assert predict(*paths, "--no-overlay") == 1
    printed = capsys.readouterr()
    line = next(line for line in printed.err.splitlines() if suffix.lower() in line.lower())
    assert "cannot read" in line
    assert "convert to JPEG, PNG or TIFF first" in line
    assert "1 of 2 images segmented" in printed.out
    assert tree(tmp_path / "out") == {"a_labels.png"}


def test_nothing_but_formats_that_cannot_be_read(predict, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for name in ("a.heic", "b.HEIC", "c.dng", "d.svg", "e"):
        (tmp_path / "in" / name).write_bytes(bytes(64))
    assert predict(tmp_path / "in") == 1
    said = capsys.readouterr().err
    assert "1 .dng, 2 .heic: fastseg cannot read these formats" in said
    assert "files of other kinds left out: 1 .svg, 1 no suffix (a file that is named itself" in said
    assert "error: no images to segment that can be read" in said
    assert "no images there" not in said


def test_the_thumbnail_in_a_raw_file_is_not_taken_for_the_picture(predict, tmp_path, capsys):
    """To Pillow many raw files are TIFFs."""
    for suffix in sorted(RAW_SUFFIXES):
        photo("coffee", (16, 12)).save(tmp_path / f"raw{suffix}", format="TIFF")
    paths = sorted(tmp_path.glob("raw*"))
    assert predict(*paths) == 1
    printed = capsys.readouterr()
    assert f"0 of {len(paths)} images" in printed.out
    assert printed.err.count("a camera's raw file, which fastseg cannot read") == len(paths)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (bytes(64), "no image that Pillow knows"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF, which fastseg cannot read"),
        (b"\xff\x0a\x7f\x00" + bytes(64), "JPEG XL, which"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64), "JPEG XL, which"),
        (b"%PDF-1.7\n%", "PDF, which"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG, which"),
        (b'<?xml version="1.0"?><svg/>', "XML, maybe SVG, which"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page and not a picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "run `git lfs pull`"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    (page,) = read_pages(path)
    assert reason in page.reason
    assert page.image is None


def test_a_jpeg_under_another_name_is_read(predict, tmp_path):
    photo("coffee").save(tmp_path / "a.heic", format="JPEG")
    assert predict(tmp_path / "a.heic", "--no-overlay") == 0


def within(seconds: float, function):
    """What `function` returns; fails where it takes longer, in place of waiting for ever."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it waits for what never answers"
    return found[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
@pytest.mark.parametrize("given", ["folder", "glob", "itself"])
def test_what_never_answers_is_not_opened(predict, tmp_path, monkeypatch, capsys, given):
    folder = tmp_path / "in"
    folder.mkdir()
    photo("coffee").save(folder / "a.png")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe_labels.png")  # as an output of an earlier run
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        os.symlink("/dev/zero", folder / "zero.png")
        paths = {"folder": ["."], "glob": ["*"], "itself": sorted(os.listdir())}[given]
        assert within(60, lambda: predict(*paths, "--all-pages", "--no-overlay")) == 1
    printed = capsys.readouterr()
    assert "1 of 5 images segmented" in printed.out
    for name, kind in (
        ("pipe.png", "a named pipe"),
        ("pipe_labels.png", "a named pipe"),
        ("socket.png", "a socket"),
        ("zero.png", "a device"),
    ):
        assert f"{folder / name}: expected a file, found {kind}" in printed.err
    assert tree(tmp_path / "out") == {"a_labels.png"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_in_the_place_of_an_output_is_not_opened(predict, tmp_path):
    photo("coffee").save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "a.json")
    assert within(60, lambda: predict(tmp_path / "a.png", "--json", "--no-overlay")) == 0
    assert tree(tmp_path / "out") == {"a-2.json", "a-2_labels.png"}
    assert within(10, lambda: read_mark(tmp_path / "out" / "a.json")) is None
    assert within(10, lambda: page_numbers(tmp_path / "out" / "a.json")) == [1]


def find_without_permission(*arguments: object) -> dict:
    """What `ImageFiles` misses and finds in a process that does not stand above permissions."""
    code = (
        "import json, sys; from pathlib import Path; from fastseg.cli.search import ImageFiles\n"
        "found = [ImageFiles([a], Path('out')) for a in sys.argv[1:]]\n"
        "print(json.dumps([[[str(one.path) for one in f], f.missing] for f in found]))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv to be without its powers")
        lost = "-dac_override,-dac_read_search"
        command = ["setpriv", "--bounding-set", lost, "--inh-caps", "-all", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_folders_without_permission_are_named(tmp_path):
    folder = tmp_path / "in"
    for name in ("open", "closed", "unlisted"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(b"")
    closed, unlisted = folder / "closed", folder / "unlisted"
    closed.chmod(0o000)
    unlisted.chmod(0o100)
    by = [folder, closed, f"{closed}/", closed / "a.png", folder / "**" / "*.png"]
    by += [folder / "*" / "a.png", closed / "*.png", folder / "open" / "*.png"]
    by += [unlisted / "a.png"]
    try:
        found = find_without_permission(*by)
    finally:
        closed.chmod(0o700)
        unlisted.chmod(0o700)
    both = {str(closed), str(unlisted)}
    missing = [set(missing) for _, missing in found]
    one = {str(closed)}
    assert missing == [both, one, one, {str(closed / "a.png")}, both, both, one, set(), set()]
    assert all("ermission" in reason for _, missing in found for reason in missing.values())
    opened, hidden = [str(folder / "open" / "a.png")], [str(unlisted / "a.png")]
    paths = [sorted(paths) for paths, _ in found]
    assert paths[:5] == [opened, [], [], [], opened]
    assert paths[5:] == [opened + hidden, [], opened, hidden]


def test_a_folder_that_cannot_be_searched_makes_the_status_1(predict, photos, monkeypatch, capsys):
    scan = os.scandir

    def refuse(place="."):
        if str(place).endswith("below"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert predict(photos) == 1
    printed = capsys.readouterr()
    assert f"{photos / 'below'}: cannot search this folder: Permission denied" in printed.err
    assert "1 of 1 images segmented" in printed.out

"""One picture that fails, however it fails, is a reported row and never the end of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from fastseg.cli.options import first_line
from fastseg.cli.results import ResultWriter
from fastseg.images import pages
from fastseg.inference.steps import Steps
from tests.cli.cli_cases import photo, tree

BROKEN_SIZE = (33, 44)
ERRORS = [
    (ValueError("a bad value"), "a bad value"),
    (OSError(5, "Input/output error", "x"), "Input/output error"),
    (RuntimeError("CUDA error: out of memory\nmore"), "CUDA error: out of memory"),
    (MemoryError(), "MemoryError"),
    (MemoryError("Unable to allocate 9 GiB"), "MemoryError: Unable to allocate 9 GiB"),
    (UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates"), "'utf-8' codec can't encode"),
    (OverflowError("too large"), "OverflowError: too large"),
    (KeyError("palette"), "KeyError: 'palette'"),
    (SyntaxError("broken PNG file"), "broken PNG file"),
    (RecursionError("depth"), "depth"),
    (AssertionError(), "AssertionError"),
    (Image.DecompressionBombError("could be a bomb"), "DecompressionBombError: could be a bomb"),
]


@pytest.fixture
def three(tmp_path) -> Path:
    """A folder of three pictures, of which b.png is to fail."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, size in (("a", (60, 48)), ("b", BROKEN_SIZE), ("c", (60, 48))):
        photo("coffee", size).save(folder / f"{name}.png")
    return folder


def break_(monkeypatch, step: str, error: Exception) -> None:
    """`step` raises `error` where it meets the picture that is to fail."""
    if step == "reading":
        read = pages.upright

        def fail_reading(image, *options):
            if image.size == BROKEN_SIZE:
                raise error
            return read(image, *options)

        monkeypatch.setattr(pages, "upright", fail_reading)
    elif step == "segmenting":
        label_maps = Steps.label_maps

        def fail_segmenting(self, inputs):
            if any(one.size == BROKEN_SIZE[::-1] for one in inputs):
                raise error
            return label_maps(self, inputs)

        monkeypatch.setattr(Steps, "label_maps", fail_segmenting)
    else:
        write = ResultWriter.write

        def fail_writing(self, target, source, image, labels, *scores):
            if image.size == BROKEN_SIZE:
                raise error
            return write(self, target, source, image, labels, *scores)

        monkeypatch.setattr(ResultWriter, "write", fail_writing)


@pytest.mark.every(5)
@pytest.mark.parametrize(("error", "reason"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("step", ["reading", "segmenting", "writing"])
def test_an_error_of_any_kind(predict, three, tmp_path, monkeypatch, capsys, step, error, reason):
    break_(monkeypatch, step, error)
    assert predict(three, "--batch-size", 3, "--no-overlay") == 1
    printed = capsys.readouterr()
    told = f"cannot write to {tmp_path / 'out'}: {reason}" if step == "writing" else reason
    assert f"{three / 'b.png'}: {told}" in printed.err
    assert "2 of 3 images segmented" in printed.out
    assert tree(tmp_path / "out") == {"a_labels.png", "c_labels.png"}


@pytest.mark.parametrize("step", ["reading", "segmenting", "writing"])
def test_ctrl_c_ends_the_run(predict, three, monkeypatch, capsys, step):
    break_(monkeypatch, step, KeyboardInterrupt())
    assert predict(three) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_decompression_bomb(predict, three, tmp_path, monkeypatch, capsys):
    photo("coffee", (400, 300)).save(three / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 48)
    assert predict(three, "--no-overlay") == 1
    printed = capsys.readouterr()
    assert f"{three / 'bomb.png'}: DecompressionBombError: Image size (120000" in printed.err
    assert "3 of 4 images segmented" in printed.out


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_an_output_that_does_not_fit(predict, three, tmp_path, capsys):
    """The limit of a file's size stands for a full disk: nothing is left half written."""
    import resource

    photo("astronaut", (600, 600)).save(three / "large.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        status = predict(three, "--overlay", "png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    printed = capsys.readouterr()
    assert f"{three / 'large.png'}: cannot write to {tmp_path / 'out'}: File too" in printed.err
    whole = {f"{name}_{kind}.png" for name in "abc" for kind in ("labels", "overlay")}
    assert tree(tmp_path / "out") == {*whole, "large_labels.png"}


def test_a_name_too_long_for_its_outputs(predict, three, tmp_path, capsys):
    name = "x" * 250
    photo("coffee").save(three / f"{name}.png")
    assert predict(three, "--no-overlay") == 1
    assert (
        f"{name}.png: cannot write to {tmp_path / 'out'}: File name too" in capsys.readouterr().err
    )
    assert tree(tmp_path / "out") == {f"{name}_labels.png" for name in "abc"}


def test_an_output_folder_that_cannot_be_made(predict, three, tmp_path, monkeypatch, capsys):
    """Known before anything is segmented."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Steps, "label_maps", None)
    assert predict(three, output=tmp_path / "file" / "out") == 1
    said = capsys.readouterr().err
    assert f"error: --output {tmp_path / 'file' / 'out'}: Not a directory" in said


def test_an_output_folder_without_permission(predict, three, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert predict(three) == 1
    assert "no permission to write there" in capsys.readouterr().err
    assert tree(tmp_path / "out") == set()


@pytest.mark.parametrize(("error", "reason"), ERRORS)
def test_reasons_are_one_line(error, reason):
    assert first_line(error).startswith(reason)
    assert "\n" not in first_line(error)

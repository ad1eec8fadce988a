"""Options of `fastseg predict` on devices, limits and what is told."""

from __future__ import annotations

import argparse
import sys
import warnings

import pytest
import torch
from PIL import Image

from fastseg.cli import main, options
from tests.cli.cli_cases import SIZE, photo, tree


def test_devices_that_torch_has(monkeypatch):
    assert options.device("cpu") == torch.device("cpu")
    assert options.device("cpu:0") == torch.device("cpu:0")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert options.device("auto") == torch.device(here)
    tried = []

    def zeros(count, device):
        tried.append(device)
        return torch.ones(count)

    monkeypatch.setattr(options.torch, "zeros", zeros)  # of a torch with these devices
    for name in ("mps", "xpu:1"):
        assert options.device(name) == torch.device(name)
    assert tried == [torch.device("mps"), torch.device("xpu:1")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tpu", "Expected one of cpu, cuda"),
        ("", "'': "),
        ("cuda:99", "cuda:99: torch sees "),
        ("hpu", "hpu: torch cannot compute there: "),
        ("meta", "meta: torch cannot compute there: "),
    ],
)
def test_devices_that_torch_does_not_have(name, reason):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        options.device(name)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_other_devices_are_said_to_be_untested(monkeypatch, model_folder, capsys):
    """The device of no values stands for one that is not here."""
    options.load_model(str(model_folder), torch.device("meta"), None)
    assert "note: --device meta is untested with fastseg" in capsys.readouterr().err
    options.load_model(str(model_folder), torch.device("cpu"), None)
    assert capsys.readouterr().err == ""


def test_quiet_tells_of_failures_alone(predict, photos, tmp_path, monkeypatch, capsys):
    pages = [photo("coffee"), photo("rocket")]
    pages[0].save(photos / "two.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # a bar has a place
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "two_labels.png").write_bytes(b"of someone else")
    assert predict(photos, "--quiet") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert len(tree(tmp_path / "out")) == 7
    (photos / "cut.png").write_bytes(b"no picture")
    assert predict(photos, photos / "absent.png", "--quiet") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.replace("\r", "\n").splitlines() if line.strip()]
    assert [line.split(": ")[0] for line in lines] == [
        str(photos / "absent.png"),
        str(photos / "cut.png"),
    ]
    assert predict(photos) == 1  # and it is over after the run
    assert "left out" in capsys.readouterr().err


def test_quiet_without_a_model_of_ones_own(photos, tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["predict", str(photos / "coffee.jpg"), "--output", out, "--quiet"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert capsys.readouterr() == ("", "")


PIXELS = SIZE[0] * SIZE[1]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "webp"])
def test_pictures_above_the_limit_name_the_option(predict, tmp_path, monkeypatch, capsys, suffix):
    photo("coffee").save(tmp_path / f"a.{suffix}")
    photo("coffee", (30, 40)).save(tmp_path / "small.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", PIXELS // 2 - 1)
    given = [tmp_path / f"a.{suffix}", tmp_path / "small.png", "--no-overlay"]
    assert predict(*given) == 1
    printed = capsys.readouterr()
    expected = f"exceeds limit of {PIXELS - 2} pixels, could be decompression bomb DOS attack; "
    assert expected in printed.err
    assert f"`fastseg predict --max-pixels {PIXELS}` reads it" in printed.err
    assert "1 of 2 images" in printed.out
    assert predict(*given, "--max-pixels", PIXELS - 2) == 1
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # and its outputs are known for such
            assert predict(*given, "--max-pixels", PIXELS) == 0
    assert "taken" not in capsys.readouterr().err
    assert tree(tmp_path / "out") == {"a_labels.png", "small_labels.png"}
    assert Image.MAX_IMAGE_PIXELS == PIXELS // 2 - 1


def test_help_tells_all_options(capsys):
    assert main(["predict", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("--labels {palette,grey,zlib,rle}", "--map {labelIds}", "--classes NAMES"):
        assert option in shown
    for words in ("{ade20k,cityscapes,voc}", "--max-pixels N", "--quiet", "mps and xpu"):
        assert words in shown
    assert "A URL may take 120 seconds and 5 redirects; it and standard input may give 256" in shown

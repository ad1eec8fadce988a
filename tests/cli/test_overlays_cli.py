"""`fastseg predict --overlay`: formats, and whose files they are."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastseg.cli.files import Source, is_own, read_mark, write_jpeg
from tests.cli.cli_cases import photo, tree


@pytest.fixture
def coffee(tmp_path):
    photo("coffee", (160, 120)).save(tmp_path / "coffee.png")
    return tmp_path / "coffee.png"


def test_formats(coffee, predict, tmp_path):
    shown = {}
    for given, ending in (
        (["--overlay", "png"], "png"),
        (["--overlay", "jpg"], "jpg"),
        ([], "jpg"),
        (["--overlay", "none"], None),
        (["--no-overlay"], None),
    ):
        output = tmp_path / f"out{'-'.join(given)}"
        assert predict(coffee, *given, output=output) == 0
        overlay = {f"coffee_overlay.{ending}"} if ending else set()
        assert tree(output) == {"coffee_labels.png", *overlay}
        if ending:
            with Image.open(output / f"coffee_overlay.{ending}") as image:
                assert image.format == {"jpg": "JPEG", "png": "PNG"}[ending]
                shown[ending] = np.asarray(image).astype(float)
    noise = np.square(shown["jpg"] - shown["png"]).mean()
    assert 0 < noise < 255**2 / 10**3  # 30 dB


def test_a_second_run_replaces_its_own_jpeg_alone(coffee, predict, tmp_path, capsys):
    output = tmp_path / "out"
    for _ in range(2):
        assert predict(coffee) == 0
        assert tree(output) == {"coffee_labels.png", "coffee_overlay.jpg"}
    assert read_mark(output / "coffee_overlay.jpg") == Source(coffee).mark
    for comment in (None, b"made by hand", b"\xff=\xff", b"Software=GIMP"):
        options = {} if comment is None else {"comment": comment}
        photo("rocket").save(output / "coffee_overlay.jpg", **options)
        assert not is_own(output / "coffee_overlay.jpg")
        before = (output / "coffee_overlay.jpg").read_bytes()
        assert predict(coffee) == 0
        assert (output / "coffee_overlay.jpg").read_bytes() == before
        assert "coffee-2_labels.png: the name is taken" in capsys.readouterr().err


def test_an_overlay_too_long_for_a_jpeg(tmp_path):
    image = Image.new("RGB", (65501, 2))
    with pytest.raises(ValueError, match=r"65501x2 pixels, .* at most 65500 a side; --overlay png"):
        write_jpeg(tmp_path / "a.jpg", image, Source(tmp_path / "a.png"))
    write_jpeg(tmp_path / "b.jpg", image.crop((0, 0, 65500, 2)), Source(tmp_path / "a.png"))
    assert tree(tmp_path) == {"b.jpg"}

"""HEIF where pillow-heif is installed; what stands for it here registers an opener as it does."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageSequence

from tests.cli.cli_cases import photo, read_labels, segmented, tree

START = b"\0\0\0\x18ftypheic"


class HeifImageFile(ImageFile.ImageFile):
    """Frames of a TIFF behind the first bytes of HEIF; it opens at the primary one."""

    format = "HEIF"

    def _open(self) -> None:
        content = self.fp.read()[len(START) :]
        with Image.open(io.BytesIO(content[1:])) as file:
            self.frames = [frame.copy() for frame in ImageSequence.Iterator(file)]
        self.n_frames = len(self.frames)
        self._use(content[0])

    def _use(self, frame: int) -> None:
        self.frame, self.tile = frame, []
        self._size, self._mode = self.frames[frame].size, self.frames[frame].mode
        self._im = None

    def load(self):
        if self._im is None:
            self.load_prepare()
            self.frombytes(self.frames[self.frame].tobytes())
        return super().load()

    def tell(self) -> int:
        return self.frame

    def seek(self, frame: int) -> None:
        if frame != self.frame:
            self._use(frame)


def register_heif_opener() -> None:
    Image.register_open(HeifImageFile.format, HeifImageFile, lambda start: start[:12] == START)
    Image.register_extensions(HeifImageFile.format, [".heic", ".heif"])


@pytest.fixture
def pillow_heif(monkeypatch):
    """Installed, until the end of the test."""
    Image.init()  # what is registered later is undone
    for name in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, name, dict(getattr(Image, name)))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    module = ModuleType("pillow_heif")
    module.register_heif_opener = register_heif_opener  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)


def save(path: Path, *names: str, primary: int = 0) -> Path:
    frames = [photo(name) for name in names]
    content = io.BytesIO()
    frames[0].save(content, format="TIFF", save_all=True, append_images=frames[1:])
    path.write_bytes(START + bytes([primary]) + content.getvalue())
    return path


@pytest.mark.parametrize("given", ["folder", "glob", "itself"])
def test_with_pillow_heif(predict, pillow_heif, tmp_path, model_folder, given, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    path = save(folder / "IMG_1.HEIC", "coffee")
    (folder / "raw.dng").write_bytes(b"")
    where = {"folder": folder, "glob": folder / "*", "itself": path}[given]
    assert predict(where, "--no-overlay") == (0 if given == "itself" else 1)
    said = capsys.readouterr().err
    assert "HEI" not in said
    labels = read_labels(tmp_path / "out" / "IMG_1_labels.png")
    np.testing.assert_array_equal(labels, segmented(model_folder, photo("coffee")))


def test_the_primary_image_is_the_first(predict, pillow_heif, tmp_path, model_folder):
    path = save(tmp_path / "burst.heif", "coffee", "astronaut", primary=1)
    out = tmp_path / "out"
    assert predict(path, "--no-overlay") == 0
    assert predict(path, "--no-overlay", "--all-pages") == 0
    assert len(tree(out)) == 3
    for stem, name in (("burst", "astronaut"), ("burst-page0001", "coffee")):
        labels = read_labels(out / f"{stem}_labels.png")
        np.testing.assert_array_equal(labels, segmented(model_folder, photo(name)))


def test_what_pillow_heif_does_not_read(predict, pillow_heif, tmp_path, capsys):
    (tmp_path / "a.heic").write_bytes(START.replace(b"heic", b"mif1") + bytes(100))
    assert predict(tmp_path / "a.heic") == 1
    said = capsys.readouterr().err
    assert "a.heic: HEIF, which fastseg cannot read" in said
    assert "pip install" not in said


@pytest.mark.parametrize("given", ["folder", "itself"])
def test_without_it_the_package_is_named(predict, tmp_path, monkeypatch, given, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    folder = tmp_path / "in"
    folder.mkdir()
    path = save(folder / "IMG_1.heic", "coffee")
    assert predict(path if given == "itself" else folder) == 1
    said = capsys.readouterr().err
    assert "convert to JPEG, PNG or TIFF first, or for HEIF `pip install pillow-heif`" in said

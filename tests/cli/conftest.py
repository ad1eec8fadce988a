"""Fixtures of the command line: a tiny model, photographs, and `fastseg predict` on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastseg.cli import main
from tests.cli.cli_cases import make_photos, save_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def photos(tmp_path) -> Path:
    return make_photos(tmp_path / "photos")


@pytest.fixture
def predict(model_folder, tmp_path):
    """Runs `fastseg predict` with the tiny model and the folder `out`."""

    def run(*arguments, output: Path | None = None) -> int:
        where = ["--model", str(model_folder), "--output", str(output or tmp_path / "out")]
        return main(["predict", *map(str, arguments), *where, "--device", "cpu"])

    return run

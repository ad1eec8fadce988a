"""The examples that are no training: each is run on a drawn scene and the embedded model."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.cli.options import EMBEDDED_MODEL
from fastseg.demo.scenes import CLASSES, Scene, draw_scene

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def scene() -> Scene:
    return draw_scene(7, (512, 512))


def run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *given: object
) -> str:
    """What examples/`name` prints with the embedded model."""
    monkeypatch.setattr("sys.argv", [name, *map(str, given), "--model", str(EMBEDDED_MODEL)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.slow
def test_accelerate_transformers(scene, tmp_path, monkeypatch, capsys):
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    said = run("accelerate_transformers.py", monkeypatch, capsys, tmp_path / "scene.png")
    share = float(said.split("% of the labels")[0].split()[-1])
    assert share > 99.99
    assert "decode_head" in said  # the report


def test_segment_folder(scene, tmp_path, monkeypatch, capsys):
    photos, maps = tmp_path / "photos", tmp_path / "maps"
    photos.mkdir()
    Image.fromarray(scene.image).save(photos / "a.png")
    Image.fromarray(scene.image[:, ::-1]).save(photos / "b.png")
    said = run("segment_folder.py", monkeypatch, capsys, photos, "--output", maps)
    assert [line.split(":")[0] for line in said.splitlines()] == ["a.png", "b.png"]
    for name, truth in (("a", scene.labels), ("b", scene.labels[:, ::-1])):
        assert (np.array(Image.open(maps / f"{name}.png")) == truth).mean() > 0.9


def test_export_onnx(scene, tmp_path, monkeypatch, capsys):
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    given = (tmp_path / "scene.png", "--output", tmp_path / "model.onnx")
    run("export_onnx.py", monkeypatch, capsys, *given)
    labels = np.array(Image.open(tmp_path / "model.png"))
    assert labels.max() < len(CLASSES)
    assert (labels == scene.labels).mean() > 0.9


@pytest.mark.slow
def test_notebook():
    import nbclient
    import nbformat

    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # none is committed
    paths = [str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        nbclient.NotebookClient(notebook, timeout=300).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    right = float(code[2].outputs[0]["data"]["text/plain"].strip("np.float64()"))
    assert right > 0.9
    assert "image/png" in code[1].outputs[0]["data"]

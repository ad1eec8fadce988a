"""`fastseg evaluate --engine ray`: the same integers as one process counts."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from fastseg.cli import main
from tests.cli.cli_cases import save_seggpt
from tests.engines.conftest import actors, needs_ray

pytestmark = [pytest.mark.slow, needs_ray]
EXACT = ("confusion_matrix", "ignored_pixels", "pictures", "mean_iou", "classes", "settings")


@pytest.fixture
def data(tmp_path):
    """Pictures of two sizes with masks of classes and of what is ignored."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for index in range(30):
        size = (64 + 16 * (index % 2), 48)
        pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index:02d}.png")
        mask = rng.integers(0, 6, size[::-1], dtype=np.uint8)
        mask[: index % 5] = 255
        Image.fromarray(mask).save(root / "masks" / f"{index:02d}.png")
    return root


@pytest.fixture
def evaluate(tmp_path, data, model_folder):
    def run(name: str, *options: object, model: object = model_folder) -> dict:
        where = ["--model", model, "--output", tmp_path / name, "--device", "cpu"]
        assert main([str(word) for word in ("evaluate", data, *where, *options)]) == 0
        return json.loads((tmp_path / name / "metrics.json").read_text())

    return run


def test_the_same_integers(cluster, evaluate, capsys):
    expected = evaluate("plain", "--boundary")
    found = evaluate("ray", "--boundary", "--engine", "ray", "--num-actors", 2)
    assert {name: found[name] for name in EXACT} == {name: expected[name] for name in EXACT}
    assert found["mean_boundary_f1"] == expected["mean_boundary_f1"]
    assert np.sum(found["confusion_matrix"]) + found["ignored_pixels"] == 48 * (64 + 80) * 15
    assert "by 2 actors of 1 CPU" in capsys.readouterr().out


def test_an_actor_is_killed(cluster, evaluate):
    expected = evaluate("plain")
    killed: list[int] = []

    def kill() -> None:
        end = time.monotonic() + 100
        while time.monotonic() < end and len(found := actors("BlockCounter")) < 2:
            time.sleep(0.02)
        killed.extend(found[:1])
        os.kill(found[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    found = evaluate("ray", "--engine", "ray", "--num-actors", 2)
    thread.join()
    assert killed
    assert {name: found[name] for name in EXACT} == {name: expected[name] for name in EXACT}


def test_prompts(cluster, evaluate, data, tmp_path):
    for path in (data / "masks").iterdir():
        with Image.open(path) as image:
            mask = np.asarray(image).copy()
        mask[mask > 2] = 255
        Image.fromarray(mask).save(path)
    mask[mask > 2] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    prompt = ["--prompt", data / "images" / "00.png", tmp_path / "mask.png", "--limit", 6]
    folder = save_seggpt(tmp_path / "seggpt")
    Image.open(data / "images" / "00.png").resize(mask.shape[::-1]).save(tmp_path / "prompt.png")
    prompt[1] = tmp_path / "prompt.png"
    expected = evaluate("plain", *prompt, model=folder)
    found = evaluate("ray", *prompt, "--engine", "ray", "--num-actors", 2, model=folder)
    assert {name: found[name] for name in EXACT} == {name: expected[name] for name in EXACT}


def test_a_wrong_mask_is_named(cluster, data, model_folder, tmp_path, capsys):
    Image.fromarray(np.full((48, 80), 77, np.uint8)).save(data / "masks" / "17.png")
    where = ["--model", str(model_folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    command = ["evaluate", str(data), *where, "--engine", "ray", "--num-actors", "2"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "--engine ray: an actor failed: " in said
    assert "17.png" in said, said

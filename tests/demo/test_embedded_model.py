"""The model that ships with the package: small, loadable anywhere, and as accurate as it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

import fastseg
from fastseg.demo.scenes import CLASSES, draw_scene

ASSETS = Path(fastseg.__file__).parent / "demo" / "assets"
MODEL = ASSETS / "scenes-b0"
SEEDS = range(500, 512)  # neither trained on nor those of metrics.json


@pytest.fixture(scope="module")
def model() -> fastseg.SegformerForSemanticSegmentation:
    return fastseg.from_pretrained(MODEL, dtype=torch.float32)


def test_files() -> None:
    assert (MODEL / "model.safetensors").stat().st_size < 7.6e6
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds <= {"F16", "I64"}
    config = json.loads((MODEL / "config.json").read_text())
    assert [config["id2label"][str(i)] for i in range(len(CLASSES))] == list(CLASSES)


def test_metrics_are_of_held_out_seeds() -> None:
    metrics = json.loads((MODEL / "metrics.json").read_text())
    assert list(metrics["iou"]) == list(CLASSES)
    assert metrics["mean_iou"] == pytest.approx(np.mean(list(metrics["iou"].values())), abs=1e-3)
    assert metrics["mean_iou"] >= 0.85
    assert metrics["held_out_seeds"][1] < min(SEEDS)
    assert max(SEEDS) < metrics["train_seeds_from"]


@pytest.mark.slow
def test_mean_iou_on_unseen_scenes(model: fastseg.SegformerForSemanticSegmentation) -> None:
    hit, union = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
    for seed in SEEDS:
        scene = draw_scene(seed)
        found = fastseg.segment(model, scene.image)[0].numpy()
        for label in range(len(CLASSES)):
            predicted, true = found == label, scene.labels == label
            hit[label] += (predicted & true).sum()
            union[label] += (predicted | true).sum()
    assert (union > 0).all()
    iou = dict(zip(CLASSES, hit / union, strict=True))
    assert (hit / union).mean() > 0.85, iou


def test_transformers_sees_the_same(model: fastseg.SegformerForSemanticSegmentation) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(
        MODEL, dtype=torch.float32
    ).eval()
    processor = fastseg.SegformerImageProcessor.from_pretrained(MODEL)
    scene = draw_scene(SEEDS[0])
    pixels = processor(scene.image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 512, 512)
    with torch.no_grad():
        ours_logits, logits = model(pixels).logits, theirs(pixels).logits
    scale = logits.square().mean().sqrt()
    assert (ours_logits - logits).square().mean().sqrt() < 2e-6 * scale
    labels = F.interpolate(logits, (512, 512), mode="bilinear").argmax(1)[0].numpy()
    assert (labels == scene.labels).mean() > 0.9


def test_scene_picture() -> None:
    path = ASSETS / "scene.png"
    assert path.stat().st_size < 500_000
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        shipped = np.asarray(picture).astype(int)
    drawn = draw_scene(309).image  # held out; to a rounding of other versions of NumPy
    assert np.abs(shipped - drawn).mean() < 0.5

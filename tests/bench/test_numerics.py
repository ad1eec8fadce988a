"""`python -m bench numerics`: mIoU and errors of each precision, against float64 done by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.measure import numerics, run
from bench.measure.numerics import MODEL
from bench.rows import read_rows
from bench.setting import DTYPES, SkippedCase, load_transformers
from fastseg.demo.scenes import draw_scene

SIDE, IMAGES = 64, 2
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
EIGHT_BITS = "fastseg eager, 8-bit weights"


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    """For the exported files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def exact_logits(change):
    """Logits (K, H, W) of all scenes in float64, after a change of each linear layer's weight."""
    model = load_transformers(MODEL, torch.float64)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = torch.from_numpy(change(layer.weight.detach().numpy()))
    scenes = [draw_scene(seed, (SIDE, SIDE)).image for seed in range(IMAGES)]
    pixels = (np.stack(scenes) / 255 - MEAN) / DEVIATION
    with torch.no_grad():
        return model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).logits.numpy()


def eight_bits(weight):
    scale = np.abs(weight).max(axis=1, keepdims=True)
    return np.rint(weight * 127 / scale) * scale / 127


def label_maps(logits):
    """Bilinear between the centres of pixels, then the best class."""
    low = logits.shape[-1]
    places = ((np.arange(SIDE) + 0.5) * low / SIDE - 0.5).clip(0, low - 1)
    taps = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(low)))
    return (taps @ logits @ taps.T).argmax(axis=1)


def mean_iou(labels):
    truth = np.stack([draw_scene(seed, (SIDE, SIDE)).labels for seed in range(IMAGES)])
    pairs = [(truth == k, labels == k) for k in np.union1d(truth, labels)]
    return np.mean([(one & other).sum() / (one | other).sum() for one, other in pairs])


def test_rows_against_float64_by_hand(tmp_path, monkeypatch):
    for library in ("transformers", "onnxruntime", "openvino"):
        pytest.importorskip(library)
    monkeypatch.setattr(numerics, "SIZE", (SIDE, SIDE))
    given = ["--images", str(IMAGES), "--device", "cpu", "--threads", "1"]
    assert run.main([*given, "--output", str(tmp_path / "rows.jsonl")], "numerics") == 0
    found = {
        (row.dtype, row.provider, row.part): row.p50 for row in read_rows(tmp_path / "rows.jsonl")
    }
    exact, rounded = exact_logits(lambda weight: weight), exact_logits(eight_bits)
    labels = label_maps(exact)
    assert found["float64", "transformers eager", "mIoU"] == pytest.approx(mean_iou(labels))
    assert found["float64", "transformers eager", "error"] < 1e-12
    for dtype in ("float32", "bfloat16", "float16"):
        for provider in ("transformers eager", "fastseg eager", EIGHT_BITS):
            assert abs(found[dtype, provider, "mIoU"] - mean_iou(labels)) < 0.05
            assert found[dtype, provider, "differing"] < 0.05
    # Of the runtimes, in whatever the machine's default is.
    in_runtimes = {key[1]: key[0] for key in found if key[1] not in ("fastseg eager", EIGHT_BITS)}
    assert in_runtimes["fastseg ONNX Runtime"] == in_runtimes["fastseg OpenVINO fp32"] == "float32"
    assert in_runtimes["fastseg OpenVINO default"] in DTYPES
    assert found["float32", "fastseg OpenVINO fp32", "error"] < 2e-6
    # What weights of 8 bits change is much more than what float32 does.
    of_them = {part: found["float32", EIGHT_BITS, part] for part in ("error", "differing", "mIoU")}
    error = np.sqrt(((rounded - exact) ** 2).sum() / (exact**2).sum())
    assert of_them["error"] == pytest.approx(error, rel=1e-3)
    pixel = 1 / labels.size
    differing = (label_maps(rounded) != labels).mean()
    assert of_them["differing"] == pytest.approx(differing, abs=1.5 * pixel)
    assert of_them["mIoU"] == pytest.approx(mean_iou(label_maps(rounded)), abs=1e-3)


def test_weights_are_stored_as_bitsandbytes_stores_them(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    from tests.checkpoints.quantized_cases import load_quantized

    load_quantized(MODEL, load_in_8bit=True).save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    numerics.write_eight_bits(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "ours"))
    assert {name for name in theirs if not name.endswith("weight_format")} == ours.keys()
    scales = [name for name in ours if name.endswith("SCB")]
    assert len(scales) == 52
    for name in scales:
        assert torch.equal(ours[name], theirs[name])
        weight = f"{name.removesuffix('SCB')}weight"
        assert torch.equal(ours[weight], theirs[weight])


@pytest.mark.filterwarnings("ignore:.*was not checked")  # the file, in onnxruntime
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_that_is_not_installed_is_skipped_with_a_word(runtime, monkeypatch):
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(SkippedCase, match=rf"{runtime}: pip install"):
        numerics.in_runtime(runtime)


def test_figures_of_numerics(monkeypatch):
    monkeypatch.setattr(numerics, "SIZE", (4, 4))
    reference = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    reference[:, 0] = 2.0
    logits, names = reference.float().clone(), torch.zeros(1, 4, 4, dtype=torch.int64)
    logits[0, 1, 0, 0], names[0, 0, 1] = 4.0, 1
    exact = numerics.compare(reference.float(), torch.zeros_like(names), reference)
    one = numerics.compare(logits, names, reference)
    assert numerics.summary([exact]) == {"error": 0, "differing": 0, "shortfall": 0}
    # One of 16 logits, all 2, is wrong by 4; one of 16 pixels has the class whose logit is 0.
    assert numerics.summary([one]) == {"error": 0.5, "differing": 1 / 16, "shortfall": 1.0}
    assert numerics.summary([exact, one]) == {
        "error": pytest.approx(0.5**1.5),
        "differing": 1 / 32,
        "shortfall": 1.0,
    }

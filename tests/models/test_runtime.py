"""Models whose forward OpenVINO or ONNX Runtime computes."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import fastseg
from fastseg.exporting import cache
from fastseg.exporting.runtimes import RUNTIMES
from tests.cli.cli_cases import photo, save_model
from tests.model_cases import relative_error

EXPORTED = "fastseg-*.onnx"


@pytest.fixture
def folder(tmp_path):
    return save_model(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastseg"


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return request.param


def wide_logits(folder, pixels):
    with torch.no_grad(), fastseg.plain_path():
        return fastseg.from_pretrained(folder, dtype=torch.float64)(pixels.double()).logits


@pytest.mark.every(2)
def test_logits_of_any_size(folder, runtime):
    model = fastseg.from_pretrained(folder, runtime=runtime, dtype=torch.float32)
    for shape in ((1, 3, 64, 64), (2, 3, 75, 101), (1, 3, 64, 64)):
        pixels = torch.randn(shape)
        output = model(pixels.to(memory_format=torch.channels_last))
        assert relative_error(output.logits, wide_logits(folder, pixels)) <= 2e-6
        assert output[0] is output.logits
    assert (model.device.type, model.dtype, model.training) == ("cpu", torch.float32, False)
    assert model.config.to_dict() == fastseg.from_pretrained(folder).config.to_dict()
    version = __import__(runtime).__version__.partition("-")[0]
    assert f"folded, {runtime} {version} on the CPU in float32" in fastseg.report(model)


@pytest.mark.every(2)
def test_segment(folder, runtime):
    """Label maps, scores and windows, of a checkpoint and of the file that export writes."""
    model = fastseg.from_pretrained(folder)
    fastseg.export(model, folder.parent / "own.onnx")
    images = [photo("coffee"), photo("astronaut", (90, 70)), photo("cat")]
    for place in (folder, folder.parent / "own.onnx"):
        other = fastseg.from_pretrained(place, runtime=runtime, dtype=torch.float32)
        for options in ({}, {"slide": (48, 32)}, {"batch_size": 1}):
            expected, wanted = fastseg.segment(model, images, return_scores=True, **options)
            found, scores = fastseg.segment(other, images, return_scores=True, **options)
            for index in range(len(images)):
                assert len(found[index].unique()) > 2
                assert (found[index] == expected[index]).double().mean() > 0.999
                assert (scores[index] - wanted[index]).abs().max() < 2e-3
        assert other.config.id2label == model.config.id2label


def test_precision(folder):
    """It is what the runtime says, whatever was asked for."""
    pixels = torch.randn(1, 3, 64, 64)
    expected = wide_logits(folder, pixels)
    for dtype in (None, torch.bfloat16, "bfloat16"):
        model = fastseg.from_pretrained(folder, runtime="openvino", dtype=dtype)
        error = relative_error(model(pixels).logits, expected)
        assert error <= {"float32": 2e-6, "float16": 5e-3, "bfloat16": 3e-2}[model.precision]
        assert f"in {model.precision}" in fastseg.report(model)
    with pytest.raises(ValueError, match=r"dtype: expected None, torch.float32 with onnxruntime"):
        fastseg.from_pretrained(folder, runtime="onnxruntime", dtype=torch.bfloat16)


def test_threads(folder, runtime):
    model = fastseg.from_pretrained(folder, runtime=runtime, dtype=torch.float32)
    batches = [torch.randn(1, 3, 64, 64) for _ in range(12)]
    expected = [model(pixels).logits for pixels in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pixels: model(pixels).logits, batches))
    assert all(map(torch.equal, found, expected))


def test_written_once(folder, monkeypatch):
    fastseg.from_pretrained(folder, runtime="onnxruntime")
    (first,) = folder.glob(EXPORTED)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "export", None)  # not called
        fastseg.from_pretrained(folder, runtime="openvino")
        fastseg.from_pretrained(folder / "model.safetensors", runtime="onnxruntime")
    model = fastseg.from_pretrained(folder)
    with torch.no_grad():
        model.decode_head.classifier.bias += 1
    model.save_pretrained(folder)
    pixels = torch.randn(1, 3, 64, 64)
    other = fastseg.from_pretrained(folder, runtime="onnxruntime")
    assert relative_error(other(pixels).logits, wide_logits(folder, pixels)) <= 2e-6
    assert len({first, *folder.glob(EXPORTED)}) == 2
    model.config.block_norm_eps *= 2
    model.save_pretrained(folder)
    fastseg.from_pretrained(folder, runtime="onnxruntime")
    assert len(list(folder.glob(EXPORTED))) == 3


def test_folder_that_cannot_be_written(folder, user_folder, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))
    model = fastseg.from_pretrained(folder, runtime="onnxruntime")
    assert not list(folder.glob(EXPORTED))
    assert [model.path] == list(user_folder.glob(EXPORTED))


def test_weights_without_a_folder(folder, user_folder):
    model = fastseg.from_pretrained(folder)
    arguments = {"state_dict": model.state_dict(), "config": model.config}
    other = fastseg.from_pretrained(None, runtime="onnxruntime", **arguments)
    assert [other.path] == list(user_folder.glob(EXPORTED))


def test_left_over_of_a_process_that_was_killed(folder):
    """Neither read nor kept for good; one that may still be written is left alone."""
    model = fastseg.from_pretrained(folder)
    name = cache.exported(model, folder).name
    (folder / name).unlink()
    old, new = folder / f".{name[:-5]}.old.onnx", folder / f".{name[:-5]}.new.onnx"
    for path in (old, new):
        path.write_bytes(b"half of a file")
    os.utime(old, (time.time() - 7200,) * 2)
    pixels = torch.randn(1, 3, 64, 64)
    logits = fastseg.from_pretrained(folder, runtime="onnxruntime")(pixels).logits
    assert relative_error(logits, wide_logits(folder, pixels)) <= 2e-6
    assert new.exists()
    assert not old.exists()


_WRITE = """
import sys, fastseg
from fastseg.exporting import export
whole = export.compare
def compare(*arguments):  # the file is written, and not yet at its place
    print("written", flush=True)
    sys.stdin.read()
export.compare = compare
fastseg.from_pretrained(sys.argv[1], runtime="onnxruntime")
"""


@pytest.mark.slow
def test_survives_a_kill(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list(folder.glob(f".{EXPORTED}"))) == 1
    assert not list(folder.glob(EXPORTED))
    pixels = torch.randn(1, 3, 64, 64)
    logits = fastseg.from_pretrained(folder, runtime="onnxruntime")(pixels).logits
    assert relative_error(logits, wide_logits(folder, pixels)) <= 2e-6


@pytest.mark.every(2)
def test_file_of_one_size(folder, runtime):
    path = folder.parent / "fixed.onnx"
    fastseg.export(fastseg.from_pretrained(folder), path, batch=1, height=64, width=64)
    model = fastseg.from_pretrained(path, runtime=runtime)
    assert len(fastseg.segment(model, [photo("coffee"), photo("cat")], batch_size=1)) == 2
    expected = r"pixel_values: expected a tensor of shape \(1, 3, 64, 64\), as fixed.onnx was"
    with pytest.raises(ValueError, match=expected):
        model(torch.zeros(1, 3, 64, 96))


@pytest.mark.every(2)
def test_file_of_an_accelerated_model(runtime, tmp_path):
    """transformers' configuration goes with it; there is no image processor."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8, 16, 16, 16], num_attention_heads=[1] * 4, num_labels=3
    )
    plain = transformers.SegformerForSemanticSegmentation(config).eval()
    path = tmp_path / "model.onnx"
    fastseg.export(fastseg.accelerate(copy.deepcopy(plain)), path)
    model = fastseg.from_pretrained(path, runtime=runtime, dtype=torch.float32)
    pixels = torch.randn(1, 3, 64, 75)
    with torch.no_grad():
        expected = plain.double()(pixels.double()).logits
    assert relative_error(model(pixels).logits, expected) <= 2e-6
    assert model.config.num_labels == 3
    assert model.image_processor is None


def test_file_that_says_nothing_of_itself(folder, runtime):
    """As fastseg wrote them before, or of a model without a configuration."""
    import onnx

    path = folder.parent / "model.onnx"
    fastseg.export(fastseg.from_pretrained(folder), path)
    graph = onnx.load(path)
    del graph.metadata_props[:]
    onnx.save(graph, path)
    model = fastseg.from_pretrained(path, runtime=runtime)
    assert (model.config.num_labels, model.config.num_channels) == (6, 3)
    assert model.config.id2label[5] == "LABEL_5"
    labels = fastseg.segment(model, np.asarray(photo("coffee")))[0]
    assert labels.shape == (48, 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt"}, "runtime: expected 'onnxruntime' or 'openvino', got 'tensorrt'"),
        ({"device": "cuda"}, "device: expected the CPU with a runtime, got cuda"),
        ({"dtype": "quick"}, "dtype: expected None, torch.float32 with onnxruntime, got 'quick'"),
        ({"output_loading_info": True}, "output_loading_info: expected False with a runtime"),
    ],
)
def test_wrong_arguments(folder, options, message):
    with pytest.raises(ValueError, match=message):
        fastseg.from_pretrained(folder, **{"runtime": "onnxruntime", **options})


@pytest.mark.every(2)
def test_what_is_no_segmentation_model(folder, runtime, tmp_path):
    labels, broken = tmp_path / "labels.onnx", tmp_path / "broken.onnx"
    fastseg.export(fastseg.from_pretrained(folder), labels, labels=True)
    with pytest.raises(ValueError, match=r"expected pixel_values and logits.* and labels"):
        fastseg.from_pretrained(labels, runtime=runtime)
    broken.write_bytes(labels.read_bytes()[:999])
    with pytest.raises(ValueError, match=f"broken.onnx: {runtime} cannot open it: "):
        fastseg.from_pretrained(broken, runtime=runtime)
    with pytest.raises(TypeError, match="num_labels: a file of .onnx takes none of these"):
        fastseg.from_pretrained(labels, runtime=runtime, num_labels=3)
    encoder = fastseg.from_pretrained(folder).segformer
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="expected a model with logits of pixels, got a Segformer"):
        fastseg.from_pretrained(tmp_path / "encoder", runtime=runtime)
    with pytest.raises(fastseg.CheckpointError, match="runtime= of from_pretrained"):
        fastseg.from_pretrained(labels)


def test_not_installed(folder, runtime, monkeypatch):
    fastseg.from_pretrained(folder, runtime=runtime)
    monkeypatch.setitem(sys.modules, runtime, None)
    extra = {"onnxruntime": "export", "openvino": "openvino"}[runtime]
    with pytest.raises(ImportError, match=rf"needs {runtime}: .*fastseg-segformer\[{extra}\]"):
        fastseg.from_pretrained(folder, runtime=runtime)


def test_trains_nothing(folder):
    model = fastseg.from_pretrained(folder, runtime="onnxruntime")
    assert model.eval() is model
    with pytest.raises(ValueError, match="mode: expected False, as a runtime trains no model"):
        model.train()

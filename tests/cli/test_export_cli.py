"""`fastseg export`."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import pytest
import torch

import fastseg
from fastseg.cli import main
from fastseg.cli.options import EMBEDDED_MODEL
from tests.cli.cli_cases import save_seggpt, tree


def test_the_embedded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--labels", "--label-dtype", "uint8"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    first, *checks = printed.out.splitlines()
    path = tmp_path / "scenes-b0.onnx"
    assert first.startswith(
        f"scenes-b0.onnx: {path.stat().st_size / 1e6:.1f} MB, float32, opset 20, "
    )
    assert [line.startswith("checked against the model at ") for line in checks] == [True, True]
    model = fastseg.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
    pixels = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        logits = model(pixels).logits
    expected = torch.nn.functional.interpolate(logits, size=(96, 128), mode="bilinear").argmax(1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (labels,) = session.run(["labels"], {"pixel_values": pixels.numpy()})
    assert labels.dtype == np.uint8
    assert (labels == expected.numpy()).mean() > 0.999
    assert len(np.unique(labels)) > 1


def test_options_reach_the_file(model_folder, tmp_path, capsys):
    path = tmp_path / "out.onnx"
    arguments = ["export", str(model_folder), "--output", str(path), "--opset", "17"]
    sizes = ["--size", "64", "96", "--batch", "2", "--labels", "--label-size", "30", "40"]
    assert main([*arguments, *sizes, "--dtype", "float16"]) == 0
    assert "MB, float16, opset 17" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [2, 3, 64, 96]
    assert session.get_outputs()[0].shape == [2, 30, 40]
    assert session.get_outputs()[0].type == "tensor(int64)"


@pytest.mark.slow
def test_torch_export_named_after_the_model(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["export", str(model_folder), "--format", "torch-export"]
    assert main([*arguments, "--size", "64", "64", "--batch", "1"]) == 0
    assert "checked against the model at 1x3x64x64: relative error" in capsys.readouterr().out
    assert tree(tmp_path) == {"tiny.pt2"}
    model = fastseg.from_pretrained(model_folder)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels).logits
    found = torch.export.load("tiny.pt2").module()(pixels)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_seggpt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_seggpt(tmp_path / "seggpt")
    assert main(["export", "seggpt", "--opset", "18"]) == 0
    assert capsys.readouterr().out.count("checked against the model at ") == 2
    session = onnxruntime.InferenceSession("seggpt.onnx", providers=["CPUExecutionProvider"])
    assert len(session.get_inputs()) == 3
    assert session.get_outputs()[0].shape == ["batch", 3, 32, 16]
    assert main(["export", "seggpt", "--labels", "--force"]) == 2
    assert "labels: expected False" in capsys.readouterr().err


def test_a_file_that_exists_stays_unless_forced(model_folder, tmp_path, capsys):
    path = tmp_path / "out.onnx"
    path.write_text("mine")
    arguments = ["export", str(model_folder), "--output", str(path)]
    assert main(arguments) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main([*arguments, "--force"]) == 0
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--format", "tflite"], 2, "--format"),
        (["--label-size", "30", "40"], 2, "--label-size: expected --labels too"),
        (["--size", "8", "8"], 2, "height: expected an integer from"),
        (["--opset", "10"], 2, "opset: expected an integer from 11"),
        (["--batch", "0"], 2, "--batch"),
        (["--format", "torch-export", "--opset", "20"], 2, "opset: expected None"),
        (["--output", "missing/out.onnx"], 1, "there is no folder missing"),
    ],
)
def test_wrong_usage(model_folder, tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(model_folder), *arguments]) == status
    assert message in capsys.readouterr().err
    assert tree(tmp_path) == set()


def test_a_model_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "./nowhere"]) == 1
    assert "--model ./nowhere" in capsys.readouterr().err
    assert tree(tmp_path) == set()


def test_what_was_not_checked_is_told(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(model_folder), "--output", str(tmp_path / "out.onnx")]) == 0
    assert "NOT CHECKED against the model: onnxruntime is not installed" in capsys.readouterr().err


def test_without_onnx(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", str(model_folder)]) == 1
    assert 'pip install "fastseg-segformer[export]"' in capsys.readouterr().err
    assert tree(tmp_path) == set()

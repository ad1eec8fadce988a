"""The precision that a checkpoint loads in: as asked for, as stored, or float32 on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastseg
from fastseg.cli.options import EMBEDDED_MODEL, load_model
from fastseg.models.auto import from_pretrained
from tests.checkpoints.checkpoint_cases import SEGMENTATION, ours

HALVES = [torch.float16, torch.bfloat16]
CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")  # a device that every machine has


@pytest.fixture(params=HALVES, ids=str)
def half(request, tmp_path):
    """A checkpoint in half precision, and which."""
    ours(SEGMENTATION).to(request.param).save_pretrained(tmp_path)
    return tmp_path, request.param


def without_dtype(folder):
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    del fields["dtype"]
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("told", [True, False], ids=["by the config", "by the file"])
@pytest.mark.parametrize("arguments", [{}, {"device": "cpu"}, {"device": CPU}])
def test_half_precision_is_float32_on_a_cpu(arguments, told, half):
    folder, _ = half
    if not told:
        without_dtype(folder)
    stored = load_file(folder / "model.safetensors")
    loaded = from_pretrained(folder, **arguments)
    for name, tensor in loaded.state_dict().items():
        expected = stored[name].float() if tensor.is_floating_point() else stored[name]
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("told", [True, False], ids=["by the config", "by the file"])
def test_as_stored_elsewhere_and_by_auto(told, half):
    folder, dtype = half
    if not told:
        without_dtype(folder)
    assert from_pretrained(folder, device=ELSEWHERE).dtype == dtype
    with ELSEWHERE:
        assert from_pretrained(folder).dtype == dtype
    for auto in ({"dtype": "auto"}, {"torch_dtype": "auto"}):
        assert from_pretrained(folder, **auto).dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16, "float64"])
@pytest.mark.parametrize("device", [CPU, ELSEWHERE])
def test_dtype_argument(dtype, device, tmp_path):
    ours(SEGMENTATION).half().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    loaded = from_pretrained(tmp_path, dtype=dtype, device=device)
    expected_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, tensor in loaded.state_dict().items():
        expected = stored[name].to(expected_dtype) if tensor.is_floating_point() else stored[name]
        assert tensor.dtype == expected.dtype
        assert device == ELSEWHERE or torch.equal(tensor, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_stay(dtype, tmp_path):
    ours(SEGMENTATION).to(dtype).save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).dtype == dtype


def test_the_embedded_model_step_by_step():
    """As README has it: the processor gives float32."""
    model = fastseg.from_pretrained(EMBEDDED_MODEL)
    processor = fastseg.SegformerImageProcessor.from_pretrained(EMBEDDED_MODEL, size=64)
    with torch.no_grad():
        outputs = model(**processor(Image.new("RGB", (80, 60)), return_tensors="pt"))
    (labels,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[(60, 80)])
    assert labels.shape == (60, 80)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (CPU, None, torch.float32),
        (CPU, "float16", torch.float16),
        (ELSEWHERE, None, torch.float16),
        (ELSEWHERE, "float32", torch.float32),
    ],
)
def test_commands(device, dtype, expected):
    """`fastseg predict` and `fastseg demo` load by this."""
    assert load_model(None, device, dtype)[0].dtype == expected

"""Which implementation runs, and that it is told: without a GPU, in the ordinary process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastseg
from fastseg.kernels import fallbacks, layer_norm, select_backend
from fastseg.kernels.core import dispatch


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """As if kernels could run on a CPU, until one would be launched."""
    monkeypatch.setattr(dispatch, "_device_reason", lambda *device: None)
    monkeypatch.setattr(dispatch, "_fallbacks", {})  # not to be in reports of later tests


def test_a_cpu_runs_eagerly_and_says_why():
    name, reason = select_backend("cpu")
    assert name == "eager"
    assert "TRITON_INTERPRET" in reason


def test_devices_without_kernels():
    assert select_backend("mps") == ("eager", "there are no Triton kernels for mps")


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "eager"), ((8, 0), "triton")])
def test_compute_capability_decides(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert select_backend("cuda:0")[0] == name


def test_triton_where_it_cannot_run_is_an_error(monkeypatch):
    with fastseg.backend("triton"), pytest.raises(RuntimeError, match="on cpu kernels need a GPU"):
        layer_norm(torch.zeros(1, 4))
    monkeypatch.setenv("FASTSEG_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="'triton' was asked for"):
        layer_norm(torch.zeros(1, 4))
    with fastseg.backend("auto"):
        layer_norm(torch.zeros(1, 4))


def test_a_declined_call_is_counted_or_raises(kernels_everywhere):
    x = torch.zeros(2, 4, dtype=torch.float64)
    reason = "there are no kernels for torch.float64"
    before = fallbacks().get(("layer_norm", reason), 0)
    layer_norm(x)
    assert fallbacks()["layer_norm", reason] == before + 1
    with fastseg.backend("triton"), pytest.raises(RuntimeError, match=f"layer_norm: .*{reason}"):
        layer_norm(x)
    with fastseg.backend("eager"):
        layer_norm(x)
    assert fallbacks()["layer_norm", reason] == before + 1


@pytest.mark.parametrize(("width", "widths"), [(24, [8, 64, 160, 256]), (64, [32, 64, 160, 256])])
def test_the_report_tells_what_kernels_decline(kernels_everywhere, width, widths):
    config = fastseg.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=widths, decoder_hidden_size=width
    )
    model = fastseg.SegformerForSemanticSegmentation(config).eval()
    with torch.no_grad():
        encoder, head = fastseg.report(model).splitlines()[:2]
    declines = widths[0] == 8
    assert "folded, Triton kernels" in encoder
    assert ("sr_attention runs eagerly, 8 channels are no multiple of 32" in encoder) == declines
    assert ("mix_ffn runs eagerly, 8 to 32 channels" in encoder) == declines
    assert ("decode_head runs eagerly" in head) == declines
    with fastseg.backend("eager"), torch.no_grad():
        assert "decode_head: folded, eager: asked for by" in fastseg.report(model)


def test_gradients_and_autocast_are_declined(kernels_everywhere):
    x = torch.zeros(2, 4, requires_grad=True)
    assert layer_norm(x).requires_grad
    assert fallbacks()["layer_norm", "gradients are asked for"] >= 1
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer_norm(x)
    assert fallbacks()["layer_norm", "autocast is on"] >= 1


def test_the_ops_compile_whole_on_a_cpu():
    compiled = torch.compile(layer_norm, fullgraph=True, backend="eager")
    x = torch.randn(3, 8)
    assert torch.equal(compiled(x), torch.nn.functional.layer_norm(x, (8,)))


def test_without_triton_everything_imports_and_runs():
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, fastseg
from fastseg.kernels import select_backend
model = fastseg.from_preset("segformer_b0", num_classes=3).eval()
with torch.no_grad():
    print(tuple(model(torch.zeros(1, 3, 64, 64)).logits.shape))
print(select_backend("cpu"), select_backend("cuda"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    shape, backends = done.stdout.strip().split("\n")
    assert shape == "(1, 3, 16, 16)"
    assert backends.count("'eager', 'triton is not installed'") == 2


def test_blocks_that_overlap_leave_nothing_behind():
    """As two threads may open and close them."""
    first, second = fastseg.backend("eager"), fastseg.backend("triton")
    first.__enter__()
    second.__enter__()
    assert fastseg.kernels.requested_backend() == "triton"
    first.__exit__(None, None, None)
    assert fastseg.kernels.requested_backend() == "triton"
    second.__exit__(None, None, None)
    assert fastseg.kernels.requested_backend() == "auto"


def test_an_empty_batch_runs_eagerly_too():
    model = fastseg.from_preset("segformer_b0", num_classes=3).eval()
    layer = model.segformer.encoder.fastseg_state().plan().stages[0].layers[0]
    layer.settle(any_mode=False)
    with torch.no_grad():
        assert layer.run(torch.zeros(0, 64, 32), 8, 8, None).shape == (0, 64, 32)

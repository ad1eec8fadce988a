"""Rows with invented figures, and a tiny model: what tests of the benchmarks share."""

from __future__ import annotations

from typing import Any

import torch

import fastseg
from bench.measure import calls
from bench.rows import Row
from bench.setting import draw_pixels, draw_weights
from bench.work import Ceilings

CPU = torch.device("cpu")
CPU_NAME, GPU_NAME = "A CPU, 2 cores, AVX512", "NVIDIA H200"
KNOWN = Ceilings(bytes_per_second=1e10, flops_per_second=1e11)
FLOOR: dict[str, Any] = {"flops": 8 * 10**9, "bytes": 5 * 10**7, **KNOWN._asdict()}
BASE_MS = {"b0": 266.0, "b1": 436.0}
# How many times as fast as transformers eager.
CPU_SPEED = {
    **{"transformers eager": 1.0, "ONNX Runtime": 2.4, "OpenVINO default": 4.6},
    **{"fastseg eager": 4.2, "fastseg accelerate": 4.0},
    **{"fastseg OpenVINO fp32": 6.7, "fastseg OpenVINO default": 7.5},
}
ROW: dict[str, Any] = {
    **{"date": "2026-01-02T03:04:05+00:00", "kind": "forward", "case": "b0", "size": (512, 512)},
    **{"batch": 1, "dtype": "float32", "device": CPU_NAME, "cpu": CPU_NAME, "threads": 2},
    **{"provider": "transformers eager", "provider_version": "5.23.0", "unit": "ms", "ratio": 1.0},
    **{"baseline": "transformers eager", "p20": 190.0, "p50": 200.0, "p80": 210.0, "repeats": 11},
    **{"parity": "relative RMS error", "parity_error": 3e-7, "parity_gate": 2e-6},
    **{"python": "3.11.0", "torch": "2.13.0", "transformers": "5.23.0", "fastseg": "0.1.0"},
    **{"commit": "abc1234", "command": "python -m bench"},
}


def row(p50: float = 200.0, provider: str = "transformers eager", **changes: Any) -> Row:
    """A row with 5% to either side of its median."""
    found = {**ROW, "provider": provider, "p20": 0.95 * p50, "p50": p50, "p80": 1.05 * p50}
    if provider.endswith("default"):  # in a lower precision
        found.update(parity_error=3.1e-3, parity_gate=6e-3)
    return Row(**{**found, **changes})


def cpu_rows() -> list[Row]:
    """A run of all kinds of the grid."""
    found = []
    for variant, base in BASE_MS.items():
        for provider, speed in CPU_SPEED.items():
            floor = {**FLOOR, "floor_ms": base / 9}
            found.append(row(base / speed, provider, case=variant, ratio=speed, **floor))
        for provider in ("transformers eager", "fastseg eager", "fastseg accelerate"):
            post = 5.0 if provider.startswith("fastseg") else 87.0
            parts = {"pre": 9.0, "forward": base / CPU_SPEED[provider], "post": post}
            whole = sum(parts.values())
            for part, p50 in {"whole": whole, **parts}.items():
                what = {"kind": "end to end", "part": part, "case": variant}
                found.append(row(p50, provider, ratio=(base + 96) / whole, **what))
    for logits, ours in (("random logits", 38.0), ("smooth logits", 4.0)):
        what = {"kind": "labels", "case": logits, "baseline": "interpolate + argmax"}
        found += [row(94.0, "interpolate + argmax", **what), row(ours, "fastseg", **what)]
    what = {"kind": "memory", "unit": "MB", "size": (1024, 2048)}
    return [*found, row(1857.0, **what), row(212.0, "fastseg eager", ratio=1857 / 212, **what)]


def gpu_rows() -> list[Row]:
    """Forwards: several batches, a large size, peaks of memory."""
    found = []
    for size, batch in (((512, 512), 1), ((512, 512), 8), ((1024, 2048), 1)):
        where = {"device": GPU_NAME, "driver": "570.1", "dtype": "bfloat16"}
        where |= {"size": size, "batch": batch}
        found += [
            row(8.0 * batch, peak_mb=900.0 * batch, **where),
            row(2.0 * batch, "fastseg Triton", peak_mb=300.0 * batch, **where),
            row(1.0 * batch, "fastseg CUDA graph", **where),
        ]
    return found


DEPTHS = (1, 2, 1, 3)
SIZE, BATCH = (64, 96), 2


def tiny_model(
    variant: str = "b0", device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """As `setting.build_model`, much smaller, the same for all variants."""
    config = fastseg.SegformerConfig(
        depths=list(DEPTHS),
        hidden_sizes=[32, 64, 64, 128],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        num_labels=5,
    )
    model = fastseg.SegformerForSemanticSegmentation(config).eval()
    draw_weights(model)
    return model.to(device, dtype)


def recorded(dtype: torch.dtype = torch.float32) -> list[calls.CountedCall]:
    """The calls of a forward of it."""
    return calls.record(tiny_model(dtype=dtype), draw_pixels(SIZE, BATCH).to(dtype))

"""Rows as `bench.grid` makes them, with invented figures, for tests of tables and pictures."""

from __future__ import annotations

from typing import Any

from bench import rows

CPU = "A CPU, 2 cores, AVX512"
GPU = "NVIDIA H200"
VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5")
BASE_MS = dict(zip(VARIANTS, (266.0, 436.0, 1408.0, 1576.0, 1720.0, 1838.0), strict=True))

# How many times as fast as transformers eager.
CPU_SPEED = {
    "transformers eager": 1.0,
    "transformers compiled": 2.1,
    "smp": 0.9,
    "ONNX Runtime": 2.4,
    "OpenVINO fp32": 4.1,
    "OpenVINO default": 4.6,
    "fastseg eager": 4.2,
    "fastseg accelerate": 4.0,
    "fastseg compiled": 4.4,
    "fastseg ONNX Runtime": 3.9,
    "fastseg OpenVINO fp32": 6.7,
    "fastseg OpenVINO default": 7.5,
}
GPU_SPEED = {
    "transformers eager": 1.0,
    "transformers compiled": 1.6,
    "transformers max-autotune": 2.9,
    "transformers CUDA graph": 2.2,
    "fastseg eager": 1.2,
    "fastseg compiled": 2.0,
    "fastseg Triton": 3.1,
    "fastseg CUDA graph": 7.3,
}
ROW: dict[str, Any] = {
    **rows.NOT_TAKEN,
    "schema": rows.SCHEMA_VERSION,
    "date": "2026-01-02T03:04:05+00:00",
    "kind": "forward",
    "part": "whole",
    "case": "b0",
    "size": [512, 512],
    "batch": 1,
    "dtype": "float32",
    "device": CPU,
    "driver": "",
    "cpu": CPU,
    "threads": 2,
    "provider": "transformers eager",
    "provider_version": "5.23.0",
    "baseline": "transformers eager",
    "method": "calls",
    "cache": "warm",
    "unit": "ms",
    "p20": 190.0,
    "p50": 200.0,
    "p80": 210.0,
    "repeats": 11,
    "ratio": 1.0,
    "paired_ratio": 1.0,
    "parity": "relative RMS error",
    "parity_error": 3e-7,
    "parity_gate": 2e-6,
    "python": "3.11.0",
    "torch": "2.13.0",
    "triton": "",
    "transformers": "5.23.0",
    "fastseg": "0.1.0",
    "commit": "abc1234",
    "command": "python -m bench",
}


def row(p50: float, provider: str = "transformers eager", **changes: Any) -> rows.Row:
    """A row with 5% to either side of its median."""
    low, high = 0.95 * p50, 1.05 * p50
    found = {**ROW, "provider": provider, "p20": low, "p50": p50, "p80": high, **changes}
    if provider.endswith("default"):
        found.update(parity_error=3.1e-3, parity_gate=6e-3)
    return found


def cpu_rows(variants: tuple[str, ...] = VARIANTS) -> list[rows.Row]:
    """A run of all kinds on a CPU; OpenVINO default computes in a lower precision."""
    floor = {
        "flops": 8 * 10**9,
        "bytes": 5 * 10**7,
        "flops_per_second": 2.1e11,
        "bytes_per_second": 1.9e10,
    }
    found = []
    for variant in variants:
        base = BASE_MS[variant]
        for provider, speed in CPU_SPEED.items():
            floors = {**floor, "floor_ms": base / 9}
            found.append(row(base / speed, provider, case=variant, ratio=speed, **floors))
            if not provider.startswith(("transformers", "fastseg")) or "Open" in provider:
                continue
            post = 5.0 if provider.startswith("fastseg") else 87.0
            parts = {"pre": 9.0, "forward": base / speed, "post": post}
            for part, p50 in {"whole": sum(parts.values()), **parts}.items():
                found.append(row(p50, provider, case=variant, kind="end to end", part=part))
    for logits, ours in (("random logits", 38.0), ("smooth logits", 4.0)):
        case = {"kind": "labels", "case": logits, "baseline": "interpolate + argmax"}
        found += [row(94.0, "interpolate + argmax", **case), row(ours, "fastseg", **case)]
    memory = {"kind": "memory", "unit": "MB", "size": [1024, 2048]}
    found += [row(1857.0, **memory), row(212.0, "fastseg eager", **memory)]
    return found


def gpu_rows() -> list[rows.Row]:
    """Forwards on a GPU: several batches, a large size, peaks of memory."""
    found = []
    for variant in VARIANTS:
        for size, batches in (([512, 512], (1, 8, 32)), ([1024, 2048], (1,))):
            for batch in batches:
                pixels = size[0] * size[1] / 512**2
                busy = BASE_MS[variant] * batch * pixels / 400
                for provider, speed in GPU_SPEED.items():
                    took = (busy + 3.0) / speed
                    peak = None if "graph" in provider else 900.0 * batch * pixels / speed
                    found.append(
                        row(
                            took,
                            provider,
                            case=variant,
                            size=size,
                            batch=batch,
                            dtype="bfloat16",
                            device=GPU,
                            driver="570.1",
                            triton="3.6.0",
                            method="CUDA events",
                            peak_mb=peak,
                        )
                    )
    return found

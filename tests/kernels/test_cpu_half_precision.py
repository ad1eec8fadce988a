"""Half precision on a CPU: a model's ops over a grid of shapes, also with fewer instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.cpu_formulas import failures

ROOT = Path(__file__).parents[2]
# The most that oneDNN may use: no AMX, no products of bfloat16, nothing in bfloat16.
NARROWED = ("AVX512_CORE_BF16", "AVX512_CORE", "AVX2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shapes(dtype):
    assert failures(dtype) == []


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("narrowed", NARROWED)
def test_shapes_with_fewer_instructions(narrowed, dtype):
    command = [sys.executable, "-m", "tests.kernels.cpu_formulas", dtype]
    settings = {**os.environ, "ONEDNN_MAX_CPU_ISA": narrowed}
    done = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""

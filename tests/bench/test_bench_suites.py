"""The pytest-benchmark suites of bench/suites: they run, and a wrong result gets no figure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bench import gates
from bench.context import Setting, context
from bench.suites import checked

ROOT = Path(__file__).parents[2]

pytest.importorskip("pytest_benchmark")


@pytest.mark.slow
def test_suites_run_once(tmp_path):
    report = tmp_path / "report.xml"
    # B0 at 64x64, with providers that are quick to build.
    options = f"""--benchmark-disable --variants b0 --size 64 --threads 1 --device cpu
        --dtype float32 --providers transformers-eager,fastseg-eager,fastseg-cuda-graph
        --junitxml {report}"""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/suites", *options.split(), "-k", "not compiled"],
        cwd=ROOT,
        # Without what a pytest around this one sets.
        env={name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    skipped: dict[str, str | None] = {}  # why, by test; None of those that ran
    for case in ElementTree.parse(report).iter("testcase"):
        why = case.find("skipped")
        skipped[case.attrib["name"]] = None if why is None else why.attrib["message"]
    ran = {name for name, why in skipped.items() if why is None}
    setting = "b0, 64x64, batch 1, float32"
    for name in ("transformers eager", "fastseg eager"):
        assert {f"test_forward[{setting}-{name}]", f"test_end_to_end[{setting}-{name}]"} <= ran
    for op in ("patch_embed", "sr_attention", "mix_ffn", "decode_head", "upsample_argmax"):
        assert f"test_op[{op}-eager]" in ran
        assert skipped[f"test_op[{op}-kernels]"] == "kernels: kernels run on a GPU"
    assert len([name for name in ran if name.startswith("test_labels")]) == 12
    why = skipped[f"test_forward[{setting}-fastseg CUDA graph]"]
    assert why == "fastseg CUDA graph: the kernels need a GPU"


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(gates, "FLOAT32_BOUND", 1e-12)
    setting = Setting("b0", (64, 64), 1, "float32")
    red = pytest.raises(pytest.fail.Exception, match="parity gate is red: .* at most 1e-12")
    with torch.no_grad(), context(setting, torch.device("cpu"), threads=1) as made, red:
        checked.build(made, "fastseg eager")

"""The pytest-benchmark suites of bench/suites: they run, and a wrong result gets no figure."""

from __future__ import annotations

import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from bench.machine import ROOT

pytestmark = pytest.mark.slow

SETTING = "b0, 64x64, batch 1, float32"
BENCH = "--variants b0 --sizes 64 --threads 1 --device cpu --dtypes float32 --providers "


def suites(tmp_path, providers, *more):
    """By test, what became of it and why; and what was printed."""
    # Without what a pytest around this one sets.
    known = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    known |= {"FASTSEG_BENCH": BENCH + providers, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    program = [sys.executable, "-m", "pytest", "bench/suites", *more]
    program.append(f"--junitxml={tmp_path / 'report.xml'}")
    told = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run(program, cwd=ROOT, env=known, **told)
    outcomes = {}
    for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase"):
        found = [(one.tag, one.attrib["message"] + (one.text or "")) for one in case if one.attrib]
        outcomes[case.attrib["name"]] = (found or [("passed", "")])[0]
    return outcomes, done.stdout + done.stderr


def test_suites_run_once(tmp_path):
    names = "transformers-eager,fastseg-eager,fastseg-cuda-graph"
    outcomes, said = suites(tmp_path, names, "--benchmark-disable", "-k", "not compiled")
    ran = {name for name, (outcome, _) in outcomes.items() if outcome == "passed"}
    assert {outcome for outcome, _ in outcomes.values()} == {"passed", "skipped"}, said
    for name in ("transformers eager", "fastseg eager"):
        assert {f"test_forward[{SETTING}-{name}]", f"test_end_to_end[{SETTING}-{name}]"} <= ran
    ops = [name for name in ran if name.startswith("test_op")]
    maps = [name for name in ran if name.startswith("test_labels")]
    assert (len(ops) >= 5, len(maps)) == (True, 12)
    assert "it runs on cuda only" in outcomes[f"test_forward[{SETTING}-fastseg CUDA graph]"][1]


def test_a_wrong_result_is_not_timed(tmp_path):
    (tmp_path / "tight.py").write_text("from bench import gates\ngates.FLOAT32_BOUND = 1e-12\n")
    given = ("-p", "tight", "-k", "test_forward", "--benchmark-max-time=0.01")
    outcomes, said = suites(tmp_path, "fastseg-eager", *given)
    assert len(outcomes) == 2
    for outcome, reason in outcomes.values():
        assert outcome in ("error", "failure")
        assert "RedGate" in reason
        assert "at most 1e-12" in reason
    assert "Name (time in" not in said  # pytest-benchmark's table

"""The GPU command from end to end on a CPU: an error in it would cost the time of a real GPU.

Kernels are compiled for sm_90; the eager twins stand in for them where results are looked at and
timed, and Triton's interpreter where kernels are tuned and tested.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.gpu import summary
from bench.gpu.stages import ROOT, STAGES


# Its stages are within their time where nothing else runs.
@pytest.mark.skipif("FASTSEG_REHEARSAL" not in os.environ, reason="by make test-gpu-versions")
def test_every_stage_ends_well_within_its_time(tmp_path):
    program = [sys.executable, "-m", "bench", "gpu", "--out", str(tmp_path / "out")]
    program += ["--device", "cpu", "--quick", "--minutes", "9.5"]
    # What is compiled is compiled anew; a tuner that still has candidates stops by itself.
    variables = {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "OMP_NUM_THREADS": "2"}
    known = {"cwd": ROOT, "env": {**os.environ, **variables}, "text": True}
    done = subprocess.run(program, **known, capture_output=True, check=False)
    records = summary.read_records(tmp_path / "out")
    said = {name: (record["status"], record["reason"]) for name, record in records.items()}
    untuned = said.pop("tune")
    assert said == {stage.name: ("ok", "") for stage in STAGES if stage.name != "tune"}, done.stdout
    assert untuned == ("ok", "") or "later calls were not tuned" in untuned[1]
    assert done.returncode == 0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert text in done.stdout
    assert len(text.splitlines()) < 50
    assert "kernels for sm_90 in " in text
    assert "| b0, 64x64, batch 1, " in text
    assert "Replays back to back" in text

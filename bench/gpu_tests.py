"""`python -m bench.gpu_tests --out DIR [FILE ...]`: the kernel tests on a GPU, the smallest first.

Each file is a pytest run of its own, so that one that crashes or hangs costs no other.
DIR/tests.jsonl gets a line a file, DIR/tests what pytest reports; what is in it is not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.gpu_layout import ROOT
from bench.gpu_stages import TESTS
from bench.gpu_summary import read_lines

FOLDER = Path("tests", "kernels", "triton")  # in the layout that it runs in, or in the checkout
# Small and telling first: one op, a whole model, then ops by what hangs on them.
FILES = (
    "norm/test_layer_norm.py",
    "test_model.py",
    "core/test_semaphores.py",
    "test_gpu.py",
    "attention/test_spatial_reduction.py",
    "attention/test_sr_attention.py",
    "ffn/test_mix_ffn.py",
    "embed/test_patch_embed.py",
    "head/test_decode_head.py",
    "labels/test_upsample_argmax_kernels.py",
    "test_gpu_graphed.py",
    "tune/test_tuning.py",
)
# It is a stage of its own.
_LEFT_OUT = "tests/kernels/triton/test_gpu.py::test_sanitizer"
_MOST_WORKERS = 8
_LEAST_SECONDS = 60.0  # for a file; compiling takes most of it
_FAILURES_KEPT = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where a test failed or a file did not end."""
    given = _parser().parse_args(argv)
    stop = time.monotonic() + 60 * given.minutes
    log = given.out / TESTS
    before = {} if given.again else {entry["file"]: entry for entry in read_lines(log)}
    done = {name: entry for name, entry in before.items() if entry["status"] != "timeout"}
    asked = given.files or FILES
    files = [name for name in asked if name not in done]
    workers = min(_MOST_WORKERS, os.cpu_count() or 1) if importlib.util.find_spec("xdist") else 1
    failed = any(name in done and done[name]["status"] != "ok" for name in asked)
    for index, name in enumerate(files):
        left = stop - time.monotonic()
        if left <= 0:
            print(f"{name}: not begun, the time is up", flush=True)
            continue
        # A file that hangs must leave time for others; the last may take all that is left.
        limit = min(left, max(_LEAST_SECONDS, 3 * left / (len(files) - index)))
        entry = {"file": name, **run_file(FOLDER / name, given.out, workers, limit)}
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(json.dumps({**entry, "failures": len(entry["failures"])}), flush=True)
        if entry["status"] == "timeout":
            print(f"{name}: stopped after {limit:.0f} s, the time is up", flush=True)
        failed = failed or entry["status"] != "ok"
    return int(failed)


def run_file(path: Path, out: Path, workers: int, seconds: float) -> dict[str, Any]:
    """Run the GPU tests of one file and tell what came of it.

    Args:
        out: gets tests/<name>.xml, by pytest, and lost_gpu.log, by `bench.gpu_pytest`.
        workers: processes; more than 1 need pytest-xdist.

    Returns:
        status ("ok", "failed" or "timeout"), reason, numbers of passed, failed and skipped
        tests, seconds, and the first failures.
    """
    report = (out / "tests" / path.stem).with_suffix(".xml")
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "pytest", "-o", "addopts=", "-o", "pythonpath="),
        *("-q", "-m", "gpu", "-ra"),
        *("-p", "no:cacheprovider", "-p", "bench.gpu_pytest"),
        *("--lost-gpu-log", str(out / "lost_gpu.log")),
        *("--rootdir", ".", "-c", str(ROOT / "pyproject.toml"), "--deselect", _LEFT_OUT),
        *("--tb=short", f"--junitxml={report}"),
        *(["-n", str(workers)] if workers > 1 else []),
        str(path),
    ]
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        code: int | None = process.wait(None if math.isinf(seconds) else seconds)
    except subprocess.TimeoutExpired:
        code = None
        process.send_signal(signal.SIGTERM)  # its workers end when it does
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    found = read_report(report)
    status, reason = "ok", ""
    if code is None:
        status, reason = "timeout", f"stopped after {seconds:.0f} s"
    elif code == 5:
        status, reason = "failed", "no test ran"
    elif code:
        status, reason = "failed", f"pytest ended with status {code}"
    return {
        "status": status,
        "reason": reason,
        **found,
        "seconds": round(time.monotonic() - began, 1),
    }


def read_report(path: Path) -> dict[str, Any]:
    """What pytest's XML says: numbers of tests, and the first failures with their messages."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):  # pytest did not get as far as writing it
        return found
    for case in cases:
        wrong = [part for part in case if part.tag in ("failure", "error")]
        if wrong:
            found["failed"] += 1
            message = (wrong[0].get("message") or "").split("\n", 1)[0][:200]
            if len(found["failures"]) < _FAILURES_KEPT:
                found["failures"].append(f"{case.get('name')}: {message}")
        elif case.find("skipped") is not None:
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found


def _file(name: str) -> str:
    if name not in FILES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(FILES)}, got {name!r}")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_tests")
    add = parser.add_argument
    # No `choices`: Python 3.11 would want the empty list to be one of them.
    add("files", nargs="*", type=_file, metavar="FILE", help="of the kernel tests (default: all)")
    add("--out", type=Path, required=True, metavar="DIR")
    add("--minutes", type=float, default=math.inf, metavar="M", help="(default: no limit)")
    add("--again", action="store_true", help="also files that were run before")
    return parser


if __name__ == "__main__":
    sys.exit(main())

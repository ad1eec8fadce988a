"""`python -m bench.gpu_sanitizer --out DIR`: compute-sanitizer over a few tiny models.

First without it, which compiles the kernels, then memcheck and racecheck. DIR/sanitizer.jsonl gets
a line each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_layout import ROOT
from bench.gpu_stages import SANITIZER, sanitizer_program
from bench.gpu_summary import read_lines

SCRIPT = ROOT / "tests" / "kernels" / "triton" / "sanitizer_cases.py"
PLAIN = "none"
TOOLS = (PLAIN, "memcheck", "racecheck")
_FOUND = 99  # the exit status for errors that a tool found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where a tool found errors or did not run."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_sanitizer")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR")
    add("--minutes", type=float, default=math.inf, metavar="M", help="(default: no limit)")
    add("--again", action="store_true", help="also what was run before")
    given = parser.parse_args(argv)
    program = sanitizer_program()
    if program is None:
        print("compute-sanitizer is not installed")
        return 1
    stop = time.monotonic() + 60 * given.minutes
    log = given.out / SANITIZER
    done = [] if given.again else [entry["tool"] for entry in read_lines(log)]
    failed = False
    for tool in TOOLS:
        if tool in done:
            continue
        if time.monotonic() >= stop:
            print(f"{tool}: not begun, the time is up", flush=True)
            continue
        entry = run_tool(program, tool)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        failed = failed or entry["status"] != "ok"
        if tool == PLAIN and failed:
            print("the models fail without compute-sanitizer: there is nothing to look at")
            break
    return int(failed)


def run_tool(program: str, tool: str, script: Path = SCRIPT) -> dict[str, Any]:
    """Run `script` under a tool of the sanitizer, or under none, and tell what came of it."""
    command = [sys.executable, str(script)]
    if tool != PLAIN:
        command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), *command]
    began = time.monotonic()
    done = subprocess.run(
        command,
        # Each tensor an allocation of its own, so that memcheck sees where it ends.
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(f"== {tool}\n{done.stdout}", flush=True)
    errors = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (.*)", done.stdout)
    return {
        "tool": tool,
        "status": "ok" if done.returncode == 0 else "failed",
        "found": errors[-1] if errors else f"exit status {done.returncode}",
        "seconds": round(time.monotonic() - began, 1),
    }


if __name__ == "__main__":
    sys.exit(main())

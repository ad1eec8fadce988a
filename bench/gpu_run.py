"""Run stages one after another within the time of a call, and write down what became of each.

A stage is a process in a group of its own. At the end of its time the group gets SIGTERM, then
SIGKILL; what it wrote stays. DIR/stages.jsonl gets a line a run of a stage, DIR/<stage>.log its
output. Time that a stage leaves goes to those after it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import gpu_layout, gpu_summary
from bench.gpu_stages import Options, Stage

RECORDS = "stages.jsonl"
OK, FAILED, TIMEOUT, SKIPPED, INTERRUPTED = "ok", "failed", "timeout", "skipped", "interrupted"

_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
_MARGIN_SECONDS = 10.0  # for starting up and the summary
_STOPPED = 130  # as shells report a process ended by Ctrl-C


@dataclass
class _Ended:
    """What became of a stage in this call. A further call leaves alone what is complete."""

    status: str
    reason: str
    complete: bool
    seconds: float
    command: str


def run(
    options: Options, stages: Sequence[Stage], chosen: Sequence[str], again: Sequence[str]
) -> int:
    """Run the stages named in `chosen` and `again` that are not done yet.

    Returns:
        1 where a stage failed, in this call or in one whose results stand; 130 after Ctrl-C or
        SIGTERM; else 0.
    """
    stop = time.monotonic() + 60 * options.minutes - _GRACE_SECONDS - _MARGIN_SECONDS
    options.out.mkdir(parents=True, exist_ok=True)
    _mend(options.out)
    layout = gpu_layout.make(options.out / "layout")
    before = read_records(options.out)
    pending = [
        stage
        for stage in stages
        if stage.name in again
        or (
            stage.name in chosen
            and (stage.always or not before.get(stage.name, {}).get("complete"))
        )
    ]
    stopped = False
    with _signals():
        try:
            for index, stage in enumerate(pending):
                seconds = _share(stage, pending[index:], stop - time.monotonic())
                if seconds is None:
                    print(f"{stage.name}: not begun, the time is up", flush=True)
                    continue
                _run_stage(options, stage, seconds, layout, resume=stage.name not in again)
        except KeyboardInterrupt:
            stopped = True
    records = read_records(options.out)
    text = gpu_summary.summary(options.out, [stage.name for stage in stages], records)
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text, flush=True)
    if stopped:
        return _STOPPED
    return int(any(record["status"] == FAILED for record in records.values()))


def _share(stage: Stage, pending: Sequence[Stage], left: float) -> float | None:
    """Seconds for `stage`, the first of `pending`; None where too little is left."""
    share = left * stage.share / sum(one.share for one in pending)
    return min(max(share, stage.least), left) if left >= stage.least else None


def _run_stage(options: Options, stage: Stage, seconds: float, layout: Path, resume: bool) -> None:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    reason = stage.skip(options)
    if reason is not None:
        _record(options.out, stage, started, _Ended(SKIPPED, reason, False, 0.0, ""))
        return
    command = [sys.executable, *stage.command(options, seconds, resume)]
    variables = stage.variables(options)
    shown = shlex.join([*(f"{name}={value}" for name, value in variables.items()), *command])
    print(f"{stage.name}: {seconds:.0f} s for {shlex.join(command[1:])}", flush=True)
    began = time.monotonic()
    log = options.out / f"{stage.name}.log"
    with log.open("ab") as output:
        start_of_log = output.tell()
        output.write(f"{started} {shown}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=layout,
            env={**gpu_layout.environment(layout), **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group, and not a session: who ends this session ends the stage too.
            preexec_fn=os.setpgrp,
        )
        try:
            code = process.wait(seconds)
            status = OK if code == 0 else FAILED
            reason = "" if code == 0 else f"exit status {code}: {_last_line(log, start_of_log)}"
        except subprocess.TimeoutExpired:
            status, reason = TIMEOUT, f"stopped after {seconds:.0f} s"
        except KeyboardInterrupt:
            status, reason = INTERRUPTED, "stopped by a signal"
        end_group(process)
    words = _words_in(log, start_of_log, stage.unfinished)
    if status == OK and words:
        status, reason = TIMEOUT, f"it says: {words}"
    complete = status in (OK, FAILED) and not words
    _mend(options.out)
    taken = time.monotonic() - began
    _record(options.out, stage, started, _Ended(status, reason, complete, taken, shown))
    if status == INTERRUPTED:
        raise KeyboardInterrupt


def end_group(process: subprocess.Popen[Any]) -> None:
    """End what is left of the group of `process`: first it is asked to, then it is killed."""
    for number, grace in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, 1.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # all of it has ended
            return
        stop = time.monotonic() + grace
        while time.monotonic() < stop:
            process.poll()  # collects it: a process that nobody waited for still has its group
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# What is written


def _record(out: Path, stage: Stage, started: str, ended: _Ended) -> None:
    record = {
        "name": stage.name,
        "status": ended.status,
        "reason": ended.reason,
        "complete": ended.complete,
        "seconds": round(ended.seconds, 1),
        "command": ended.command,
        "started": started,
    }
    with (out / RECORDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    because = f", {ended.reason}" if ended.reason else ""
    print(f"{stage.name}: {ended.status} after {ended.seconds:.0f} s{because}", flush=True)


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """The last record of each stage, by its name."""
    return {record["name"]: record for record in gpu_summary.read_lines(out / RECORDS)}


def _mend(out: Path) -> None:
    """Cut the line off that a killed process left half written: rows cannot follow it."""
    for path in out.glob("*.jsonl"):
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            whole = data.rfind(b"\n") + 1
            print(f"{path.name}: a line cut short is dropped: {data[whole:][:80]!r}", flush=True)
            os.truncate(path, whole)


def _lines_from(log: Path, start: int) -> list[str]:
    """The lines of a log from `start` on, but the first, which is the command."""
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()[1:]


def _last_line(log: Path, start: int) -> str:
    lines = [line.strip() for line in _lines_from(log, start) if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def _words_in(log: Path, start: int, words: Sequence[str]) -> str:
    """The last line with any of `words`, "" where there is none."""
    lines = [line for line in _lines_from(log, start) if any(word in line for word in words)]
    return lines[-1].strip()[:200] if lines else ""


def commit() -> str:
    """The checkout's commit as rows have it, with "-dirty"; "unknown" outside git."""
    head = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--", "fastseg", "kernels", "bench", ":!bench/results")
    return f"{head}-dirty" if head and changed else head or "unknown"


def _git(*arguments: str) -> str:
    """What git prints; "" where it fails."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=gpu_layout.ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()

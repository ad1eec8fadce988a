"""Run stages one after another within the time of a call, and write down what became of each.

A stage is a process in a group of its own. At the end of its time the group gets SIGTERM, then
SIGKILL; what it wrote stays. DIR/stages.jsonl gets a line a run of a stage, DIR/<stage>.log its
output. Time that a stage leaves goes to those after it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .stages import RECORDS, ROOT, Options, Stage, read_records
from .summary import summary

OK, FAILED, TIMEOUT, SKIPPED, INTERRUPTED = "ok", "failed", "timeout", "skipped", "interrupted"

_GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
_MARGIN_SECONDS = 10.0  # for starting up and the summary


def run(
    options: Options, stages: Sequence[Stage], chosen: Sequence[str], again: Sequence[str]
) -> int:
    """Run the stages named in `chosen` and `again` that are not done yet.

    The status is 1 where a stage failed, in this call or in one whose results stand; 130 after
    Ctrl-C or SIGTERM; else 0.
    """
    stop = time.monotonic() + 60 * options.minutes - _GRACE_SECONDS - _MARGIN_SECONDS
    options.out.mkdir(parents=True, exist_ok=True)
    _mend(options.out)
    layout = make_layout(options.out / "layout")
    done = {name for name, record in read_records(options.out).items() if record["complete"]}
    due = {one.name for one in stages if one.always or one.name not in done} & {*chosen}
    pending = [one for one in stages if one.name in due | {*again}]
    stopped = False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    try:
        for index, stage in enumerate(pending):
            seconds = _share(stage, pending[index:], stop - time.monotonic())
            if seconds is None:
                print(f"{stage.name}: not begun, the time is up", flush=True)
                continue
            _run_stage(options, stage, seconds, layout, resume=stage.name not in again)
    except KeyboardInterrupt:
        stopped = True
    signal.signal(signal.SIGTERM, before)
    text = summary(options.out, [stage.name for stage in stages])
    (options.out / "summary.md").write_text(text, encoding="utf-8")
    print(text, flush=True)
    failed = any(one["status"] == FAILED for one in read_records(options.out).values())
    return 130 if stopped else int(failed)


def _share(stage: Stage, pending: Sequence[Stage], left: float) -> float | None:
    """Seconds for `stage`, the first of `pending`; None where too little is left."""
    share = left * stage.share / sum(one.share for one in pending)
    return min(max(share, stage.least), left) if left >= stage.least else None


def _run_stage(options: Options, stage: Stage, seconds: float, layout: Path, resume: bool) -> None:
    began = time.monotonic()
    record = {"name": stage.name, "status": SKIPPED, "complete": False, "command": ""}
    record["reason"] = reason = stage.skip(options)
    if reason is None:
        command = stage.command(options, seconds, resume)
        known = {"out": options.out, "interpret": int(options.device != "cuda")}
        variables = {n: v.format(**known) for n, v in stage.variables.items()}
        shown = shlex.join([*(f"{n}={value}" for n, value in variables.items()), *command])
        print(f"{stage.name}: {seconds:.0f} s for {shown.removeprefix(sys.executable)}", flush=True)
        log = options.out / f"{stage.name}.log"
        start_of_log = log.stat().st_size if log.exists() else 0
        status, reason = _process(command, _environment(layout, variables), layout, log, seconds)
        said = log.read_bytes()[start_of_log:].decode(errors="replace").splitlines()
        said = [line.strip()[:200] for line in said if line.strip()] or ["it printed nothing"]
        if status == FAILED:
            reason += f": {said[-1]}"
        unfinished = [line for line in said if stage.unfinished in line]
        if status == OK and unfinished:
            status, reason = TIMEOUT, f"it says: {unfinished[-1]}"
        record |= {"status": status, "reason": reason, "command": shown}
        record["complete"] = status in (OK, FAILED) and not unfinished
        _mend(options.out)
    record["seconds"] = taken = round(time.monotonic() - began, 1)
    with (options.out / RECORDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    because = f", {reason}" if reason else ""
    print(f"{stage.name}: {record['status']} after {taken:.0f} s{because}", flush=True)
    if record["status"] == INTERRUPTED:
        raise KeyboardInterrupt


def _process(
    command: list[str], environment: dict[str, str], folder: Path, log: Path, seconds: float
) -> tuple[str, str]:
    """Status and reason of a process, whose output goes to `log`."""
    with log.open("ab") as output:
        how: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        # A group, and not a session: who ends this session ends the stage too.
        how |= {"cwd": folder, "env": environment, "preexec_fn": os.setpgrp}
        process = subprocess.Popen(command, **how)
        try:
            code = process.wait(seconds)
            return (OK, "") if code == 0 else (FAILED, f"exit status {code}")
        except subprocess.TimeoutExpired:
            return TIMEOUT, f"stopped after {seconds:.0f} s"
        except KeyboardInterrupt:
            return INTERRUPTED, "stopped by a signal"
        finally:
            end_group(process)


def end_group(process: subprocess.Popen[Any]) -> None:
    """End what is left of the group of `process`: first it is asked to, then it is killed."""
    for number, grace in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, 1.0)):
        stop = time.monotonic() + grace
        try:
            os.killpg(process.pid, number)
            while time.monotonic() < stop:
                process.poll()  # collects it: what nobody waited for still has its group
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:  # all of it has ended
            return


def make_layout(folder: Path, root: Path = ROOT) -> Path:
    """An importable fastseg out of the checkout `root`, which is not installed; gives `folder`.

    A checkout on the path would show the top-level name `kernels` to transformers, which takes it
    for Hugging Face's package; and where the checkout's own link fastseg/kernels became a text file
    on its way, fastseg would not import. The layout is a folder of links that holds `fastseg`,
    `bench` and `tests` and nothing else. It lies among the results: the checkout stays as it is.
    """
    for name in ("fastseg", "kernels", "bench", "tests"):
        if not (root / name / "__init__.py").is_file():
            raise FileNotFoundError(f"{root}: expected a checkout of fastseg with {name}/ in it")
    shutil.rmtree(folder, ignore_errors=True)  # of links: it does not follow them
    package = folder / "fastseg"
    package.mkdir(parents=True)
    for entry in (root / "fastseg").iterdir():
        if entry.name not in ("__pycache__", "kernels"):
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(root / "kernels")
    for name in ("bench", "tests"):
        (folder / name).symlink_to(root / name)
    return folder


def _environment(layout: Path, variables: dict[str, str]) -> dict[str, str]:
    """The variables of processes that import from the layout, without a network."""
    path = os.pathsep.join(filter(None, [str(layout), os.environ.get("PYTHONPATH", "")]))
    fixed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, **variables}


def _mend(out: Path) -> None:
    """Cut the line off that a killed process left half written: rows cannot follow it."""
    for path in out.glob("*.jsonl"):
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            whole = data.rfind(b"\n") + 1
            print(f"{path.name}: a line cut short is dropped: {data[whole:][:80]!r}", flush=True)
            os.truncate(path, whole)

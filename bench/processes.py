"""Processor time and memory of a command with all processes that it begins, by what they are.

Engines begin processes that are nobody's children in the end, so these are known by a variable in
their environment, and looked at in Linux's /proc as long as they live.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_MARK = "FASTSEG_BENCH_COMMAND"
_LOOK_SECONDS = 0.1  # what a process does after the last look before its end is not seen
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Used:
    """What a command took.

    Attributes:
        seconds: from its beginning to its end.
        processor: seconds by the kind of process.
        peak: MB, the highest resident set of any process of a kind.
        peaks: their sum over the processes of a kind; what these share counts in each.
    """

    seconds: float = 0.0
    processor: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)


def used_by(
    command: Sequence[str],
    kind: Callable[[str], str],
    environment: Mapping[str, str],
    folder: Path,
) -> Used:
    """Run a command and tell what it took.

    Args:
        kind: what a process is, by its command line, words of which have a space between them.

    Raises:
        RuntimeError: it fails.
    """
    mark = uuid.uuid4().hex
    begun = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**environment, _MARK: mark},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = _Watch(f"{_MARK}={mark}".encode(), kind)
    try:
        said, _ = process.communicate()
    finally:
        process.kill()
        watch.stop()
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)[:300]}: {said[-2000:]}")
    found = watch.used()
    found.seconds = time.perf_counter() - begun
    return found


class _Watch:
    """A thread that looks at the processes with a mark in their environment."""

    def __init__(self, mark: bytes, kind: Callable[[str], str]) -> None:
        self._mark, self._kind = mark, kind
        self._ours: dict[str, bool] = {}
        self._seen: dict[str, tuple[str, float, float]] = {}  # kind, processor seconds, peak MB
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            self._look()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        for name in os.listdir("/proc"):
            if not name.isdecimal() or self._ours.get(name) is False:
                continue
            with contextlib.suppress(OSError, ValueError, StopIteration):
                folder = Path("/proc", name)
                if name not in self._ours:
                    environment = (folder / "environ").read_bytes()
                    if not environment:  # it is just beginning
                        continue
                    self._ours[name] = self._mark in environment
                    if not self._ours[name]:
                        continue
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                # Behind the name, which may hold anything.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                lines = (folder / "status").read_text().splitlines()
                peak = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
                seconds = (int(fields[11]) + int(fields[12])) / _TICK
                # An actor gets its name after it has begun.
                self._seen[name] = self._kind(command), seconds, int(peak) * 1024 / 1e6

    def used(self) -> Used:
        found = Used()
        for kind, seconds, peak in self._seen.values():
            found.processor[kind] = found.processor.get(kind, 0.0) + seconds
            found.peak[kind] = max(found.peak.get(kind, 0.0), peak)
            found.peaks[kind] = found.peaks.get(kind, 0.0) + peak
        return found

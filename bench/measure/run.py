"""A run of `python -m bench`: rows of one case after another, notes on what has none, tables.

Parity is checked first: what fails it gets no figure, and the status is 1. Providers of a case are
timed in turn in one process. Rows are added to their file as they come.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from tqdm import tqdm

from .. import rows, timing, work
from ..gates import Gate, RedGate
from ..machine import machine, pinned_threads
from ..options import Options, parse
from ..rows import UNITS, Row
from ..setting import DTYPES, Setting, SkippedCase, first_line
from ..work import Ceilings, Work

# By command, the modules whose `measure` takes a Run; a new measure is one more file here.
MEASURES = {"": ("models", "labels", "memory")}


def main(argv: Sequence[str], command: str = "") -> int:
    """Run the command line; the status is 1 where a result was wrong or fastseg failed."""
    run = Run(parse(argv, command))
    with pinned_threads(run.options.threads, run.options.device), torch.no_grad():
        # float32 is IEEE on all sides; cuDNN's convolutions are not, left to themselves.
        torch.backends.cudnn.allow_tf32 = False
        for name in MEASURES.get(command, (command,)):
            importlib.import_module(f"bench.measure.{name}").measure(run)
    if run.measured:
        try:
            print(importlib.import_module("bench.report.tables").markdown(run.measured))
        except ImportError as error:  # of pandas or tabulate: the rows are there
            run.say(f"no tables: {error}")
    for line in run.notes:
        print(line)
    return int(run.bad)


@dataclass(frozen=True)
class Checked:
    """A provider whose result is right."""

    function: Callable[..., Any]
    version: str  # of the library that computes
    gate: Gate
    error: float
    setup_s: float | None = None  # from files to the first result
    peak_mb: float | None = None  # of GPU memory during a call; None where it is not counted


Fields = Mapping[str, Any]  # of rows
Samples = Mapping[str, Sequence[float]]  # by name
Providers = Mapping[str, Checked]  # by name; the first is the baseline


class Run:
    """What is known of the machine, what was measured, and what went wrong."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.on_gpu = options.device.type == "cuda"
        self.measured: list[Row] = []
        self.notes: list[str] = []
        self.bad = False
        self._stop = time.monotonic() + 60 * options.minutes
        self.facts = {**machine(options.device), "threads": options.threads}
        self.facts |= {"commit": options.commit, "command": options.line}
        file = options.output if options.resume else None
        before = rows.read_rows(file) if file is not None and file.exists() else []
        self._done = {row.key for row in before if row.command == options.line}

    # Rows

    def time(
        self,
        what: Fields,
        providers: Providers,
        label: str,
        works: Sequence[Work] = (),
        warm_up_rounds: int = timing.WARM_UP_ROUNDS,
    ) -> None:
        """Time functions in turn, and add their rows, with the fields `what`.

        `works` are the least work of the case; there are none where nobody has counted it.
        """
        floor = self.floor(works, what["dtype"]) if works else {}
        functions = {name: one.function for name, one in providers.items()}
        device, repeats = self.options.device, self.options.repeats
        clock: timing.Clock = timing.wall_clock
        warm_up, method = 0.0, "calls"
        if self.on_gpu:
            clock, warm_up, method = timing.event_clock(device), 0.5, "CUDA events"
        with torch.inference_mode():
            samples = timing.interleave(functions, repeats, label, clock, warm_up, warm_up_rounds)
        self.add(self.rows({"method": method, **what, **floor}, samples, providers))

    def rows(self, what: Fields, samples: Samples, providers: Providers) -> list[Row]:
        """A row a provider; the first is the baseline."""
        baseline = next(iter(samples))
        common = {**self.facts, "unit": UNITS[what["kind"]], "baseline": baseline}
        common |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), **what}
        found = []
        for name, taken in samples.items():
            one = providers[name]
            own: dict[str, Any] = {
                "provider": name,
                "provider_version": one.version,
                "repeats": len(taken),
            }
            own |= {"setup_s": one.setup_s, "peak_mb": one.peak_mb, "parity": one.gate.measure}
            own |= {"parity_error": one.error, "parity_gate": one.gate.bound}
            figures = {**timing.quantiles(taken), **timing.ratios(samples[baseline], taken)}
            found.append(Row(**{**common, **own, **figures}))
        return found

    def floor(self, works: Sequence[Work], dtype: str) -> dict[str, Any]:
        """The fields on the least work of a case, and its least time here."""
        least, known = work.total(works), self.ceilings(dtype)
        return {**least._asdict(), **known._asdict(), "floor_ms": known.floor_ms(works)}

    def ceilings(self, dtype: str) -> Ceilings:
        """Measured once a run, for which there must be memory for large matrices."""
        return work.ceilings(self.options.device, DTYPES[dtype])

    def add(self, found: Sequence[Row]) -> None:
        """Keep rows of a case, in the file too."""
        if self.options.output is not None and found:
            rows.append_rows(self.options.output, found)
        self.measured += found

    def wants(self, what: Mapping[str, Any], label: str) -> bool:
        """Whether there is time for a case, and no row of it to resume from."""
        if rows.case_key({"cache": "warm", **self.facts, **what}) in self._done:
            self.say(f"{label}: measured before")
        elif self.minutes_left <= 0:
            self.say(f"{label}: not begun, the time is up")
        else:
            return True
        return False

    @property
    def minutes_left(self) -> float:
        """Of those that were given."""
        return (self._stop - time.monotonic()) / 60

    def checked(
        self, label: str, names: Iterable[str], check: Callable[[str], Checked]
    ) -> dict[str, Checked]:
        """The providers that are right, in order; none without the first, which is the baseline."""
        found: dict[str, Checked] = {}
        for name in names:
            with self.telling(label, name, ours=name.startswith(("fastseg", "kernels"))):
                found[name] = check(name)
            if not found:
                self.say(f"{label}: no figure without the baseline")
                break
        return found

    # What is said

    def say(self, message: str, bad: bool = False) -> None:
        """Now, and again after the tables, once; `bad` makes the status 1."""
        self.bad |= bad
        if message not in self.notes:
            self.notes.append(message)
            tqdm.write(message, file=sys.stderr)

    @contextmanager
    def telling(self, label: str, provider: str, ours: bool = True) -> Iterator[None]:
        """What happens to one provider is told, and costs no other.

        Of others a failure is a limit; of `ours` a defect. Raises where the GPU is lost.
        """
        try:
            yield
        except SkippedCase as reason:
            self.say(f"{label}: {provider} skipped, {reason}")
        except torch.OutOfMemoryError as reason:
            self.say(f"{label}: {provider} skipped, {first_line(reason)}")
        except RedGate as reason:
            self.say(f"{label}: no figure, parity gate is red: {reason}", bad=True)
        except Exception as reason:  # of any compiler, converter or driver
            outcome = "no figure" if ours else "skipped"
            self.say(f"{label}: {provider} {outcome}, {first_line(reason)}", bad=ours)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()


def what_of(kind: str, setting: Setting) -> dict[str, Any]:
    """The fields that tell a case of a model."""
    variant, size, batch, dtype = setting
    return {"kind": kind, "case": variant, "size": size, "batch": batch, "dtype": dtype}


def tidy(device: torch.device) -> None:
    """Let go of models and compiled graphs: dynamo keeps few graphs of a function."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

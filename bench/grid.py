"""The grid of `fastseg bench`: SegFormer by fastseg and by others, on this machine.

For each variant, size, batch and dtype: the forward, and the way from an 8-bit image to its label
map; then upsampling and argmax of several kinds of logits, and the peak of memory. Parity is
checked first: what fails it gets no figure, and the command ends with status 1. Providers of a case
are timed in turn in one process. Rows are added to bench/results/cpu.jsonl or gpu.jsonl as they
come, and tables of this run are printed.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from tqdm import tqdm

import fastseg

from . import cases, label_cases, memory, roofline, rows, table, timing
from .cases import Built
from .context import DTYPES, Context, Setting, SkippedCase, context, first_line
from .floors import Ceilings, Work, ceilings
from .gates import Gate, RedGate
from .machine import machine, pinned_threads
from .options import Options, parse
from .providers import PROVIDERS
from .rows import WHOLE, Row

Samples = Mapping[str, Sequence[float]]

_GPU_WARM_UP_SECONDS = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where a result was wrong or fastseg failed."""
    options = parse(sys.argv[1:] if argv is None else argv)
    with pinned_threads(options.threads, options.device):
        return run(options)


def run(options: Options) -> int:
    """Measure what `options` ask for, add the rows to their file, print the tables."""
    torch.set_grad_enabled(False)
    if options.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 is IEEE on all sides
    grid = _Grid(options)
    if options.list_providers:
        grid.list_providers()
        return 1 if grid.bad else 0
    for found in grid.measure():
        if options.output is not None:
            rows.append_rows(options.output, found)
        grid.measured += found
    if grid.measured:
        print(table.markdown(grid.measured))
    for line in grid.notes:
        print(line)
    return 1 if grid.bad else 0


class _Grid:
    """A run: what is known of the machine, what was measured, and what went wrong."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.measured: list[Row] = []
        self.notes: list[str] = []
        self.bad = False
        self._stop = time.monotonic() + 60 * options.minutes
        self._ceilings: dict[str, Ceilings] = {}
        self._facts = {
            **machine(options.device),
            "schema": rows.SCHEMA_VERSION,
            "threads": options.threads,
            "cache": options.cache if options.device.type == "cuda" else "warm",
            "commit": options.commit,
            "command": options.command,
        }
        self._done = set(self._rows_of_this_command()) if options.resume else set()

    def list_providers(self) -> None:
        """Which providers give the right logits of a B0 at 64x64 here, and why others do not."""
        setting = Setting("b0", (64, 64), 1, self.options.settings[0].dtype)
        reasons: dict[str, str] = {}
        with context(setting, self.options.device, 1) as where:
            built = cases.build(where, self.options.providers, reasons.__setitem__, self._say_bad)
        for name in PROVIDERS:
            if name in built:
                print(f"{name}: {built[name].version}")
            elif name not in self.options.providers:
                print(f"{name}: only where --providers names it")
            else:
                print(f"{name}: skipped, {reasons.get(name, 'it fails or is wrong')}")

    def measure(self) -> Iterator[list[Row]]:
        """The rows of one case after another."""
        kinds = self.options.kinds
        if "forward" in kinds or "end to end" in kinds:
            for setting in self.options.settings:
                yield from self._setting(setting)
        if "labels" in kinds:
            for size in self.options.label_sizes:
                for name in label_cases.LABEL_CASES:
                    yield from self._labels(name, size)
        if "memory" in kinds:
            for setting in self.options.memory_settings:
                yield from self._memory(setting)

    # Cases

    def _setting(self, setting: Setting) -> Iterator[list[Row]]:
        asked = [k for k in ("forward", "end to end") if k in self.options.kinds]
        wanted = [kind for kind in asked if self._wants(_what(kind, setting))]
        try:
            found = self._measure_setting(setting, wanted) if wanted else []
        except torch.OutOfMemoryError as error:
            self._say(f"{setting}: skipped, {first_line(error)}")
            found = []
        # Only now has the setting let go of its models.
        torch.compiler.reset()
        gc.collect()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()
        yield from found

    def _measure_setting(self, setting: Setting, wanted: Sequence[str]) -> list[list[Row]]:
        # First, while there is memory for large matrices.
        known = self._ceilings_of(setting.dtype)
        with context(setting, self.options.device, self.options.threads) as where:
            built = cases.build(where, self.options.providers, *self._tellers(str(setting)))
            if self.options.providers[0] not in built:
                self._say(f"{setting}: no figure without the baseline")
                return []
            found = []
            if "forward" in wanted:
                found.append(self._forward(setting, built, where, known))
            if "end to end" in wanted:
                found.append(self._end_to_end(setting, built, where))
        return found

    def _tellers(self, case: str) -> tuple[cases.Tell, cases.Tell]:
        """For a provider that is skipped, and for one that is wrong."""
        return (
            lambda name, reason: self._say(f"{case}: {name} skipped, {reason}"),
            lambda name, reason: self._say_bad(f"{case}: {name}", reason),
        )

    def _forward(
        self, setting: Setting, built: Mapping[str, Built], where: Context, known: Ceilings
    ) -> list[Row]:
        functions = {
            name: lambda one=one: one.forward(where.pixel_values) for name, one in built.items()
        }
        samples = self._samples(functions, str(setting))
        work, floor_ms = roofline.forward_floor(*setting, known)
        common = {**_what("forward", setting), **_floor(work, known, floor_ms)}
        own = {
            name: {
                **_parity(one.gate, one.error),
                "provider_version": one.version,
                "setup_s": one.setup_seconds,
                "peak_mb": one.peak_mb,
            }
            for name, one in built.items()
        }
        return self._rows({**common, "method": self._method()}, samples, own)

    def _end_to_end(
        self, setting: Setting, built: Mapping[str, Built], where: Context
    ) -> list[Row]:
        label = f"{setting}, images"
        found = cases.pipelines(where, built, *self._tellers(label))
        with torch.inference_mode():
            samples = timing.interleave_steps(
                found.steps, found.images, self.options.repeats, label, self._wait
            )
        own = {
            name: {**_parity(found.gate, error), "provider_version": built[name].version}
            for name, error in found.errors.items()
        }
        common = {**_what("end to end", setting), "cache": "warm"}  # no step flushes it
        # All parts of a case have the date of the first: newest rows stay together.
        parts = []
        for part in rows.PARTS:
            taken = {
                name: [sum(step) for step in zip(*steps.values(), strict=True)]
                if part == WHOLE
                else steps[part]
                for name, steps in samples.items()
            }
            parts += self._rows({**common, "part": part}, taken, own)
        return [{**row, "date": parts[0]["date"]} for row in parts]

    def _labels(self, name: str, size: tuple[int, int]) -> Iterator[list[Row]]:
        what = {"kind": "labels", "case": name, "size": list(size), "batch": 1, "dtype": "float32"}
        if not self._wants(what):
            return
        try:
            case = label_cases.labels_case(name, size, self.options.device)
        except SkippedCase as reason:
            self._say(f"labels, {name}: skipped, {reason}")
            return
        skip, bad = self._tellers(f"labels, {name}")
        errors = cases.check_labels(case.gate, case.providers, skip, bad)
        if next(iter(case.providers)) not in errors:
            return
        functions = {n: function for n, function in case.providers.items() if n in errors}
        samples = self._samples(functions, f"labels, {name}")
        versions = dict.fromkeys(case.providers, str(torch.__version__))
        versions["fastseg"] = fastseg.__version__
        own = {
            n: {**_parity(case.gate, error), "provider_version": versions[n]}
            for n, error in errors.items()
        }
        known = self._ceilings_of("float32")
        work, floor_ms = roofline.labels_floor(case.logits.shape[1], size, known)
        common = {**what, **_floor(work, known, floor_ms), "method": self._method()}
        yield self._rows(common, samples, own)

    def _memory(self, setting: Setting) -> Iterator[list[Row]]:
        what = _what("memory", setting)
        if not self._wants(what):
            return
        try:
            samples, errors, gate = memory.measure(
                setting.variant, setting.size, self.options.threads, self.options.repeats
            )
        except SkippedCase as reason:
            self._say(f"memory, {setting}: skipped, {reason}")
        except RedGate as reason:
            self._say_bad(f"memory, {setting}", f"parity gate is red: {reason}")
        else:
            own = {
                name: {**_parity(gate, errors[name]), "provider_version": PROVIDERS[name].version()}
                for name in samples
            }
            yield self._rows({**what, "unit": "MB"}, samples, own)

    # Rows

    def _rows(
        self, common: Row, samples: Samples, own: Mapping[str, Mapping[str, Any]]
    ) -> list[Row]:
        """One row for each provider; the first of them is the baseline."""
        baseline = next(iter(samples))
        common = {
            **rows.NOT_TAKEN,
            **self._facts,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "part": WHOLE,
            "unit": "ms",
            "method": "calls",
            "baseline": baseline,
            **common,
        }
        return [
            {
                **common,
                **own[provider],
                "provider": provider,
                "repeats": len(taken),
                **timing.quantiles(taken),
                **timing.ratios(samples[baseline], taken),
            }
            for provider, taken in samples.items()
        ]

    def _rows_of_this_command(self) -> Iterator[str]:
        output = self.options.output
        if output is None or not output.exists():
            return
        for row in rows.read_rows(output):
            if row["command"] == self.options.command:
                yield rows.case_key(row)

    def _wants(self, what: Row) -> bool:
        """Whether there is time for a case, and no row of it to resume from."""
        name = f"{what['kind']}, {what['case']}, {what['size'][0]}x{what['size'][1]}"
        if rows.case_key({**self._facts, **what}) in self._done:
            self._say(f"{name}, batch {what['batch']}, {what['dtype']}: measured before")
            return False
        if time.monotonic() >= self._stop:
            self._say(f"{name}, batch {what['batch']}, {what['dtype']}: not begun, the time is up")
            return False
        return True

    # The device

    def _samples(self, functions: Mapping[str, Callable[[], Any]], label: str) -> Samples:
        device, repeats = self.options.device, self.options.repeats
        with torch.inference_mode():
            if device.type == "cpu":
                return timing.interleave(functions, repeats, label)
            clock = timing.event_clock(device, self.options.cache == "cold")
            return timing.interleave(functions, repeats, label, clock, _GPU_WARM_UP_SECONDS)

    def _method(self) -> str:
        return "CUDA events" if self.options.device.type == "cuda" else "calls"

    def _wait(self) -> None:
        if self.options.device.type == "cuda":
            torch.cuda.synchronize(self.options.device)

    def _ceilings_of(self, dtype: str) -> Ceilings:
        if dtype not in self._ceilings:
            self._ceilings[dtype] = ceilings(self.options.device, DTYPES[dtype])
        return self._ceilings[dtype]

    # What is said

    def _say(self, message: str) -> None:
        """Now, and again after the tables."""
        self.notes.append(message)
        tqdm.write(message, file=sys.stderr)

    def _say_bad(self, name: str, reason: str) -> None:
        self.bad = True
        self._say(f"{name}: no figure, {reason}")


def _what(kind: str, setting: Setting) -> Row:
    return {
        "kind": kind,
        "case": setting.variant,
        "size": list(setting.size),
        "batch": setting.batch,
        "dtype": setting.dtype,
    }


def _floor(work: Work, known: Ceilings, floor_ms: float) -> Row:
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "flops_per_second": known.flops_per_second,
        "bytes_per_second": known.bytes_per_second,
        "floor_ms": floor_ms,
    }


def _parity(gate: Gate, error: float) -> Row:
    return {"parity": gate.measure, "parity_gate": gate.bound, "parity_error": error}

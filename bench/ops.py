"""`python -m bench.ops`: every op of a forward against its eager twin, compiled twin and floor.

For each variant, size, batch and dtype: a forward is recorded, then each kind of call is run by
each provider, checked against the twin in float64, and timed, A B A B. What fails its check gets no
figure, and the command ends with status 1. `count` is how often a forward makes a call, so sums
over rows give a forward.

Rows are added to bench/results/ops_gpu.jsonl or ops_cpu.jsonl, and tables of this run are printed.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from tqdm import tqdm

import fastseg

from . import op_cases, op_rows, timing
from .context import DTYPES, Setting, SkippedCase, first_line
from .floors import Ceilings, ceilings, work
from .gates import RedGate
from .machine import cpu_name, driver, pinned_threads, triton_version
from .op_cases import CountedCall
from .op_options import Options, parse
from .op_timing import Function, time_call
from .rows import Row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where a parity gate was red."""
    options = parse(sys.argv[1:] if argv is None else argv)
    with pinned_threads(options.threads, options.device):
        return run(options)


def run(options: Options) -> int:
    """Measure what `options` ask for, add the rows to their file, print the tables."""
    # float32 is IEEE on all sides; cuDNN's convolutions are not, left to themselves.
    if options.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    stop = time.monotonic() + 60 * options.minutes
    bench = _Bench(options, _facts(options))
    measured: list[Row] = []
    with torch.no_grad():
        for setting in options.settings:
            if time.monotonic() >= stop:
                bench.note(f"{setting}: not begun, the time is up")
                continue
            for found in bench.measure(setting, stop):
                if options.output is not None:
                    op_rows.append_rows(options.output, found)
                measured += found
    if measured:
        print(table(measured))
    for line in bench.notes:
        print(line)
    return 1 if bench.red else 0


class _Bench:
    """A run: what is known of the device, calls already measured, and what went wrong."""

    def __init__(self, options: Options, facts: Mapping[str, Any]) -> None:
        self.options = options
        self.facts = facts
        self.notes: list[str] = []
        self.red = False
        self._ceilings: dict[str, Ceilings] = {}
        self._measured: dict[str, list[Row]] = {}
        self._done = op_rows.calls_by_case(self._rows_of_this_command())

    def _rows_of_this_command(self) -> list[Row]:
        output = self.options.output
        if not self.options.resume or output is None or not output.exists():
            return []
        found = op_rows.read_rows(output)
        return [row for row in found if row["command"] == self.options.command]

    def note(self, message: str) -> None:
        """Say it now, once, and again after the tables."""
        if message not in self.notes:
            self.notes.append(message)
            tqdm.write(message, file=sys.stderr)

    def measure(self, setting: Setting, stop: float) -> Iterator[list[Row]]:
        """Rows of each kind of call that a forward makes."""
        dtype, device = DTYPES[setting.dtype], self.options.device
        try:
            model = op_cases.build_model(setting.variant, device, dtype)
            pixels = op_cases.build_pixels(setting.size, setting.batch, device, dtype)
            calls = op_cases.record(model, pixels)
        except torch.OutOfMemoryError as error:
            self.note(f"{setting}: skipped, {first_line(error)}")
            return
        del model, pixels
        if setting.dtype not in self._ceilings:
            self._ceilings[setting.dtype] = ceilings(device, dtype)
        for op, reason in op_cases.missing(calls).items():
            if op in self.options.ops:
                self.note(f"{setting}, {op}: skipped, {reason}")
        kinds = Counter((call.op, call.stage) for call in calls)
        for call in calls:
            if call.op not in self.options.ops:
                continue
            case = (*setting, call.op, call.stage)
            if self._done[case] == kinds[call.op, call.stage]:
                self.note(f"{setting}, {call.op} ({call.stage}): measured before")
                continue
            name = f"{setting}, {call.op} ({call.stage})"
            if time.monotonic() >= stop:
                self.note(f"{name}: not begun, the time is up")
                continue
            # Variants share kinds of calls, and the time of most does not depend on values.
            key = call.key() + (setting.variant if call.op == "upsample_argmax" else "")
            if key not in self._measured:
                self._measured[key] = self._measure_call(call, name, self._ceilings[setting.dtype])
            elif not self._measured[key]:
                self.note(f"{name}: no figure, as for the same call of another variant")
            where = {
                "variant": setting.variant,
                "stage": call.stage,
                "size": list(setting.size),
                "batch": setting.batch,
                "dtype": setting.dtype,
                "count": call.count,
            }
            yield [{**row, **where} for row in self._measured[key]]

    def _measure_call(self, call: CountedCall, name: str, known: Ceilings) -> list[Row]:
        functions, checked, output = self._verified(call, name)
        if output is None:
            return []
        least = work(call, output)
        common = {
            **self.facts,
            "schema": op_rows.SCHEMA_VERSION,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "op": call.op,
            "shape": list(output.shape),
            "baseline": op_rows.PROVIDERS[0],
            "unit": "us",
            **least._asdict(),
            "bytes_per_second": known.bytes_per_second,
            "flops_per_second": known.flops_per_second,
            "ceilings": known.source,
            "floor_us": known.floor_microseconds(least),
        }
        del output
        found: list[Row] = []
        for cache in op_rows.CACHES if call.device.type == "cuda" else op_rows.CACHES[:1]:
            figures, failed = time_call(call, functions, cache, self.options.repeats, name)
            for provider, reason in failed.items():
                self.note(f"{name}, {cache}: {provider} skipped, {reason}")
            baseline = figures.get(op_rows.PROVIDERS[0])
            if baseline is None:
                self.note(f"{name}, {cache}: no figure without the baseline")
                continue
            for provider, (samples, number) in figures.items():
                row = {
                    **common,
                    **checked[provider],
                    "provider": provider,
                    "cache": cache,
                    "calls": number,
                    "repeats": len(samples),
                    **timing.quantiles(samples),
                    **timing.ratios(baseline.microseconds, samples),
                }
                found.append({**row, "share": row["floor_us"] / row["p50"]})
        return found

    def _verified(
        self, call: CountedCall, name: str
    ) -> tuple[dict[str, Function], dict[str, dict[str, Any]], torch.Tensor | None]:
        """The providers with the right result, their parity fields, and the eager twin's result."""
        functions: dict[str, Function] = {}
        checked: dict[str, dict[str, Any]] = {}
        output = gate = None
        for provider in self.options.providers:
            try:
                function = op_cases.provider(provider, call)
                result = call.bind(function)()
                if gate is None:  # the eager twin comes first
                    output, gate = result, op_cases.gate(call, result)
                error = gate.check(provider, result)
            except SkippedCase as reason:
                self.note(f"{provider}: skipped, {reason}")
            except RedGate as reason:
                self.red = True
                self.note(f"{name}: no figure, parity gate is red: {reason}")
            except Exception as reason:  # of any compiler or driver
                # Of others it is a limit; of the kernels a defect.
                self.red |= provider == op_rows.PROVIDERS[-1]
                self.note(f"{name}: {provider} failed, {first_line(reason)}")
            else:
                functions[provider] = function
                checked[provider] = {
                    "parity": gate.measure,
                    "parity_error": error,
                    "parity_gate": gate.bound,
                }
            if not functions:
                return functions, checked, None  # nothing to compare with
        return functions, checked, output


def table(rows: Sequence[Row]) -> str:
    """A table for each setting: a line for each call, and sums over a forward."""
    tables = []
    setting = ("variant", "size", "batch", "dtype", "cache")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str([row[name] for name in setting]), []).append(row)
    for group in groups.values():
        first = group[0]
        known = Setting(first["variant"], tuple(first["size"]), first["batch"], first["dtype"])
        ceiling = (
            f"{first['bytes_per_second'] / 1e12:.3g} TB/s, "
            f"{first['flops_per_second'] / 1e12:.3g} TFLOP/s ({first['ceilings']})"
        )
        title = f"{known}, {first['cache']}, us by {first['method']}; floors by {ceiling}"
        tables.append(f"{title}\n{_lines(group)}")
    last = rows[-1]
    return "\n\n".join(tables) + (
        f"\n\n{last['device']}; torch {last['torch']}, triton {last['triton'] or 'none'}, fastseg "
        f"{last['fastseg']} at {last['commit']}"
    )


def _lines(rows: Sequence[Row]) -> str:
    names = [name for name in op_rows.PROVIDERS if any(row["provider"] == name for row in rows)]
    subject = names[-1]
    calls: dict[tuple[str, str, int, int], dict[str, Row]] = {}
    for row in rows:
        # Calls of an op in a stage may differ: the last Mix-FFN normalises its result.
        what = (row["op"], row["stage"], row["bytes"], row["flops"])
        calls.setdefault(what, {})[row["provider"]] = row
    compared = f"{names[0]} / {subject}"
    head = ["op", "stage", "count", "floor", *names, compared, f"floor / {subject}"]
    cells = [head]
    sums: dict[str, float] = dict.fromkeys(("floor", *names), 0.0)
    for (op, stage, *_), found in calls.items():
        first = next(iter(found.values()))
        count, floor = first["count"], first["floor_us"]
        times = {name: found[name]["p50"] if name in found else math.nan for name in names}
        cells.append([op, stage, str(count), *_figures(floor, times, subject)])
        for name, taken in (("floor", floor), *times.items()):
            sums[name] += count * taken
    floor = sums.pop("floor")
    counted = sum(next(iter(found.values()))["count"] for found in calls.values())
    cells.append(["sum", "", str(counted), *_figures(floor, sums, subject)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _figures(floor: float, times: Mapping[str, float], subject: str) -> list[str]:
    """Cells; a sum that lacks a call is not a number, and a dash."""
    baseline, taken = next(iter(times.values())), times[subject]
    ratio, share = f"{baseline / taken:.2f}x", f"{100 * floor / taken:.0f}%"
    cells = [f"{floor:.1f}", *(f"{time:.1f}" for time in times.values()), ratio, share]
    return ["-" if "nan" in cell else cell for cell in cells]


def _facts(options: Options) -> dict[str, Any]:
    """What rows say of where their figures come from."""
    on_gpu = options.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(options.device) if on_gpu else cpu_name(),
        "driver": driver() if on_gpu else "",
        "cuda": (torch.version.cuda or torch.version.hip or "") if on_gpu else "",
        "method": "CUDA graphs" if on_gpu else "calls",
        "cpu": cpu_name(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "fastseg": fastseg.__version__,
        "commit": options.commit,
        "command": options.command,
    }


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.models`: fastseg against transformers on this machine's CPU.

Forward of every variant, upsample + argmax, and peak memory. Parity is checked first: what fails it
gets no figure, and the command ends with status 1. Rows are added to bench/results/cpu.jsonl, and
the table of this run is printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial

import torch
import transformers
from tqdm import tqdm

from . import cases, memory, rows, table, timing
from .gates import Gate, RedGate
from .machine import machine
from .options import RESULTS, Options, parse

SIZE = (512, 512)
MEMORY_SIZE = (1024, 2048)
MEMORY_VARIANT = "b0"

Measure = Callable[[], list[rows.Row]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where a parity gate was red."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.table is not None:
        print(table.markdown(rows.read_rows(options.table)))
        return 0
    if options.readme is not None:
        table.rewrite(options.readme, table.markdown(rows.read_rows(options.output or RESULTS)))
        return 0
    return run(options)


def run(options: Options) -> int:
    """Measure what `options` ask for, add the rows to their file, print the table."""
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    _warn_of_load(options.threads)
    measured: list[rows.Row] = []
    red: list[str] = []
    for name, measure in _measures(options):
        try:
            found = measure()
        except cases.SkippedCase as reason:
            _say(f"{name}: skipped, {reason}")
        except RedGate as reason:
            red.append(f"{name}: no figure, parity gate is red: {reason}")
            _say(red[-1])
        else:
            if options.output is not None:
                rows.append_rows(options.output, found)
            measured += found
    if measured:
        print(table.markdown(measured))
    for line in red:
        print(line)
    return 1 if red else 0


def _measures(options: Options) -> Iterator[tuple[str, Measure]]:
    """What to measure, one case at a time, each with a name for messages."""
    facts = {**machine(), "threads": options.threads, "command": options.command}
    size = options.size or SIZE
    if options.only in (None, "models"):
        for variant in options.models:
            build = partial(cases.forward_case, variant, size)
            yield f"forward {variant}", partial(_time, build, size, options, facts)
    if options.only in (None, "labels"):
        for case in cases.LABEL_CASES:
            build = partial(cases.labels_case, case, size)
            yield f"labels, {case}", partial(_time, build, size, options, facts)
    if options.only in (None, "memory"):
        yield "memory", partial(_memory, options.size or MEMORY_SIZE, options, facts)


def _time(
    build: Callable[[], cases.Case],
    size: tuple[int, int],
    options: Options,
    facts: Mapping[str, object],
) -> list[rows.Row]:
    case = build()
    with torch.inference_mode():
        errors = {
            provider: case.gate.check(provider, function())
            for provider, function in case.providers.items()
        }
        label = f"{case.kind} {case.name}"
        samples = timing.interleave(case.providers, options.repeats, label)
    what = {"kind": case.kind, "case": case.name, "size": list(size), "unit": "ms"}
    return _rows(samples, errors, case.gate, {**facts, **what})


def _memory(size: tuple[int, int], options: Options, facts: Mapping[str, object]) -> list[rows.Row]:
    repeats = min(options.repeats, memory.MAX_REPEATS)
    samples, errors, gate = memory.measure(MEMORY_VARIANT, size, options.threads, repeats)
    what = {"kind": "memory", "case": MEMORY_VARIANT, "size": list(size), "unit": "MB"}
    return _rows(samples, errors, gate, {**facts, **what})


def _rows(
    samples: Mapping[str, list[float]],
    errors: Mapping[str, float],
    gate: Gate,
    facts: Mapping[str, object],
) -> list[rows.Row]:
    """One row for each provider; the first of them is the baseline."""
    baseline = next(iter(samples))
    common = {
        **facts,
        "schema": rows.SCHEMA_VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "batch": 1,
        "dtype": "float32",
        "baseline": baseline,
        "parity": gate.measure,
        "parity_gate": gate.bound,
    }
    return [
        {
            **common,
            "provider": provider,
            "repeats": len(taken),
            "parity_error": errors[provider],
            **timing.quantiles(taken),
            **timing.ratios(samples[baseline], taken),
        }
        for provider, taken in samples.items()
    ]


def _warn_of_load(threads: int) -> None:
    """Say so where other programs already take the cores that the run needs."""
    if not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load + threads > cores + 0.5:
        _say(f"load average {load:.1f} on {cores} cores before the run: expect noisy figures")


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

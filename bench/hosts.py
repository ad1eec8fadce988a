"""`python -m bench.hosts`: models of other libraries before and after `fastseg.accelerate`.

Eager and under torch.compile, on this machine's CPU. Parity is checked first: what fails it gets no
figure, and the command ends with status 1. Rows are added to bench/results/hosts.jsonl, and the
table of this run is printed. Each host runs in a process of its own, which this one starts with
the folder of that library first on PYTHONPATH; `make test` installs them.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fastseg
from fastseg.folding.swap import Accelerated

from . import host_rows, host_table, pairs, table, timing
from .gates import Gate, RedGate, logits_gate
from .host_models import HOSTS, logits_of
from .host_options import RESULTS, Options, parse
from .machine import ROOT, commit, cpu_name, pinned_threads
from .rows import Row

Provider = Callable[[], torch.Tensor]

_RED = 1
_CRASHED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where a parity gate was red, 2 where a host failed."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.table is not None:
        print(host_table.markdown(host_rows.read_rows(options.table)))
        return 0
    if options.readme is not None:
        rows = host_rows.read_rows(options.output or RESULTS)
        table.rewrite(options.readme, host_table.markdown(rows), host_table.NAME)
        return 0
    if options.process is not None:
        with pinned_threads(options.threads, torch.device("cpu")):
            return measure_host(options.process, options)
    return run(options)


def run(options: Options) -> int:
    """Start a process for each host, add their rows to the file, print the table."""
    measured: list[Row] = []
    status = 0
    for host in options.hosts:
        code, found = _process(host, options)
        status = max(status, code)
        if options.output is not None:
            host_rows.append_rows(options.output, found)
        measured += found
    if measured:
        print(host_table.markdown(measured))
    return status


def _process(host: str, options: Options) -> tuple[int, list[Row]]:
    """Status and rows of `host`, from a process that has its library."""
    folder = HOSTS[host].path
    if folder is not None and not folder.is_dir():
        _say(f"{host}: not measured, there is no {folder}: `make test` installs it")
        return _CRASHED, []
    known = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(str(part) for part in (folder, known) if part)
    done = subprocess.run(
        [sys.executable, "-m", "bench.hosts", *options.arguments, "--process", host],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    rows = [json.loads(text) for text in done.stdout.splitlines()]
    if done.returncode not in (0, _RED):
        _say(f"{host}: its process failed with status {done.returncode}")
        return _CRASHED, rows
    return done.returncode, rows


def measure_host(host: str, options: Options) -> int:
    """Measure `host` in this process, and print its rows, one JSON object a line."""
    status = 0
    for variant in options.variants:
        for mode in options.modes:
            try:
                found = _measure(host, variant, mode, options)
            except RedGate as reason:
                _say(f"{host}, {variant}, {mode}: no figure, parity gate is red: {reason}")
                status = _RED
            else:
                for row in found:
                    print(json.dumps(row), flush=True)
    return status


def _measure(host: str, variant: str, mode: str, options: Options) -> list[Row]:
    pixel_values = pairs.draw_pixels(options.size)
    plain = HOSTS[host].build(variant).requires_grad_(False)
    accelerated = fastseg.accelerate(copy.deepcopy(plain))
    models = {"host": plain, "accelerated": accelerated}
    own = HOSTS[host].own
    if own is not None:
        models["own"] = own(plain).requires_grad_(False)
    with torch.inference_mode():
        wide = copy.deepcopy(plain).double()
        gate = logits_gate(logits_of(wide, pixel_values.double()).clone())
        del wide
        providers = {name: _provider(model, mode, pixel_values) for name, model in models.items()}
        errors = {name: gate.check(name, run()) for name, run in providers.items()}
        timed: dict[str, Callable[[], Any]] = dict(providers)
        if mode == "eager":  # in a graph it is an operator among others
            timed["check"] = freshness_check(accelerated)
            errors["check"] = errors["accelerated"]
        label = f"{host}, {variant}, {mode}"
        samples = timing.interleave(timed, options.repeats, label)
    facts = {
        "host": host,
        "host_version": HOSTS[host].version(),
        "mode": mode,
        "variant": variant,
        "size": list(options.size),
        "threads": options.threads,
        "command": options.command,
    }
    return _rows(samples, errors, gate, facts)


def _provider(model: Any, mode: str, pixel_values: torch.Tensor) -> Provider:
    """A forward of `model`, whose weights are frozen, as one does to serve it."""
    logits_of(model, pixel_values)  # folds, before a graph takes the folded weights
    if mode == "compiled":
        model = torch.compile(model, dynamic=False)
    return lambda: logits_of(model, pixel_values)


def freshness_check(model: nn.Module) -> Callable[[], list[str | None]]:
    """What all accelerated modules in `model` do before they run on folded weights.

    Each call answers with their reasons to take the host's own forward: None, all of them.
    """
    modules = [module for module in model.modules() if isinstance(module, Accelerated)]
    return lambda: [module.fastseg_reason() for module in modules]


def _rows(
    samples: Mapping[str, list[float]],
    errors: Mapping[str, float],
    gate: Gate,
    facts: Mapping[str, Any],
) -> list[Row]:
    """One row for each provider; the first of them is the baseline."""
    baseline = next(iter(samples))
    common = {
        **facts,
        "schema": host_rows.SCHEMA_VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "batch": 1,
        "dtype": "float32",
        "baseline": baseline,
        "unit": "ms",
        "parity": gate.measure,
        "parity_gate": gate.bound,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastseg": fastseg.__version__,
        "commit": commit(),
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


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

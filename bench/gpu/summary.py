"""What the stages of `bench gpu` found, on one screen, from what they wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .stages import KERNELS, PARITY, ROWS, TESTS, TUNED_ROWS, read_lines, read_records

_RED, _KERNELS = 8, 8  # so many are shown
_PROVIDERS = (
    *("transformers eager", "transformers CUDA graph", "transformers reduce-overhead"),
    *("fastseg accelerate", "fastseg Triton", "fastseg CUDA graph"),
)


def summary(out: Path, names: Sequence[str]) -> str:
    """A table of the stages `names`, what is wrong, kernels and forwards, from the folder `out`."""
    records = read_records(out)
    lines = ["| stage | status | seconds | found |", "|---|---|---:|---|"]
    for name in names:
        record = records.get(name)
        if record is None:
            lines.append(f"| {name} | not begun | | |")
            continue
        found = _found(out, name) if record["status"] != "skipped" else ""
        cell = "; ".join(filter(None, [found, record["reason"]])).replace("|", "\\|")[:160]
        lines.append(f"| {name} | {record['status']} | {record['seconds']:.0f} | {cell} |")
    tests = [one for log in (PARITY, TESTS) for one in read_lines(out / log)]
    red = [f"- {one['test']}: {one['message']}" for one in tests if one["outcome"] == "failed"]
    if red:
        more = [f"- and {len(red) - _RED} more"] * (len(red) > _RED)
        lines += ["", f"Red, {len(red)}:", "", *red[:_RED], *more]
    return "\n".join([*lines, "", *_kernels(out), *_forwards(out), *_steps(out)]) + "\n"


def _kernels(out: Path) -> list[str]:
    """Of each forward the GPU's time, and the kernels that take most of it in all forwards."""
    lines = read_lines(out / KERNELS)
    wholes = [one for one in lines if not one["kernel"]]
    totals: Counter[str] = Counter()
    for one in lines:
        totals[one["kernel"]] += one["us"] * one["count"] * bool(one["kernel"])
    everything = sum(totals.values())
    each = [f"{one['case']}: {one['us']:.0f} us, in kernels {one['busy_us']:.0f}" for one in wholes]
    most = [f"{name} {us / everything:.0%}" for name, us in totals.most_common(_KERNELS)]
    return ["Replays back to back:", "", *(f"- {one}" for one in each), "",
            "Most time: " + ", ".join(most), ""] if wholes else []  # fmt: skip


def _forwards(out: Path) -> list[str]:
    """Medians of forwards in ms; the last column has the tuner's configurations."""
    cells: dict[str, dict[str, str]] = {}
    for file, mark in ((ROWS, ""), (TUNED_ROWS, " tuned")):
        for row in read_lines(out / file):
            height, width = row["size"]
            case = f"{row['case']}, {height}x{width}, batch {row['batch']}, {row['dtype']}"
            if row["kind"] == "forward" and (row["provider"] == _PROVIDERS[-1] or not mark):
                cells.setdefault(case, {})[row["provider"] + mark] = f"{row['p50']:.3g}"
    columns = [*_PROVIDERS, f"{_PROVIDERS[-1]} tuned"]
    lines = [f"| forward, ms | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for case, by_provider in cells.items():
        lines.append(f"| {case} | {' | '.join(by_provider.get(one, '') for one in columns)} |")
    return lines if cells else []


def _steps(out: Path) -> list[str]:
    """Medians of training steps, and their memory."""
    found = [row for row in read_lines(out / ROWS) if row["kind"] == "training"]
    lines = [
        f"- {row['case']}, batch {row['batch']}, {row['dtype']}, {row['provider']}: "
        f"{row['p50']:.3g} ms, {row['peak_mb']:.0f} MB"
        for row in found
    ]
    return ["", "Training steps:", "", *lines] if found else []


def _found(out: Path, name: str) -> str:
    """What a stage found, in a few words."""
    if name in ("parity", "tests"):
        outcomes = Counter(one["outcome"] for one in read_lines(out / f"{name}.jsonl"))
        return ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
    files = {"models": ROWS, "peers": ROWS, "models-tuned": TUNED_ROWS, "kernels": KERNELS}
    files["training"] = ROWS
    if name in files:
        return f"{len(read_lines(out / files[name]))} lines in {files[name]} so far"
    log = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    return (log.strip().splitlines() or [""])[-1]

"""What the stages of `bench.gpu` found: a table and the best figures, read from what they wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu_stages import OP_ROWS, PLOTS, ROWS, SANITIZER, SETUP, TESTS, TUNED, TUNED_ROWS

Record = Mapping[str, Any]
_FAILURES_SHOWN = 20


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, without lines cut short; none where it is absent."""
    found = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:  # cut short by a crash
                continue
            if isinstance(value, dict):
                found.append(value)
    return found


def summary(out: Path, names: Sequence[str], records: Mapping[str, Record]) -> str:
    """A table of the stages, tests that failed, and the best figures.

    Args:
        out: the folder of results.
        names: of the stages, in their order.
        records: the last of each stage that was begun or skipped.
    """
    lines = ["| stage | status | seconds | found |", "|---|---|---:|---|"]
    for name in names:
        record = records.get(name)
        if record is None:
            lines.append(f"| {name} | not begun | | |")
            continue
        said = [_found(out, name, record), record["reason"]]
        cell = "; ".join(filter(None, said)).replace("|", "\\|")
        lines.append(f"| {name} | {record['status']} | {record['seconds']:.0f} | {cell} |")
    failures = _test_failures(out)
    if failures:
        lines += ["", "Tests that failed:", ""]
        lines += [f"- {failure}" for failure in failures[:_FAILURES_SHOWN]]
        if len(failures) > _FAILURES_SHOWN:
            lines.append(f"- and {len(failures) - _FAILURES_SHOWN} more")
    for title, file in (("Figures", ROWS), ("With the tuner's configurations", TUNED_ROWS)):
        best = best_figures(read_lines(out / file))
        if best:
            lines += ["", f"{title} ({file}):", "", *best]
    return "\n".join(lines) + "\n"


def best_figures(rows: Sequence[Record]) -> list[str]:
    """A table: of each case the quickest of fastseg and the quickest of the others."""
    cases: dict[str, dict[str, Record]] = {}
    for row in rows:
        if row.get("part", "whole") == "whole" and row.get("unit") == "ms":
            case = [row.get(name) for name in ("kind", "case", "size", "batch", "dtype", "cache")]
            found = cases.setdefault(json.dumps(case), {})
            if any(other["date"] != row["date"] for other in found.values()):
                found.clear()  # a later run counts, as a whole
            found[row["provider"]] = row
    lines = []
    for found in cases.values():
        ours = _quickest(row for name, row in found.items() if name.startswith("fastseg"))
        theirs = _quickest(row for name, row in found.items() if not name.startswith("fastseg"))
        if ours is None:
            continue
        height, width = ours["size"]
        cells = [
            f"{ours['kind']}, {ours['case']}, {height}x{width}, batch {ours['batch']}, "
            f"{ours['dtype']}, {ours['cache']}",
            _time(ours),
            "" if theirs is None else _time(theirs),
            "" if theirs is None else f"{theirs['p50'] / ours['p50']:.2f}x",
            f"{ours['floor_ms'] / ours['p50']:.0%}" if ours.get("floor_ms") else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    head = "| case | fastseg, ms | the best of the others, ms | ratio | share of the floor |"
    return [head, "|---|---|---|---:|---:|", *lines]


def _time(row: Record) -> str:
    return f"{row['p50']:.3f} ({row['p20']:.3f} to {row['p80']:.3f}), {row['provider']}"


def _quickest(rows: Any) -> Record | None:
    return min(rows, key=lambda row: row["p50"], default=None)


def _found(out: Path, name: str, record: Record) -> str:
    """What a stage found, in a few words."""
    return _FOUND[name](out) if name in _FOUND and record["status"] != "skipped" else ""


def _setup(out: Path) -> str:
    try:
        found = json.loads((out / SETUP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    modules = found.get("modules", {})
    said = [f"{name} {modules.get(name)}" for name in ("torch", "triton", "transformers")]
    cuda, smi = found.get("cuda"), found.get("nvidia_smi")
    if cuda:
        said.insert(0, f"{cuda['name']}, capability {cuda['capability']}")
    if smi:
        said.insert(1, f"driver {smi['driver_version']}")
    absent = [module for module, version in modules.items() if version is None]
    if absent:
        said.append(f"not installed: {', '.join(absent)}")
    return "; ".join([", ".join(said), *(found.get("failures") or [])])


def _tests(out: Path) -> str:
    files = _test_files(out)
    count = {
        what: sum(file[what] for file in files.values()) for what in ("passed", "failed", "skipped")
    }
    said = [", ".join(f"{number} {what}" for what, number in count.items())]
    said += [
        f"{name}: {file['reason']}"
        for name, file in files.items()
        if file["status"] != "ok" and not file["failed"]
    ]
    lost = out / "lost_gpu.log"
    if lost.is_file():
        said.append(f"the GPU was lost: {lost.name}")
    return f"{len(files)} files: " + "; ".join(said)


def _test_files(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["file"]: entry for entry in read_lines(out / TESTS)}


def _test_failures(out: Path) -> list[str]:
    return [
        f"{name}: {failure}"
        for name, file in _test_files(out).items()
        for failure in file["failures"]
    ]


def _sanitizer(out: Path) -> str:
    tools = {entry["tool"]: entry for entry in read_lines(out / SANITIZER)}
    return "; ".join(f"{tool}: {entry['found']}" for tool, entry in tools.items())


def _ops(out: Path) -> str:
    rows = read_lines(out / OP_ROWS)
    said = [f"{len(rows)} rows"]
    for cache in ("warm", "cold"):
        kernels = [r for r in rows if r["provider"] == "kernels" and r["cache"] == cache]
        if kernels:
            ratio = statistics.geometric_mean(row["ratio"] for row in kernels)
            share = statistics.median(row["share"] for row in kernels)
            said.append(f"kernels, {cache}: {ratio:.2f}x of eager, {share:.0%} of the floor")
    return "; ".join(said)


def _tune(out: Path) -> str:
    try:
        kernels = json.loads((out / TUNED).read_text(encoding="utf-8"))["kernels"]
    except (OSError, ValueError, KeyError):
        return "no configurations"
    measured = [row for rows in kernels.values() for row in rows if "microseconds" in row]
    if not measured:
        return "no configurations"
    gain = statistics.geometric_mean(r["before_microseconds"] / r["microseconds"] for r in measured)
    return f"{len(measured)} configurations, {gain:.2f}x as fast as before"


def _rows(file: str) -> Callable[[Path], str]:
    def found(out: Path) -> str:
        rows = read_lines(out / file)
        cases = {json.dumps([row.get("kind"), row.get("case"), row.get("size")]) for row in rows}
        return f"{len(rows)} rows of {len(cases)} cases in {file} so far"

    return found


def _plots(out: Path) -> str:
    pictures = [path for path in (out / PLOTS).rglob("*") if path.suffix in (".png", ".svg")]
    return f"{len(pictures)} pictures"


_FOUND: dict[str, Callable[[Path], str]] = {
    "setup": _setup,
    "smoke": _tests,
    "tests": _tests,
    "sanitizer": _sanitizer,
    "ops": _ops,
    "tune": _tune,
    "models": _rows(ROWS),
    "peers": _rows(ROWS),
    "autotune": _rows(ROWS),
    "large": _rows(ROWS),
    "models-tuned": _rows(TUNED_ROWS),
    "plots": _plots,
}

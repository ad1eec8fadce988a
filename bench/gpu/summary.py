"""What the stages of `bench gpu` found: a table, failed tests and figures, from what they wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .stages import OP_ROWS, ROWS, TESTS, TUNED_ROWS, read_lines, read_records


def summary(out: Path, names: Sequence[str]) -> str:
    """A table of the stages `names`, tests that failed, and forwards, from the folder `out`."""
    records = read_records(out)
    lines = ["| stage | status | seconds | found |", "|---|---|---:|---|"]
    for name in names:
        record = records.get(name)
        if record is None:
            lines.append(f"| {name} | not begun | | |")
            continue
        found = _found(out, name) if record["status"] != "skipped" else ""
        cell = "; ".join(filter(None, [found, record["reason"]])).replace("|", "\\|")
        lines.append(f"| {name} | {record['status']} | {record['seconds']:.0f} | {cell} |")
    failures = [one for one in read_lines(out / TESTS) if one["outcome"] == "failed"]
    if failures:
        lines += ["", f"Tests that failed, {len(failures)}:", ""]
        lines += [f"- {one['test']}: {one['message']}" for one in failures[:20]]
    return "\n".join([*lines, "", *_figures(out)]) + "\n"


def _figures(out: Path) -> list[str]:
    """Tables of forwards, as found and with the tuner's configurations."""
    files = [out / name for name in (ROWS, TUNED_ROWS) if (out / name).is_file()]
    try:
        from ..report.tables import forward
        from ..rows import read_rows

        return [f"{path.name}:\n\n{forward(read_rows(path))}\n" for path in files]
    except Exception as error:  # of a broken torch, say: the table of stages is there all the same
        return [f"No figures: {error}."]


def _found(out: Path, name: str) -> str:
    """What a stage found, in a few words."""
    if name in ("smoke", "tests"):
        outcomes = Counter(one["outcome"] for one in read_lines(out / TESTS))
        return ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
    if name in ("setup", "tune", "memcheck", "racecheck", "plots"):
        log = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return (log.strip().splitlines() or [""])[-1][:400]
    file = {"ops": OP_ROWS, "models-tuned": TUNED_ROWS}.get(name, ROWS)
    return f"{len(read_lines(out / file))} rows in {file} so far"

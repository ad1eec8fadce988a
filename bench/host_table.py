"""The markdown table of hosts before and after `fastseg.accelerate`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from .host_rows import newest
from .rows import Row
from .table_cells import figures, line, setting_of, size_of

NAME = "hosts"  # of the markers around it

Case = Mapping[str, Row]

_COLUMNS = ("model", "", "as it is", "accelerated", "gain", "fastseg's own")


def markdown(rows: Sequence[Row]) -> str:
    """One table of the newest rows and a line on how they were measured; "" without rows."""
    cases = sorted(newest(rows), key=_position)
    if not cases:
        return ""
    lines = [line(*_COLUMNS), "|---|---|---:|---:|---:|---:|"]
    groups: dict[tuple[str, str, str], list[Case]] = {}
    for case in cases:
        row = case["host"]
        groups.setdefault((_host(row), row["mode"], size_of(row)), []).append(case)
    for (host, mode, size), found in groups.items():
        lines += [_case_line(case) for case in found]
        if len(found) > 1:
            mean = statistics.geometric_mean(_gain(case) for case in found)
            title = f"{host}, geometric mean of these {len(found)}, {size}"
            lines.append(line(title, mode, "", "", f"**{mean:.2f}x**", ""))
    notes = [note for note in map(_check_note, cases) if note]
    caption = "Medians (p20 to p80) of interleaved runs in one process for each model; "
    caption += "parity checked first. " + setting_of([r for case in cases for r in case.values()])
    return "\n".join([*lines, "", " ".join([caption, *notes])])


def _position(case: Case) -> tuple[str, int, str]:
    row = case["host"]
    # Newer releases first, as most people have them.
    order = ["transformers 5", "transformers 4"]
    rank = order.index(row["host"]) if row["host"] in order else len(order)
    return f"{rank}{row['host']}", row["mode"] == "compiled", row["variant"]


def _host(row: Row) -> str:
    if not row["host_version"]:
        return row["host"]
    return f"{row['host'].rstrip('45').strip()} {row['host_version']}"


def _case_line(case: Case) -> str:
    host, own = case["host"], case.get("own")
    return line(
        f"{_host(host)}, {host['variant'].upper()}, {size_of(host)}",
        host["mode"],
        figures(host),
        figures(case["accelerated"]),
        f"{_gain(case):.2f}x",
        "" if own is None else figures(own),
    )


def _gain(case: Case) -> float:
    return case["host"]["p50"] / case["accelerated"]["p50"]


def _check_note(case: Case) -> str:
    """What the check of the weights costs of a forward of B0, the shortest."""
    check, whole = case.get("check"), case["accelerated"]
    if check is None or whole["variant"] != "b0":
        return ""
    share = 100 * check["p50"] / whole["p50"]
    return (
        f"The check that weights are fresh takes {1000 * check['p50']:.0f} us, {share:.1f}%, of "
        f"{_host(whole)} B0."
    )

"""What tables and plots show of the rows: the newest run of each case, on one machine a setting.

Rows are only ever added, so a file may hold several machines. Of CPUs the one that was measured
last is shown; every GPU is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .rows import WHOLE, Row, newest

BASELINE = "transformers eager"
OURS = "fastseg"

# In the order of tables and plots.
PROVIDERS = (
    BASELINE,
    "transformers compiled",
    "transformers max-autotune",
    "transformers CUDA graph",
    "smp",
    "torch-tensorrt",
    "ONNX Runtime",
    "OpenVINO fp32",
    "OpenVINO default",
    "fastseg eager",
    "fastseg accelerate",
    "fastseg compiled",
    "fastseg Triton",
    "fastseg CUDA graph",
    "fastseg ONNX Runtime",
    "fastseg OpenVINO fp32",
    "fastseg OpenVINO default",
)
# A provider whose gate is so much wider than the baseline's computes in a lower precision.
_WIDER_GATE = 2.0

Case = dict[str, Row]  # by provider, the rows of one run of one case


class RowGroup(NamedTuple):
    """What rows that may be read side by side have in common."""

    device: str
    threads: int
    size: tuple[int, int]  # height, width
    batch: int
    dtype: str
    cache: str

    def __str__(self) -> str:
        height, width = self.size
        said = f"{height}x{width}, batch {self.batch}, {self.dtype}"
        return said if self.cache == "warm" else f"{said}, {self.cache} cache"


def group_of(row: Row) -> RowGroup:
    """The group of one row."""
    height, width = row["size"]
    return RowGroup(
        row["device"], row["threads"], (height, width), row["batch"], row["dtype"], row["cache"]
    )


def on_cpu(row: Row) -> bool:
    """Whether the device of `row` is a CPU."""
    return bool(row["device"] == row["cpu"])


def newest_cases(
    rows: Iterable[Row], kind: str, part: str = WHOLE
) -> dict[RowGroup, dict[str, Case]]:
    """The newest runs of `kind` by setting and by case, in order of size, batch, dtype and case.

    A case is what rows call so: "b0", or the name of the logits.
    """
    of_kind = [row for row in rows if row["kind"] == kind]
    found: dict[RowGroup, dict[str, Case]] = {}
    for group in newest(_of_last_cpu(of_kind)):
        case = {row["provider"]: row for row in group if row["part"] == part}
        if case:
            found.setdefault(group_of(group[0]), {})[group[0]["case"]] = case
    return {setting: dict(sorted(found[setting].items())) for setting in sorted(found, key=_rank)}


def _rank(setting: RowGroup) -> tuple[str, str, int, int, int, bool]:
    height, width = setting.size
    # float32 before bfloat16 and float16.
    precision = setting.dtype.replace("float32", "")
    cold = setting.cache != "warm"
    return setting.device, precision, height * width, setting.batch, setting.threads, cold


def _of_last_cpu(rows: Sequence[Row]) -> list[Row]:
    """`rows` without those of CPUs, or of numbers of threads, other than the last one measured."""
    machines = [(row["date"], row["device"], row["threads"]) for row in rows if on_cpu(row)]
    last = max(machines)[1:] if machines else None
    return [row for row in rows if not on_cpu(row) or (row["device"], row["threads"]) == last]


def providers(cases: Iterable[Mapping[str, Row]]) -> list[str]:
    """All providers of `cases` in order; those that PROVIDERS does not know come last."""
    names = list(dict.fromkeys(name for case in cases for name in case))
    return sorted(names, key=lambda n: PROVIDERS.index(n) if n in PROVIDERS else len(PROVIDERS))


def speed_up(case: Case, provider: str) -> float | None:
    """How many times smaller the median is than the baseline's; None where one is missing."""
    if provider not in case:
        return None
    baseline = case.get(case[provider]["baseline"])
    return None if baseline is None else baseline["p50"] / case[provider]["p50"]


def best_of_ours(case: Case) -> str | None:
    """Fastseg's fastest provider in the baseline's precision."""
    lower = lower_precision([case])
    names = [name for name in case if name.startswith(OURS) and name not in lower]
    return min(names, key=lambda name: case[name]["p50"], default=None)


def lower_precision(cases: Iterable[Case]) -> dict[str, float]:
    """Providers that compute in a lower precision than the setting's, with their largest error."""
    found: dict[str, float] = {}
    for case in cases:
        for name, row in case.items():
            baseline = case.get(row["baseline"], row)
            if row["parity_gate"] > _WIDER_GATE * baseline["parity_gate"]:
                found[name] = max(row["parity_error"], found.get(name, 0.0))
    return found


def mean(ratios: Sequence[float | None]) -> float | None:
    """The geometric mean; None where one of several is missing, or where there are not several."""
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < 2 or len(known) < len(ratios):
        return None
    return statistics.geometric_mean(known)


def all_of(rows: Iterable[Row], name: str) -> str:
    """The values of the field `name`, each once."""
    return ", ".join(dict.fromkeys(str(row[name]) for row in rows))


def machine_of(rows: Sequence[Row]) -> str:
    """Device and threads of rows of one setting, as in "AMD EPYC, 2 cores, AVX512; 2 threads"."""
    first = rows[0]
    if not on_cpu(first):
        return f"{first['device']}, driver {all_of(rows, 'driver')}"
    threads = "1 thread" if first["threads"] == 1 else f"{first['threads']} threads"
    return f"{first['device']}; {threads}"


def versions_of(rows: Sequence[Row]) -> str:
    """Versions of the libraries that `rows` depend on, fastseg's with its commit, and the dates."""
    names = {row["provider"] for row in rows}
    said = [f"torch {all_of(rows, 'torch')}"]
    if not on_cpu(rows[0]):
        said.append(f"triton {all_of(rows, 'triton')}")
    if any(name.startswith("transformers") for name in names):
        said.append(f"transformers {all_of(rows, 'transformers')}")
    for library in ("smp", "torch-tensorrt", "ONNX Runtime", "OpenVINO"):
        users = [
            row for row in rows if row["provider"].removeprefix("fastseg ").startswith(library)
        ]
        if users:
            said.append(f"{library} {all_of(users, 'provider_version')}")
    said.append(f"fastseg {all_of(rows, 'fastseg')} at {all_of(rows, 'commit')}")
    dates = sorted({row["date"][:10] for row in rows})
    return f"{', '.join(said)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"

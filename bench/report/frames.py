"""What tables and pictures show of the rows: the newest run of each case, on one machine a setting.

Rows are only ever added, so a file may hold several machines. Of CPUs the one that was measured
last is shown; every GPU is; of each with the threads of its last rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from ..providers import PROVIDERS
from ..rows import Row, newest

MACHINE = ["device", "threads"]
# A provider whose gate is so much wider than the baseline's computes in a lower precision.
_WIDER_GATE = 2.0


def frame_of(rows: Iterable[Row], kind: str) -> pd.DataFrame:
    """The newest rows of `kind`, in order of setting, case and provider; maybe none.

    Columns are the fields of rows, and

        setting: as in "512x512, batch 1, float32"
        lower: whether the provider computes in a lower precision than the setting's
        ours: whether it is one of fastseg's
    """
    of_kind = [row for row in rows if row.kind == kind]
    by_date = sorted(of_kind, key=lambda row: row.date)
    last = {row.on_cpu or row.device: (row.device, row.threads) for row in by_date}
    found = [
        {
            **vars(row),
            "setting": _setting(row),
            "lower": row.parity_gate > _WIDER_GATE * group[0].parity_gate,  # of the baseline
            "ours": row.provider.startswith("fastseg"),
            "rank": _rank(row),
        }
        for group in newest(of_kind)
        for row in group
        if last[row.on_cpu or row.device] == (row.device, row.threads)
    ]
    frame = pd.DataFrame(found, columns=None if found else ["setting", *Row.__annotations__])
    return frame.sort_values("rank", kind="stable") if found else frame


def _setting(row: Row) -> str:
    height, width = row.size
    said = f"{height}x{width}, batch {row.batch}, {row.dtype}"
    return said if row.cache == "warm" else f"{said}, {row.cache} cache"


def _rank(row: Row) -> tuple:
    """float32 before bfloat16 and float16, small before large."""
    names = list(PROVIDERS)
    provider = names.index(row.provider) if row.provider in names else len(names)
    setting = (row.size[0] * row.size[1], row.batch, row.threads, row.cache == "cold")
    return row.device, row.dtype.replace("float32", ""), *setting, row.case, provider


def pivot(frame: pd.DataFrame, values: str, index: str = "provider") -> pd.DataFrame:
    """`values` with a line a provider, in order, and a column a case, or the other way round."""
    columns = {"provider": "case", "case": "provider"}[index]
    table = frame.pivot(index=index, columns=columns, values=values)
    return table.reindex(frame[index].unique(), columns=frame[columns].unique())


def geometric_mean(ratios: Any) -> Any:
    """Of each line, or of a series; not a number where one is missing."""
    return np.exp(np.log(ratios.astype(float)).mean(axis=ratios.ndim - 1, skipna=False))


def all_of(frame: pd.DataFrame, name: str) -> str:
    """The values of the column `name`, each once."""
    return ", ".join(dict.fromkeys(map(str, frame[name])))


def machine_of(frame: pd.DataFrame) -> str:
    """Device and threads, as in "AMD EPYC, 2 cores, AVX512; 2 threads"."""
    first = frame.iloc[0]
    if first["device"] != first["cpu"]:
        return f"{first['device']}, driver {all_of(frame, 'driver')}"
    threads = "1 thread" if first["threads"] == 1 else f"{first['threads']} threads"
    return f"{first['device']}; {threads}" if first["threads"] else first["device"]


def versions_of(frame: pd.DataFrame) -> str:
    """Versions of the libraries that rows depend on, fastseg's with its commit, and the dates."""
    said = [f"torch {all_of(frame, 'torch')}"]
    if any(frame["device"] != frame["cpu"]):
        said.append(f"triton {all_of(frame, 'triton')}")
    for library in ("transformers", "torch-tensorrt", "ONNX Runtime", "OpenVINO"):
        users = frame[frame["provider"].str.removeprefix("fastseg ").str.startswith(library)]
        if len(users):
            said.append(f"{library} {all_of(users, 'provider_version')}")
    said.append(f"fastseg {all_of(frame, 'fastseg')} at {all_of(frame, 'commit')}")
    dates = sorted(frame["date"].str[:10])
    return f"{', '.join(said)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def lower_precision(frame: pd.DataFrame) -> str:
    """Providers that compute in a lower precision, with their largest error; "" without any."""
    worst = frame[frame["lower"]].groupby("provider", sort=False)["parity_error"].max()
    return ", ".join(f"{name} (error {error:.2g})" for name, error in worst.items())


def number(value: float) -> str:
    """Three digits, or all of the whole part; "-" for what is missing."""
    if pd.isna(value):
        return "-"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def times(ratio: float) -> str:
    """As in "4.19x"."""
    return "-" if pd.isna(ratio) else f"{ratio:.2f}x"


def percent(share: float) -> str:
    """As in "49%"."""
    return "-" if pd.isna(share) else f"{share:.0%}"

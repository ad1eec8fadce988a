"""Peak memory of a forward at a high resolution: a panel a variant, a bar a provider."""

from __future__ import annotations

from collections.abc import Sequence

from .. import shown
from ..rows import Row
from ..table_cells import number
from .model import Bar, Found, Panel, Picture, Skipped, file_name

# Of a GPU, memory is a field in the rows of forwards of all sizes.
GPU_SIZE = (1024, 2048)
_CPU_TEXT = "Above that before the forward, with weights and image loaded; each in processes of "
_CPU_TEXT += "its own; whiskers from p20 to p80."
_GPU_TEXT = "As PyTorch's allocator counts it during a call, weights included. Memory of CUDA "
_GPU_TEXT += "graphs is counted at their capture and not shown."


def pictures(rows: Sequence[Row]) -> Found:
    """From rows of memory on CPUs, and from the peaks of GPUs at 1024x2048."""
    found: list[Picture | Skipped] = []
    for setting, cases in shown.newest_cases(rows, "memory").items():
        found.append(_picture(setting, cases, _CPU_TEXT))
    for setting, cases in shown.newest_cases(rows, "forward").items():
        with_peak = {variant: _with_peak(case) for variant, case in cases.items()}
        with_peak = {variant: case for variant, case in with_peak.items() if case}
        if with_peak and setting.size == GPU_SIZE:
            found.append(_picture(setting, with_peak, _GPU_TEXT))
    reason = "there are no rows of memory, and none of a GPU at 1024x2048 with a peak"
    return found or [Skipped("memory", reason)]


def _with_peak(case: shown.Case) -> shown.Case:
    """As rows of memory: the peak is their figure, without a range."""
    return {
        name: {**row, "p50": row["peak_mb"], "p20": None, "p80": None}
        for name, row in case.items()
        if row["peak_mb"] is not None
    }


def _picture(setting: shown.RowGroup, cases: dict[str, shown.Case], text: str) -> Picture:
    of_setting = [row for case in cases.values() for row in case.values()]
    panels = tuple(
        Panel(
            variant.upper(),
            tuple(
                Bar(n, (case[n]["p50"],), case[n]["p20"], case[n]["p80"], number(case[n]["p50"]))
                for n in shown.providers([case])
            ),
        )
        for variant, case in cases.items()
    )
    return Picture(
        kind="bars",
        name=file_name("memory", setting, of_setting[0]),
        title=f"Peak memory of a SegFormer forward, {setting}",
        axis="MB, less is better",
        panels=panels,
        machine=shown.machine_of(of_setting),
        notes=(text, shown.versions_of(of_setting)),
    )

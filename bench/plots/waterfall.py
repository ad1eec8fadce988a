"""From transformers eager to fastseg, a step a bar, each with its forward and its label map."""

from __future__ import annotations

from collections.abc import Sequence

from .. import roofline, shown
from ..rows import Row
from ..table_cells import number
from .model import Bar, Found, Panel, Picture, Skipped, file_name

_TEXT = "Each step changes one thing: fastseg's forwards come with transformers' upsampling and "
_TEXT += "argmax, the last step with fastseg's own. Behind the sum, the gain over the first step."


def pictures(rows: Sequence[Row]) -> Found:
    """One for each device, dtype, size and batch that has two steps or more of a variant."""
    found: list[Picture | Skipped] = []
    for setting, cases in shown.newest_cases(rows, "end to end", "post").items():
        steps = {variant: _steps(rows, variant, setting) for variant in cases}
        several = {variant: one for variant, one in steps.items() if len(one) > 1}
        of_setting = [row for case in cases.values() for row in case.values()]
        name = file_name("waterfall", setting, of_setting[0])
        if not several:
            found.append(Skipped(name, "no variant has two steps"))
            continue
        absent = roofline.missing(step for one in several.values() for step in one)
        note = f" No rows of {', '.join(absent)}." if absent else ""
        panels = tuple(Panel(v.upper(), tuple(_bars(one))) for v, one in several.items())
        shown_rows = [row for row in of_setting if row["provider"] in roofline.STEPS]
        found.append(
            Picture(
                kind="bars",
                name=name,
                title=f"From transformers to fastseg, step by step, {setting}",
                axis="Median ms from pixel values to the label map, less is better",
                machine=shown.machine_of(of_setting),
                panels=panels,
                notes=(_TEXT + note, shown.versions_of(shown_rows)),
                parts=("forward", "upsampling and argmax"),
            )
        )
    return found or [Skipped("waterfall", "there are no rows of end to end")]


def _steps(rows: Sequence[Row], variant: str, setting: shown.RowGroup) -> list[roofline.Step]:
    return roofline.waterfall(
        rows,
        variant,
        setting.size,
        setting.batch,
        setting.dtype,
        setting.device,
        threads=setting.threads,
        cache=setting.cache,
    )


def _bars(steps: Sequence[roofline.Step]) -> list[Bar]:
    return [
        Bar(
            step.name,
            (step.forward_ms, step.post_ms),
            text=f"{number(step.ms)}  {steps[0].ms / step.ms:.1f}x",
        )
        for step in steps
    ]

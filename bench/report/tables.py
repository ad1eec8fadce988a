"""The markdown tables of rows. Each function gives those of all settings, and a caption behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from ..options import HOSTS, MODES, OP_PROVIDERS, SEGGPT_CASES, TRAINING_HOSTS
from ..providers import BASELINE
from ..rows import STEPS, WHOLE, Row
from ..work import H200, seggpt_work, total
from . import frames
from .frames import frame_of, geometric_mean, number, percent, pivot, times

NO_ROWS = "Not measured yet: there are no such rows."

Table = Callable[[pd.DataFrame], pd.DataFrame]

_METHOD = "Parity was checked first, and providers of a case ran in turn in one process. "


def markdown_table(cells: pd.DataFrame, left: int = 1) -> str:
    """Cells of text as markdown, the first `left` columns on the left."""
    alignment = ["left"] * left + ["right"] * (len(cells.columns) - left)
    return cells.to_markdown(index=False, disable_numparse=True, colalign=alignment)


def markdown(rows: Sequence[Row]) -> str:
    """The tables of all kinds that `rows` have."""
    of_models = (forward, end_to_end, labels, memory, ops, hosts, seggpt, training)
    kinds = (*of_models, predict, host_time)
    from .engines import engines  # which needs what is here, as the next
    from .numerics import numerics
    from .threads import by_threads

    found = [table(rows) for table in (*kinds, by_threads, numerics, engines)]
    return "\n\n".join(text for text in found if text != NO_ROWS)


def forward(rows: Sequence[Row]) -> str:
    """One table a setting: a line a provider, a column a variant, medians in ms."""
    text = f"Medians in ms from `pixel_values` to logits; then how many times as fast as {BASELINE}"
    text += ", geometric mean over the variants, and how near the least possible time. "
    return _tables(frame_of(rows, "forward"), _by_provider, text + _METHOD)


# What one may take on a CPU: provider, dtype, and what the line says of it.
_WAYS = (
    (BASELINE, "float32", "transformers"),
    ("OpenVINO fp32", "float32", "transformers' model in OpenVINO"),
    ("fastseg accelerate", "float32", "fastseg"),
    ("fastseg OpenVINO fp32", "float32", "fastseg in OpenVINO"),
    (BASELINE, "bfloat16", "transformers"),
    ("OpenVINO default", "bfloat16", "transformers' model in OpenVINO"),
    ("fastseg accelerate", "bfloat16", "fastseg"),
    ("fastseg OpenVINO default", "bfloat16", "fastseg in OpenVINO"),
)


def by_dtype(rows: Sequence[Row]) -> str:
    """A line for each library and dtype, a column a variant, against transformers in float32.

    OpenVINO's default, which is bfloat16 where that is quicker, is among the rows of float32.
    """
    frame = frame_of(rows, "forward")
    if frame.empty:
        return NO_ROWS
    frame = frame.assign(dtype=frame["dtype"].where(~frame["lower"], "bfloat16"))
    medians = frame.pivot(index=["provider", "dtype"], columns="case", values="p50")
    ways = [way for way in _WAYS if way[:2] in medians.index]
    medians = medians.loc[[way[:2] for way in ways]]
    frame = frame[frame.set_index(["provider", "dtype"]).index.isin(medians.index)]
    gains = geometric_mean(medians.loc[BASELINE, "float32"] / medians)
    cells = medians.map(number)
    cells.columns = cells.columns.str.upper()
    cells.insert(0, "dtype", [dtype for _, dtype, _ in ways])
    cells.insert(0, "", [said for *_, said in ways])
    cells["times as fast, mean"] = [times(gain) for gain in gains]
    ours = cells[""].str.startswith("fastseg")
    cells.loc[ours, "times as fast, mean"] = "**" + cells["times as fast, mean"][ours] + "**"
    text = (
        "Medians in ms from `pixel_values` to logits, and how many times as fast as transformers "
    )
    text += f"in float32, geometric mean. {_METHOD}"
    return f"{markdown_table(cells, left=2)}\n\n{text}{of_rows(frame)}"


def memory(rows: Sequence[Row]) -> str:
    """A line a provider, a column a variant, peaks in MB."""
    text = "Peak memory of a forward in MB (10^6 bytes) above that before it, with weights and "
    text += "image loaded; each provider in processes of its own. "
    return _tables(frame_of(rows, "memory"), _by_provider, text)


def _by_provider(frame: pd.DataFrame) -> pd.DataFrame:
    ratios = pivot(frame, "ratio")
    cells = pivot(frame, "p50").map(number)
    cells.columns = cells.columns.str.upper()
    title = "times less" if frame["unit"].iloc[0] == "MB" else "times as fast"
    title += ", mean" if len(ratios.columns) > 1 else ""
    cells[title] = geometric_mean(ratios).map(times)
    if frame["floor_ms"].notna().any():
        share = pivot(frame.assign(share=frame["floor_ms"] / frame["p50"]), "share")
        cells["of the floor"] = geometric_mean(share).map(percent)
    lower = set(frame["provider"][frame["lower"]])
    cells.loc[cells.index.isin(lower), cells.columns == "of the floor"] = "-"  # it has another
    cells.insert(0, "", [f"{name} \\*" if name in lower else name for name in cells.index])
    ours = ratios[ratios.index.str.startswith("fastseg") & ~ratios.index.isin(lower)]
    if len(ours) > 1:
        best = ours.max()
        line = [*best, geometric_mean(best)] if len(best) > 1 else [*best]
        bold = ["**best of fastseg**, times as fast", *(f"**{times(one)}**" for one in line)]
        cells.loc["best"] = bold + [""] * (len(cells.columns) - len(bold))
    return cells


def end_to_end(rows: Sequence[Row]) -> str:
    """A line for each variant and provider: its steps, the whole, and the speed-up."""

    def table(frame: pd.DataFrame) -> pd.DataFrame:
        whole = frame[frame["part"] == WHOLE].set_index(["case", "provider"])
        medians = frame.pivot(index=["case", "provider"], columns="part", values="p50")
        cells = medians.loc[whole.index, [*STEPS, WHOLE]].map(number)
        cells[" "] = whole["ratio"].map(times)
        ours = whole["ratio"][whole["ours"] & ~whole["lower"]].groupby("case", sort=False)
        cells = cells.reset_index()
        cells["case"] = cells["case"].str.upper()
        if ours.ngroups > 1:
            mean = f"**{times(geometric_mean(ours.max()))}**"
            cells.loc[len(cells)] = ["", "best of fastseg, geometric mean", *[""] * 4, mean]
        return cells.rename(columns={"case": "", "provider": "  "})

    text = "Medians in ms from an 8-bit image to its label map of the same size: image processor, "
    text += f"model, upsampling and argmax; behind, how many times as fast as {BASELINE}. "
    return _tables(frame_of(rows, "end to end"), table, text + _METHOD, left=2)


def labels(rows: Sequence[Row]) -> str:
    """A line for each kind of logits, a column a provider, and what fastseg gains over each."""

    def table(frame: pd.DataFrame) -> pd.DataFrame:
        medians = pivot(frame, "p50", index="case")
        cells = medians.map(number)
        for name in medians.columns.drop("fastseg", errors="ignore"):
            gains = (medians[name] / medians.get("fastseg", float("nan"))).map(times)
            cells[name] += " (" + gains + ")"
        return cells.reset_index().rename(columns={"case": "logits"})

    text = "Medians in ms from logits at a quarter of the size to the label map, and how many "
    text += "times as fast fastseg is. "
    return _tables(frame_of(rows, "labels"), table, text + _METHOD)


def ops(rows: Sequence[Row]) -> str:
    """A line for each kind of call of a forward, in us, and the sums over a forward."""

    def table(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([_ops_of(variant, one) for variant, one in frame.groupby("case")])

    text = "Medians in us of a call, its least possible time, and how often a forward makes it. "
    return _tables(frame_of(rows, "op"), table, text)


def _ops_of(variant: str, frame: pd.DataFrame) -> pd.DataFrame:
    names = [name for name in OP_PROVIDERS if name in set(frame["provider"])]
    figures = 1e3 * frame.pivot(index="part", columns="provider", values="p50")[names]
    parts = frame.drop_duplicates("part").set_index("part")
    figures.insert(0, "floor", 1e3 * parts["floor_ms"])
    counts = parts["count"].loc[figures.index]
    figures = figures.loc[parts.index]
    figures.loc["sum"] = figures.mul(counts, axis=0).sum(skipna=False)
    counts["sum"] = counts.sum()
    ours = names[-1]
    cells = figures.map(number)
    cells.insert(0, "count", counts.astype(str))
    cells[f"{names[0]} / {ours}"] = (figures[names[0]] / figures[ours]).map(times)
    cells["of the floor"] = (figures["floor"] / figures[ours]).map(percent)
    cells.insert(0, "", [f"{variant.upper()} {part}" for part in cells.index])
    return cells


def hosts(rows: Sequence[Row]) -> str:
    """Eager, then compiled: models before and after `fastseg.accelerate`.

    Each library's are those of the CPU on which it was measured last.
    """
    found = []
    for mode in MODES:
        of_mode = [row for row in rows if row.kind == "host" and row.mode == mode]
        last = {row.host: row.device for row in sorted(of_mode, key=lambda row: row.date)}
        for device in dict.fromkeys(last.values()):
            of_device = [row for row in of_mode if last[row.host] == device]
            found.append(_of_hosts(frame_of(of_device, "host")))
    return "\n\n".join(found) or NO_ROWS


def _of_hosts(frame: pd.DataFrame) -> str:
    """A line a model, and the mean of each library."""
    versions = frame["provider_version"]
    frame["model"] = frame["host"].where(versions == "", frame["host"].str.rstrip("45 "))
    frame["model"] = (frame["model"] + " " + versions).str.strip()
    frame["order"] = frame["host"].map(HOSTS.index)
    frame["figures"] = [_figures(row) for _, row in frame.iterrows()]
    lines = []
    for (_, setting), group in frame.groupby(["order", "setting"]):
        model, mode = group["model"].iloc[0], group["mode"].iloc[0]
        cells = group.pivot(index="case", columns="provider", values="figures").fillna("")
        gains = group[group["provider"] == "accelerated"].set_index("case")["ratio"]
        for variant, line in cells.iterrows():
            figures = line["host"], line["accelerated"], times(gains[variant]), line.get("own", "")
            lines.append([f"{model}, {variant.upper()}", mode, setting, *figures])
        if len(gains) > 1:
            title = f"{model}, geometric mean of these {len(gains)}"
            mean = f"**{times(geometric_mean(gains))}**"
            lines.append([title, mode, setting, "", "", mean, ""])
    columns = ["model", "", "of", "as it is", "accelerated", "gain", "fastseg's own"]
    text = "Medians in ms (p20 to p80); parity was checked first, and the models of a line ran in "
    text += f"turn in one process. {_checks(frame)}"
    return (
        f"{markdown_table(pd.DataFrame(lines, columns=columns), left=3)}\n\n{text}{of_rows(frame)}"
    )


def _figures(row: pd.Series) -> str:
    return f"{number(row['p50'])} ({number(row['p20'])} to {number(row['p80'])})"


def _checks(frame: pd.DataFrame) -> str:
    """What the check of the weights costs of a forward of B0, the shortest."""
    eager = frame[(frame["case"] == "b0") & (frame["mode"] == "eager")]
    taken = eager.pivot_table(index="model", columns="provider", values="p50", aggfunc="first")
    return "".join(
        f"The check that weights are fresh takes {1000 * one['check']:.0f} us, "
        f"{one['check'] / one['accelerated']:.1%}, of {model} B0. "
        for model, one in taken.iterrows()
    )


def training(rows: Sequence[Row]) -> str:
    """A line for each model and provider: the time of a step, and its memory."""
    frame = frame_of(rows, "training")
    if frame.empty:
        return NO_ROWS
    frame["setting"] += ", " + frame["mode"]
    frame["order"] = frame["host"].map(TRAINING_HOSTS.index)

    def table(of_setting: pd.DataFrame) -> pd.DataFrame:
        frame = of_setting.sort_values(["order", "case"], kind="stable")
        theirs = frame["peak_mb"].where(frame["provider"] == frame["baseline"])
        most = theirs.groupby([frame["host"], frame["case"]]).transform("max")
        cells = {
            "model": frame["host"].str.rstrip("5 ") + " " + frame["case"].str.upper(),
            "step by": frame["provider"],
            "ms": frame["p50"].map(number),
            "times as fast": frame["ratio"].map(times),
            "MB": frame["peak_mb"].map(number),
            "of the memory": (frame["peak_mb"] / most).map(percent),
        }
        return pd.DataFrame(cells)

    text = "Medians of a step: forward, loss, backward and AdamW; memory is that of a step above "
    text += "weights, gradients and AdamW's state, as torch's allocator counts it. "
    return _tables(frame, table, text + _METHOD, left=2)


def seggpt(rows: Sequence[Row]) -> str:
    """A line a case: medians of both providers, and how many times as fast, or less, fastseg is."""
    kinds = ("seggpt", "seggpt memory")
    found = [frame for kind in kinds if len(frame := frame_of(rows, kind))]
    if not found:
        return NO_ROWS
    frame = pd.concat([one.dropna(axis=1, how="all") for one in found])  # as pandas wants it
    names = [case.partition(",")[0] for case in frame["case"]]
    frame = frame.assign(
        what=[
            _CASES_OF_SEGGPT[name] + case.removeprefix(name)
            for name, case in zip(names, frame["case"], strict=True)
        ],
        order=[list(SEGGPT_CASES).index(name) for name in names],
        figures=frame["p50"].map(number),
    ).sort_values(["order", "dtype"], kind="stable")
    keys = ["what", "dtype"]
    lines = pd.MultiIndex.from_frame(frame[keys].drop_duplicates())
    cells = frame.pivot(index=keys, columns="provider", values="figures").reindex(lines).fillna("-")
    cells = cells[sorted(cells.columns, key=lambda name: name != BASELINE)]
    gains = frame[frame["ours"]].set_index(keys)["ratio"].reindex(lines)
    cells = cells.assign(**{"": gains.map(times)}).reset_index().rename(columns={"what": " "})
    text = "Medians in ms (memory in MB, 10^6 bytes), and how many times as fast, or less, fastseg "
    text += f"is. {_METHOD}"
    work = seggpt_work(SEGGPT_CASES["forward"], "bfloat16")
    least = f"{H200.floor_ms(work):.1f} ms, {total(work).flops / 1e9:.0f} GFLOP"
    text += (
        "The least that a forward of 24 layers takes on an H200, derived by `bench/work.py` from "
    )
    text += f"its work in bfloat16 at 4.3 TB/s and 790 TFLOP/s, nothing has run there: {least}. "
    return f"{markdown_table(cells, left=2)}\n\n{text}{of_rows(frame)}"


_CASES_OF_SEGGPT = {
    "forward": "pixel values to painted masks",
    "1 prompt": "picture to label map, 1 prompt",
    "kept prompt": "picture to label map, a kept prompt",
    "4 prompts": "picture to label map, 4 prompts",
    "8 prompts": "picture to label map, 8 prompts",
    "post-processing": "painted masks to a label map of 1080x1920",
    "memory": "memory of a forward, MB",
}


def predict(rows: Sequence[Row]) -> str:
    """A line a case, a column a provider: processor ms a photograph; then memory."""
    frame = frame_of(rows, "predict")
    if frame.empty:
        return NO_ROWS
    order = frame["provider"].drop_duplicates()
    figures = frame.assign(
        text=[f"{number(p50)} ({percent(p50 / base)})" for p50, base in _with_baseline(frame)]
    )
    cells = figures.pivot(index="case", columns="provider", values="text")
    cells = cells.reindex(frame["case"].drop_duplicates())[list(order)].reset_index()
    text = "Processor time that one more photograph of 2.4 megapixels takes, in ms, by processes "
    text += "of one thread in turn; the baseline's share of it in brackets. The pipeline writes "
    text += "nothing. Label maps are those of the baseline. "
    peaks = frame_of(rows, "predict memory")
    if not peaks.empty:
        each = zip(peaks["provider"], peaks["p50"], strict=True)
        text += "Highest resident set: "
        text += ", ".join(f"{name} {number(p50)} MB" for name, p50 in each) + ". "
    found = frame_of(rows, "search")
    if not found.empty:
        text += f"Until the first of {found['case'].iloc[0]} in folders is known it takes "
        text += f"{number(found['p50'].iloc[0])} ms. "
    evaluated = frame_of(rows, "evaluate")
    if not evaluated.empty:
        counted = evaluated.set_index("provider")["p50"]
        text += f"Counting takes {number(counted['counting'])} of the "
        text += f"{number(counted['fastseg.evaluate'])} ms of a photograph in `fastseg.evaluate`. "
    return f"{markdown_table(cells.rename(columns={'case': ''}))}\n\n{text}{of_rows(frame)}"


def _with_baseline(frame: pd.DataFrame) -> list[tuple[float, float]]:
    baselines = frame[frame["provider"] == frame["baseline"]].set_index("case")["p50"]
    return list(zip(frame["p50"], frame["case"].map(baselines), strict=True))


def host_time(rows: Sequence[Row]) -> str:
    """A line a part and commit, a column a variant: microseconds on the host."""
    frame = frame_of(rows, "host time")
    if frame.empty:
        return NO_ROWS
    frame = frame.assign(what=frame["part"].map(_PARTS_OF_A_CALL))
    lines = pd.MultiIndex.from_frame(frame[["what", "provider"]].drop_duplicates())
    figures = frame.pivot(index=["what", "provider"], columns="case", values="p20").loc[lines]
    cells = figures.map("{:.0f}".format).rename(columns=str.upper).reset_index()
    text = "20 % quantiles, in us, of the quickest of 10 calls each, on one thread, in turn in "
    text += "processes of their own. Kernels are neither launched nor compiled. "
    cells = cells.rename(columns={"what": "", "provider": "commit"}).replace("fastseg", "this")
    return f"{markdown_table(cells, left=2)}\n\n{text}{of_rows(frame)}"


_PARTS_OF_A_CALL = {
    "forward": "a forward without a graph, up to the driver",
    "replay": "the replay of a graph, weights checked",
    "refresh": "torch.compile: what keeps weights fresh",
}


def _tables(frame: pd.DataFrame, table: Table, text: str, left: int = 1) -> str:
    """A title and a table for each setting; behind those of a machine what they have in common."""
    found: list[str] = []
    for _, of_machine in frame.groupby(frames.MACHINE, sort=False):
        for setting, of_setting in of_machine.groupby("setting", sort=False):
            found += [f"{setting}:", markdown_table(table(of_setting), left)]
        lower = frames.lower_precision(of_machine)
        star = "\\* computes in a lower precision, and is not taken as best: "
        found.append(text + (f"{star}{lower}. " if lower else "") + of_rows(of_machine))
    return "\n\n".join(found) or NO_ROWS


def of_rows(frame: pd.DataFrame) -> str:
    """The machine, the versions and the commands that rows come from."""
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(frame["command"]))
    return f"{frames.machine_of(frame)}; {frames.versions_of(frame)}; by {commands}."

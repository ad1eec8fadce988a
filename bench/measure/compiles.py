"""`python -m bench compiles`: what the kernels take, compiled for GPUs that are not here.

Every kernel that the variants launch at 512x512 is compiled ahead of time. A CSV file gets a line
a kernel; a summary is printed, or with --docs put into docs/compiles.md. Static figures: nothing
has run. The status is 1 where a kernel does not compile.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import triton
from tqdm import tqdm

from fastseg.kernels.core.launch import Launch
from fastseg.kernels.tune.precompile import key

from ..ahead_of_time import SHARED_LIMIT, Compiled, compile_launch
from ..machine import ROOT, commit
from ..options import integer, list_of, some_of
from ..report.documents import rewrite
from ..report.tables import markdown_table
from ..setting import DTYPES, VARIANTS
from ..work import H200, forward_work, total, trace_model

OUTPUT = ROOT / "output" / "compiles.csv"
DOCS = ROOT / "docs" / "compiles.md"
SIZE = (512, 512)
BATCHES = (1, 8)
_COLUMNS = ("target", "kernel", "dtype", "options", "launched_by", "error")


class Unique(NamedTuple):
    """A kernel as it is compiled, and who launches it."""

    launch: Launch
    dtype: str
    users: dict[str, None]  # as "b0 x 1": variant and batch


def family_of(target: str) -> str:
    """Whose configurations serve `target`."""
    return "default" if target.startswith("gfx") else target  # which has none of its own


def unique_launches(
    target: str,
    variants: Sequence[str] = VARIANTS,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[str] = ("bfloat16", "float32"),
) -> list[Unique]:
    """Launches of forwards that compile to different kernels, by dtype and kernel."""
    found: dict[str, Unique] = {}
    for dtype, variant, batch in product(dtypes, variants, batches):
        traced = trace_model(variant, SIZE, batch, DTYPES[dtype], family_of(target))
        for launch in traced.launches:
            unique = found.setdefault(key(launch), Unique(launch, dtype, {}))
            unique.users[f"{variant} x {batch}"] = None
    return sorted(found.values(), key=lambda unique: (unique.dtype, unique.launch.name))


def compile_all(uniques: Iterable[Unique], target: str) -> list[dict[str, Any]]:
    """A line of the CSV file for each kernel."""
    lines = []
    for launch, dtype, users in uniques:
        line: dict[str, Any] = {"target": target, "kernel": launch.name, "dtype": dtype}
        line |= {"options": launch.options, "launched_by": ", ".join(users), "error": None}
        try:
            line |= compile_launch(launch, target)._asdict()
        except Exception as error:  # a kernel that fails must not hide the others
            line["error"] = type(error).__name__
        lines.append(line)
    return lines


def summary(kernels: pd.DataFrame) -> str:
    """A table with a line a target."""
    groups = kernels.groupby("target", sort=False)
    table = pd.DataFrame(
        {
            "kernels": groups.size(),
            "do not compile": groups["error"].count(),
            "spill": groups["spill_bytes"].agg(lambda spilled: (spilled > 0).sum()),
            "most bytes": groups["spill_bytes"].max(),
            "most registers": groups["registers"].max(),
            "most shared, KiB": groups["shared_bytes"].max() / 1024,
        }
    )
    return markdown_table(table.fillna(0).astype(int).reset_index().astype(str))


def forwards(variants: Sequence[str], batches: Sequence[int]) -> str:
    """A table of whole forwards to the label map, in bfloat16."""
    lines = []
    for batch, variant in product(batches, variants):
        works = forward_work(variant, SIZE, batch, "bfloat16", labels=True)
        least = total(works)
        launches = trace_model(variant, SIZE, batch, torch.bfloat16, "sm_90").launches
        figures = (f"{least.bytes / 1e6:.1f}", f"{least.flops / 1e9:.1f}")
        floor = f"{1e3 * H200.floor_ms(works):.0f}"
        lines.append([variant.upper(), str(batch), str(len(launches)), *figures, floor])
    columns = ["variant", "batch", "launches", "MB", "GFLOP", "floor, us"]
    return markdown_table(pd.DataFrame(lines, columns=columns))


def main(argv: Sequence[str]) -> int:
    """Run the command line; the status is 1 where a kernel does not compile."""
    parser = argparse.ArgumentParser(prog="python -m bench compiles", description=__doc__)
    add = parser.add_argument
    targets = tuple(SHARED_LIMIT)
    add("--targets", type=some_of(targets), default=targets, metavar="A,B", help=f"of {targets}")
    add("--variants", type=some_of(VARIANTS), default=VARIANTS, metavar="B0,B2")
    add("--batches", type=list_of(integer()), default=BATCHES, metavar="1,8")
    add("--output", type=Path, default=OUTPUT, metavar="FILE", help="default: output/compiles.csv")
    add("--docs", action="store_true", help=f"put the summary into {DOCS.name}")
    options = parser.parse_args(argv)
    lines = []
    for target in options.targets:
        uniques = unique_launches(target, options.variants, options.batches)
        lines += compile_all(tqdm(uniques, target, disable=None), target)
    kernels = pd.DataFrame(lines, columns=[*_COLUMNS, *Compiled._fields[3:]])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    kernels.to_csv(options.output, index=False)
    made = f"triton {triton.__version__}, fastseg at {commit()}; "
    made += f"by `{shlex.join(['python', '-m', 'bench', 'compiles', *argv])}`."
    text = "\n\n".join([summary(kernels), forwards(options.variants, options.batches), made])
    if options.docs:
        rewrite(DOCS, text, "compiles")
    else:
        print(text)
    print(f"{options.output}: {len(kernels)} kernels")
    return int(kernels["error"].notna().any())

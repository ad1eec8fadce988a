"""`python -m bench.compiles`: what the kernels take, compiled for GPUs that are not here.

Every kernel that the variants launch at 512x512 is compiled ahead of time, and its registers,
spills, shared memory and matrix instructions are written down as markdown tables, one for each
target. Static figures: nothing has run. The status is 1 where a kernel does not compile.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from tqdm import tqdm

from fastseg.kernels.core.launch import Launch

from . import forward_counts
from .ahead_of_time import SHARED_LIMIT, Compiled, compile_launch, key
from .launches import trace_model
from .machine import ROOT, commit
from .options import VARIANTS

OUTPUT = ROOT / "docs" / "compiles.md"
TARGETS = tuple(SHARED_LIMIT)
SIZE = (512, 512)
BATCHES = (1, 8)
DTYPES = (torch.bfloat16, torch.float32)
# A target without configurations of its own.
_FAMILIES = {"gfx942": "default"}
# Compile options that say nothing of a kernel.
_DULL = ("enable_fp_fusion", "num_warps", "num_stages")


class Unique(NamedTuple):
    """A kernel as it is compiled, and who launches it."""

    launch: Launch
    dtype: torch.dtype
    users: list[str]  # as "B0 b1": variant and batch


class Row(NamedTuple):
    """A line of a table: `compiled` is the error where the kernel does not compile."""

    unique: Unique
    compiled: Compiled | Exception


def family_of(target: str) -> str:
    """Whose configurations serve `target`."""
    return _FAMILIES.get(target, target)


def model_launches(variant: str, batch: int, dtype: torch.dtype, target: str) -> list[Launch]:
    """What a forward of `variant`, "b0" to "b5", launches on `target`, to its label map."""
    family = family_of(target)
    return trace_model(f"segformer_{variant}", SIZE, batch, dtype, family).launches


def unique_launches(
    target: str,
    variants: Sequence[str] = VARIANTS,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> list[Unique]:
    """Launches of forwards that compile to different kernels, by dtype and kernel."""
    found: dict[str, Unique] = {}
    for dtype in dtypes:
        for variant in variants:
            for batch in batches:
                for launch in model_launches(variant, batch, dtype, target):
                    unique = found.setdefault(key(launch), Unique(launch, dtype, []))
                    user = f"{variant.upper()} b{batch}"
                    if user not in unique.users:
                        unique.users.append(user)
    return sorted(found.values(), key=lambda unique: (str(unique.dtype), unique.launch.name))


def compile_all(uniques: Iterable[Unique], target: str) -> list[Row]:
    """The rows of a target's table."""
    rows = []
    for unique in uniques:
        try:
            compiled: Compiled | Exception = compile_launch(unique.launch, target)
        except Exception as error:  # a kernel that fails must not hide the others
            compiled = error
        rows.append(Row(unique, compiled))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where a kernel does not compile."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    sections = [forward_counts.table(options.variants, SIZE, BATCHES, "sm_90")]
    failures = 0
    for target in options.target:
        uniques = unique_launches(target, options.variants)
        rows = compile_all(tqdm(uniques, target, disable=None), target)
        failures += sum(isinstance(row.compiled, Exception) for row in rows)
        sections.append(table(target, rows))
    command = shlex.join(["python", "-m", "bench.compiles", *arguments])
    _write(options.output, "\n\n".join([header(command), *sections]) + "\n")
    if failures:
        print(f"{failures} kernels do not compile: see {options.output}", file=sys.stderr)
    return int(failures > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.compiles", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE")
    return parser


def header(command: str) -> str:
    """What the tables are, where they come from and how to read them."""
    return f"""# What the kernels take

Static figures: compiled ahead of time, not run, by triton {triton.__version__} at commit
{commit()}, with

    {command}

Every kernel that SegFormer B0 to B5 launch at {SIZE[0]}x{SIZE[1]}, batch {BATCHES[0]} and
{BATCHES[1]}, from pixels to label map, with the committed configurations of the target.

- registers and spill: per thread; spill in bytes of local memory
- shared: KiB for each CTA, at most {_limits()}
- matrix: the matrix instruction, where there is one
- instructions: of the machine code, not those executed
- CTAs: how many a multiprocessor can hold, by registers and shared memory"""


def _limits() -> str:
    return ", ".join(f"{limit >> 10} on {target}" for target, limit in SHARED_LIMIT.items())


def table(target: str, rows: Sequence[Row]) -> str:
    """The markdown of a target: a summary and a line for each kernel."""
    lines = [
        f"## {target}",
        "",
        _summary(rows),
        "",
        "| kernel | dtype | compiled for | warps, stages | registers | spill | shared | matrix"
        " | instructions | CTAs | launched by |",
        "|---|---|---|---|---:|---:|---:|---|---:|---:|---|",
    ]
    return "\n".join(lines + [_line(row) for row in rows])


def _summary(rows: Sequence[Row]) -> str:
    compiled = [row.compiled for row in rows if isinstance(row.compiled, Compiled)]
    failed = len(rows) - len(compiled)
    spilling = [kernel.spill_bytes for kernel in compiled if kernel.spill_bytes]
    shared = max((kernel.shared_bytes for kernel in compiled), default=0)
    spills = f"{len(spilling)} spill, at most {max(spilling)} bytes" if spilling else "no spill"
    text = f"{len(rows)} kernels, {spills}, shared memory up to {_kib(shared)} KiB."
    return f"{text} {failed} do not compile." if failed else text


def _line(row: Row) -> str:
    unique, compiled = row
    options = unique.launch.options
    cells = [
        unique.launch.name.removesuffix("_kernel"),
        str(unique.dtype).removeprefix("torch."),
        ", ".join(f"{name} {value}" for name, value in options.items() if name not in _DULL),
        f"{options.get('num_warps', 4)}, {options.get('num_stages', '-')}",
    ]
    if isinstance(compiled, Compiled):
        cells += [
            str(compiled.registers),
            str(compiled.spill_bytes),
            _kib(compiled.shared_bytes),
            "" if compiled.tensor_core == "none" else compiled.tensor_core,
            # Not known on AMD.
            str(compiled.instructions or "-"),
            str(compiled.ctas_per_sm or "-"),
        ]
    else:
        cells += [f"does not compile: {type(compiled).__name__}", *[""] * 5]
    return f"| {' | '.join([*cells, users(unique.users)])} |"


def _kib(size: int) -> str:
    return f"{size / 1024:.1f}".removesuffix(".0")


def users(names: Sequence[str]) -> str:
    """Variants by batch: "B1-B5 b1, B1 b8" for ["B1 b1", ..., "B5 b1", "B1 b8"]."""
    by_batch: dict[str, list[int]] = {}
    for name in names:
        variant, batch = name.split()
        by_batch.setdefault(batch, []).append(int(variant.removeprefix("B")))
    spans: dict[str, list[str]] = {}
    for batch, numbers in sorted(by_batch.items()):
        spans.setdefault(", ".join(_spans(numbers)), []).append(batch)
    return "; ".join(f"{variants} {' and '.join(batches)}" for variants, batches in spans.items())


def _spans(numbers: Sequence[int]) -> list[str]:
    """Runs of consecutive numbers: ["B0", "B2-B5"] for [0, 2, 3, 4, 5]."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [f"B{run[0]}-B{run[-1]}" if len(run) > 1 else f"B{run[0]}" for run in runs]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())

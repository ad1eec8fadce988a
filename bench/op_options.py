"""The options of `python -m bench.ops`."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .arguments import (
    QUICK_REPEATS,
    REPEATS,
    TELLING,
    VARIANTS,
    command_of,
    list_of,
    positive,
    size,
    some_of,
)
from .context import DTYPES, Setting
from .machine import ROOT, commit
from .op_cases import OPS
from .op_rows import PROVIDERS

RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    settings: Sequence[Setting]  # in the order in which they are measured
    ops: Sequence[str]
    providers: Sequence[str]
    device: torch.device
    threads: int
    repeats: int
    minutes: float
    output: Path | None  # None: add no rows
    resume: bool  # leave out what `output` has from the same command
    commit: str
    command: str


def parse(argv: Sequence[str]) -> Options:
    """Options from command line arguments; ends the program where they are wrong."""
    given = _parser().parse_args(argv)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    variants = given.variants or (VARIANTS[:1] if given.quick else VARIANTS)
    narrow = given.quick or not on_gpu
    sizes = given.sizes or ([(512, 512)] if narrow else [(512, 512), (1024, 1024)])
    batches = given.batches or ([1] if narrow else [1, 8])
    dtypes = given.dtypes or ["bfloat16" if on_gpu else "float32"]
    results = RESULTS / f"ops_{'gpu' if on_gpu else 'cpu'}.jsonl"
    chosen = (PROVIDERS[0], *(given.providers or PROVIDERS))
    return Options(
        settings=_in_order(variants, sizes, batches, dtypes),
        ops=given.ops or OPS,
        providers=[name for name in PROVIDERS if name in chosen],
        device=device,
        threads=given.threads,
        repeats=given.repeats or (QUICK_REPEATS if given.quick else REPEATS),
        minutes=given.minutes,
        output=given.output or (None if given.quick else results),
        resume=given.resume,
        commit=given.commit or commit(),
        command=command_of("bench.ops", argv),
    )


def _in_order(
    variants: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    dtypes: Sequence[str],
) -> list[Setting]:
    """All settings, those first that tell most: B0 and B2, small before large."""

    def rank(setting: Setting) -> tuple[bool, int, int, int]:
        height, width = setting.size
        untelling = setting.variant not in TELLING
        return untelling, dtypes.index(setting.dtype), height * width, setting.batch

    return sorted(
        itertools.starmap(Setting, itertools.product(variants, sizes, batches, dtypes)), key=rank
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m bench.ops",
        description="Times every op of a SegFormer forward against its eager twin, that twin under "
        "torch.compile, and the least time that bytes and FLOPs allow. A result that is not right "
        "gets no figure, and the status is 1.",
    )
    add = parser.add_argument
    add("--variants", type=some_of(VARIANTS), metavar="B0,B2", help="default: all")
    add(
        "--sizes",
        type=list_of(size),
        metavar="512,1024x2048",
        help="of the image, multiples of 4 (default: 512 and, on a GPU, 1024)",
    )
    add(
        "--batches",
        type=list_of(positive),
        metavar="1,8",
        help="default: 1 and, on a GPU, 8",
    )
    add(
        "--dtypes",
        type=some_of(DTYPES),
        metavar="bfloat16,float32",
        help="default: bfloat16 on a GPU, float32 elsewhere",
    )
    add("--ops", type=some_of(OPS), metavar="mix_ffn,layer_norm", help="default: all")
    add(
        "--providers",
        type=some_of(PROVIDERS),
        metavar="compiled,kernels",
        help="beside eager, the baseline (default: all)",
    )
    add("--device", help="default: cuda where there is one, else cpu")
    add("--threads", type=positive, default=2, metavar="N", help="of torch (default: 2)")
    add("--repeats", type=positive, metavar="N", help=f"rounds (default: {REPEATS})")
    add(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="M",
        help="begin nothing new after this time (default: no limit)",
    )
    add(
        "--quick",
        action="store_true",
        help=f"B0 at 512x512, batch 1, {QUICK_REPEATS} rounds; no rows unless --output is given",
    )
    add("--output", type=Path, metavar="FILE", help="add rows here (default: bench/results)")
    add(
        "--resume",
        action="store_true",
        help="leave out what the output has from the same command",
    )
    add("--commit", metavar="ID", help="for the rows, where git does not tell")
    return parser

"""The options of `python -m bench`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, starmap
from pathlib import Path

import torch

from .arguments import (
    GPU_REPEATS,
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
from .providers import BASELINE, PROVIDERS, SLOW_TO_BUILD_ON_A_CPU
from .rows import CACHES, KINDS

RESULTS = ROOT / "bench" / "results"
MEMORY_SIZE = (1024, 2048)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        settings: of "forward" and "end to end", in the order in which they are measured.
        memory_settings: of "memory".
        label_sizes: of "labels".
        output: None to add no rows.
        resume: leave out what `output` has from the same command.
    """

    kinds: Sequence[str]
    settings: Sequence[Setting]
    memory_settings: Sequence[Setting]
    label_sizes: Sequence[tuple[int, int]]
    providers: Sequence[str]
    device: torch.device
    cache: str
    threads: int
    repeats: int
    minutes: float
    output: Path | None
    resume: bool
    list_providers: bool
    commit: str
    command: str


def parse(argv: Sequence[str]) -> Options:
    """Options from command line arguments; ends the program where they are wrong."""
    parser = _parser()
    given = parser.parse_args(argv)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    variants = given.variants or (VARIANTS[:1] if given.quick else VARIANTS)
    sizes = given.sizes or [(512, 512)]
    batches = given.batches or [1]
    dtypes = given.dtypes or ["bfloat16" if on_gpu else "float32"]
    results = RESULTS / f"{'gpu' if on_gpu else 'cpu'}.jsonl"
    memory_variants = given.variants or VARIANTS[:1]
    if on_gpu and "memory" in (given.kinds or ()):
        parser.error(
            "argument --kinds: memory is measured on a CPU; of a GPU it is in each forward"
        )
    kinds = given.kinds or [k for k in KINDS if k != "memory" or not on_gpu]
    return Options(
        kinds=kinds,
        settings=_in_order(variants, sizes, batches, dtypes),
        memory_settings=_in_order(memory_variants, given.sizes or [MEMORY_SIZE], [1], ["float32"]),
        label_sizes=sizes,
        providers=_providers(given.providers, on_gpu),
        device=device,
        cache=given.cache,
        threads=given.threads,
        repeats=given.repeats or _repeats(given.quick, on_gpu),
        minutes=given.minutes,
        output=given.output or (None if given.quick else results),
        resume=given.resume,
        list_providers=given.list,
        commit=given.commit or commit(),
        command=command_of("bench", argv),
    )


def _repeats(quick: bool, on_gpu: bool) -> int:
    if quick:
        return QUICK_REPEATS
    return GPU_REPEATS if on_gpu else REPEATS


def _providers(given: Sequence[str] | None, on_gpu: bool) -> list[str]:
    """Those asked for, else all but the slowest; the baseline first in any case."""
    if given is None:
        given = [n for n in PROVIDERS if on_gpu or n not in SLOW_TO_BUILD_ON_A_CPU]
    return [name for name in PROVIDERS if name in given or name == BASELINE]


def _in_order(
    variants: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    dtypes: Sequence[str],
) -> list[Setting]:
    """All settings, those first that tell most: B0 and B2, small before large."""

    def rank(setting: Setting) -> tuple[int, int, bool, int]:
        height, width = setting.size
        untelling = setting.variant not in TELLING
        return dtypes.index(setting.dtype), height * width, untelling, setting.batch

    return sorted(starmap(Setting, product(variants, sizes, batches, dtypes)), key=rank)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="fastseg bench",
        description="Times SegFormer by fastseg, transformers and other runtimes on this machine, "
        "and takes the peak of their memory. A result that is not right gets no figure, and the "
        "status is 1. `--compare BASE` (see `--compare --help`) compares two commits instead.",
    )
    add = parser.add_argument
    add("--variants", type=some_of(VARIANTS), metavar="B0,B2", help="default: all")
    add(
        "--sizes",
        type=list_of(size),
        metavar="512,1024x2048",
        help="of the images, multiples of 4 (default: 512; for memory 1024x2048)",
    )
    add("--batches", type=list_of(positive), metavar="1,8", help="default: 1")
    add(
        "--dtypes",
        type=some_of(DTYPES),
        metavar="float32,bfloat16",
        help="default: bfloat16 on a GPU, float32 elsewhere",
    )
    add(
        "--kinds",
        type=some_of(KINDS),
        metavar="forward,labels",
        help=f"some of {', '.join(k.replace(' ', '-') for k in KINDS)} (default: all; a GPU's "
        "memory is in the rows of forwards)",
    )
    add(
        "--providers",
        type=some_of(PROVIDERS),
        metavar="fastseg-eager,onnx-runtime",
        help=f"beside {BASELINE}, the baseline; `--list` tells them (default: all, but on a CPU "
        f"not {', '.join(SLOW_TO_BUILD_ON_A_CPU)})",
    )
    add("--list", action="store_true", help="tell which providers can run here, and why others not")
    add(
        "--device",
        choices=("cpu", "cuda"),
        help="default: cuda, the current one, where there is one, else cpu",
    )
    add(
        "--cache",
        choices=CACHES,
        default="warm",
        help="cold: write over a GPU's L2 cache before each call (default: warm)",
    )
    add("--threads", type=positive, default=2, metavar="N", help="on the CPU (default: 2)")
    add(
        "--repeats",
        type=positive,
        metavar="N",
        help=f"rounds (default: {REPEATS}, on a GPU {GPU_REPEATS})",
    )
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
        help=f"B0 alone, {QUICK_REPEATS} rounds; adds no rows unless --output is given",
    )
    add("--output", type=Path, metavar="FILE", help="add rows here (default: bench/results)")
    add(
        "--resume",
        action="store_true",
        help="leave out what the output has from the same command",
    )
    add("--commit", metavar="ID", help="for the rows, where git does not tell")
    return parser

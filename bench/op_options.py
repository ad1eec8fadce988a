"""The options of `python -m bench.ops`."""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .machine import ROOT, commit
from .op_cases import OPS
from .op_rows import PROVIDERS
from .options import QUICK_REPEATS, VARIANTS

RESULTS = ROOT / "bench" / "results"
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}
TELLING = ("b0", "b2")  # B3 to B5 make the calls of B2, only more of them


class Setting(NamedTuple):
    """A forward to take apart."""

    variant: str
    size: tuple[int, int]
    batch: int
    dtype: str

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.variant}, {height}x{width}, batch {self.batch}, {self.dtype}"


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
        repeats=given.repeats or (QUICK_REPEATS if given.quick else 11),
        minutes=given.minutes,
        output=given.output or (None if given.quick else results),
        commit=given.commit or commit(),
        command=shlex.join(["python", "-m", "bench.ops", *argv]),
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
        prog="python -m bench.ops",
        description="Times every op of a SegFormer forward against its eager twin, that twin under "
        "torch.compile, and the least time that bytes and FLOPs allow. A result that is not right "
        "gets no figure, and the status is 1.",
    )
    add = parser.add_argument
    add("--variants", type=_some_of(VARIANTS), metavar="B0,B2", help="default: all")
    add(
        "--sizes",
        type=_list_of(_size),
        metavar="512,1024x2048",
        help="of the image, multiples of 4 (default: 512 and, on a GPU, 1024)",
    )
    add(
        "--batches",
        type=_list_of(_positive),
        metavar="1,8",
        help="default: 1 and, on a GPU, 8",
    )
    add(
        "--dtypes",
        type=_some_of(DTYPES),
        metavar="bfloat16,float32",
        help="default: bfloat16 on a GPU, float32 elsewhere",
    )
    add("--ops", type=_some_of(OPS), metavar="mix_ffn,layer_norm", help="default: all")
    add(
        "--providers",
        type=_some_of(PROVIDERS),
        metavar="compiled,kernels",
        help="beside eager, the baseline (default: all)",
    )
    add("--device", help="default: cuda where there is one, else cpu")
    add("--threads", type=_positive, default=2, metavar="N", help="of torch (default: 2)")
    add("--repeats", type=_positive, metavar="N", help="rounds (default: 11)")
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
    add("--commit", metavar="ID", help="for the rows, where git does not tell")
    return parser


def _list_of(parse_one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: list(dict.fromkeys(map(parse_one, text.split(","))))


def _some_of(choices: Iterable[str]) -> Callable[[str], list[str]]:
    def one(text: str) -> str:
        if text.lower() not in choices:
            raise argparse.ArgumentTypeError(f"expected some of {tuple(choices)}, got {text!r}")
        return text.lower()

    return _list_of(one)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """A side, or height x width."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if len(sides) > 2 or any(side < 64 or side % 4 for side in sides):
        raise argparse.ArgumentTypeError(f"expected multiples of 4 from 64, got {text!r}")
    return sides[0], sides[-1]

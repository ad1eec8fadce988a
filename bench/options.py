"""The options of commands that measure: `python -m bench`, with `ops`, `hosts` and their like."""

from __future__ import annotations

import argparse
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from itertools import product, starmap
from pathlib import Path
from typing import Any

import torch

from fastseg.kernels.core import registry

from .machine import ROOT, commit
from .providers import BASELINE, PROVIDERS
from .providers.training import PROVIDERS as TRAINING
from .setting import DTYPES, VARIANTS, Setting

# Of `bench engines`: providers, with the actors of Ray, and kinds of processes.
LOOP = "a plain loop"
RAY_ACTORS = {"Ray, 1 actor": 1, "Ray, 2 actors": 2}
DRIVER, ACTOR, ENGINE = "driver", "actor", "Ray itself"
RESULTS = ROOT / "bench" / "results"
KINDS = ("forward", "end to end", "labels", "memory")
MEMORY_SIZE = (1024, 2048)
OPS = tuple(registry.OPS)
OP_PROVIDERS = ("eager", "compiled", "kernels")  # the first is the baseline
HOSTS = (
    "transformers 5",
    "transformers 4",
    "smp",
    "NVlabs structure",
    "KerasCV structure",
    "transformers GLPN",
    "transformers PVT v2",
    "timm PVT v2",
)
MODES = ("eager", "compiled")
# Of SegGPT, with the layers of each by default: the published model's, or as few as it may have.
SEGGPT_CASES = {
    "forward": 24,
    "1 prompt": 4,
    "kept prompt": 4,
    "4 prompts": 4,
    "8 prompts": 4,
    "post-processing": 4,
    "memory": 4,
}
TRAINING_HOSTS = tuple(TRAINING)
TRAINING_PROVIDERS = tuple(dict.fromkeys(name for _, some in TRAINING.values() for name in some))

# B3 to B5 make the calls of B2, only more of them; B1 is as wide, and shallow.
_TELLING = ("b0", "b2")
_QUICK_REPEATS, _REPEATS = 3, 11
_SEGGPT_REPEATS = 3  # of seconds each
_GPU_REPEATS = 51  # of a millisecond each
_DESCRIPTIONS = {
    "": "Times SegFormer by fastseg and by others; `--compare BASE` compares commits instead.",
    "ops": "Times every op of a forward against its eager twin, that twin compiled, and its floor.",
    "hosts": "Times other libraries' models, which `make test` installs, before and after "
    "fastseg.accelerate.",
    "seggpt": "Times SegGPT of the published widths, as transformers has it and accelerated.",
    "training": "Times a training step, and takes its memory: other libraries' models as they are "
    "trained, and by fastseg.",
    "numerics": "Takes the mIoU of the embedded model in each precision, and how far its logits "
    "and labels are from float64.",
}

_OTHERS = (
    f"Other benchmarks, each with a --help of its own: {', '.join(filter(None, _DESCRIPTIONS))}, "
    "predict, engines, host-time, gpu, compiles; tables and plots write documents from the rows."
)


class Options(argparse.Namespace):
    """What to measure. What a command has no option for is empty."""

    command: str
    kinds: Sequence[str]
    settings: Sequence[Setting]  # in the order in which they are measured
    memory_settings: Sequence[Setting]
    sizes: Sequence[tuple[int, int]]
    providers: Sequence[str]
    ops: Sequence[str]
    hosts: Sequence[str]
    classes: int  # of "training"
    modes: Sequence[str]
    cases: Sequence[str]
    layers: int  # 0: of each case its own
    dtypes: Sequence[str]
    images: int
    list: bool
    device: torch.device
    threads: int
    repeats: int
    minutes: float
    output: Path | None  # None: add no rows
    resume: bool  # leave out what `output` has from the same command line
    commit: str
    line: str  # the command line as rows have it


def parse(argv: Sequence[str], command: str = "") -> Options:
    """Options from command line arguments; ends the program where they are wrong."""
    parser = _parser(command)
    options = parser.parse_args(argv, Options())
    quick = options.quick
    usual_device = "cuda" if torch.cuda.is_available() else "cpu"
    options.device = torch.device(options.device or usual_device)
    on_gpu = options.device.type == "cuda"
    if on_gpu and "memory" in options.kinds:
        parser.error("argument --kinds: memory is measured on a CPU; a GPU's is in each forward")
    options.kinds = options.kinds or [one for one in KINDS if one != "memory" or not on_gpu]
    of_memory = (options.variants or VARIANTS[:1], options.sizes or [MEMORY_SIZE])
    options.memory_settings = _in_order(*of_memory, [1], ["float32"])
    wide = command == "ops" and on_gpu and not quick
    variants = _TELLING if command == "training" else VARIANTS
    options.variants = options.variants or (VARIANTS[:1] if quick else variants)
    options.sizes = options.sizes or [(512, 512), (1024, 1024)][: 2 if wide else 1]
    usual_batches = [2] if command == "training" else [1, 8][: 2 if wide else 1]
    batches = options.batches or usual_batches
    dtypes = options.dtypes or ["bfloat16" if on_gpu else "float32"]
    options.settings = _in_order(options.variants, options.sizes, batches, dtypes)
    if command == "ops":
        chosen = options.providers or OP_PROVIDERS
        options.providers = [n for n in OP_PROVIDERS if n in chosen or n == OP_PROVIDERS[0]]
    elif command == "training":
        # Of a compiled step the first takes minutes on a CPU.
        usual = [name for name in TRAINING_PROVIDERS if not name.endswith("compiled")]
        options.providers = options.providers or usual
    else:
        usual = [name for name, one in PROVIDERS.items() if on_gpu or not one.slow_to_build]
        chosen = options.providers or usual
        options.providers = [name for name in PROVIDERS if name in chosen or name == BASELINE]
    repeats = _GPU_REPEATS if on_gpu and command == "" else _REPEATS
    repeats = _SEGGPT_REPEATS if command == "seggpt" else repeats
    options.repeats = options.repeats or (_QUICK_REPEATS if quick else repeats)
    where = {"": "{}", "ops": "ops_{}"}.get(command, command).format("gpu" if on_gpu else "cpu")
    options.output = options.output or (None if quick else RESULTS / f"{where}.jsonl")
    options.commit = options.commit or commit()
    options.command, options.line = command, _line(command, argv)
    return options


def _in_order(*fields: Sequence[Any]) -> list[Setting]:
    """All settings of such fields, those first that tell most: B0 and B2, small before large."""

    def rank(one: Setting) -> tuple[int, int, bool, int]:
        untelling = one.variant not in _TELLING
        return fields[-1].index(one.dtype), one.size[0] * one.size[1], untelling, one.batch

    return sorted(starmap(Setting, product(*fields)), key=rank)


def _line(command: str, argv: Sequence[str]) -> str:
    """Without what changes only how far a run gets."""
    line = shlex.join(["python", "-m", "bench", *filter(None, [command]), *argv])
    return re.sub(r" --(resume|minutes[ =]\S+)", "", line)


# Types of arguments


def list_of(parse_one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Of values between commas."""
    return lambda text: list(dict.fromkeys(map(parse_one, text.split(","))))


def some_of(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """Of names between commas, in upper or lower case, spaces as hyphens."""
    by_name = {choice.lower().replace(" ", "-"): choice for choice in choices}

    def one(text: str) -> str:
        name = text.strip().lower().replace(" ", "-")
        if name not in by_name:
            raise argparse.ArgumentTypeError(f"expected some of {tuple(by_name)}, got {text!r}")
        return by_name[name]

    return list_of(one)


def integer(least: int = 1) -> Callable[[str], int]:
    """From `least`."""

    def parse_one(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer from {least}, got {text!r}")
        return int(text)

    return parse_one


def layers(text: str) -> int:
    """A multiple of 4."""
    count = integer(4)(text)
    if count % 4:
        raise argparse.ArgumentTypeError(f"expected a multiple of 4, got {text!r}")
    return count


def size(text: str) -> tuple[int, int]:
    """A side, or height x width."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if len(sides) > 2 or any(side < 64 or side % 4 for side in sides):
        raise argparse.ArgumentTypeError(f"expected multiples of 4 from 64, got {text!r}")
    return sides[0], sides[-1]


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog=f"python -m bench {command}".strip(),
        description=f"{_DESCRIPTIONS[command]} A result that is not right gets no figure, and the "
        "status is 1.",
        epilog=None if command else _OTHERS,
    )
    grid, ops, hosts, seggpt, training, numerics = (command == name for name in _DESCRIPTIONS)
    models, timed = grid or ops or hosts or training, not numerics

    def add(wanted: bool, name: str, help: str, default: Any = (), **settings: Any) -> None:
        if wanted:
            parser.add_argument(name, default=default, help=help, **settings)
        else:
            parser.set_defaults(**{name.strip("-"): default})

    slow = ", ".join(name for name, one in PROVIDERS.items() if one.slow_to_build)
    names = f"beside {BASELINE}; `--list` tells them (default: all, on a CPU not {slow})"
    if ops:
        names = "beside eager (default: all)"
    if training:
        names = f"of {', '.join(TRAINING_PROVIDERS)} (default: all but compiled)"
    add(models, "--variants", "default: all", type=some_of(VARIANTS), metavar="b0,b2")
    sizes = "multiples of 4 (default: 512; of memory 1024x2048, of ops on a GPU 512,1024)"
    add(models, "--sizes", sizes, type=list_of(size), metavar="512,1024x2048")
    batches = "default: 1; of ops on a GPU 1,8; of training 2"
    add(grid or ops or training, "--batches", batches, type=list_of(integer()), metavar="1,8")
    dtypes = "default: bfloat16 on a GPU, float32 elsewhere"
    typed = not (hosts or numerics)
    add(typed, "--dtypes", dtypes, type=some_of(DTYPES), metavar="float32,bfloat16")
    kinds = "forward, end-to-end, labels, memory (default: all; a GPU's memory is in each forward)"
    add(grid, "--kinds", kinds, type=some_of(KINDS), metavar="A,B")
    known = OP_PROVIDERS if ops else TRAINING_PROVIDERS if training else PROVIDERS
    add(grid or ops or training, "--providers", names, type=some_of(known), metavar="A,B")
    add(ops, "--ops", "default: all", OPS, type=some_of(OPS), metavar="mix_ffn,layer_norm")
    libraries = TRAINING_HOSTS if training else HOSTS
    of_them = f"of {', '.join(libraries)} (default: all)"
    add(hosts or training, "--hosts", of_them, libraries, type=some_of(libraries), metavar="A,B")
    add(training, "--classes", "default: 150", 150, type=integer(2), metavar="N")
    add(hosts, "--modes", "default: eager,compiled", MODES, type=some_of(MODES), metavar="eager")
    cases = f"of {', '.join(SEGGPT_CASES)} (default: all)"
    add(seggpt, "--cases", cases, SEGGPT_CASES, type=some_of(SEGGPT_CASES), metavar="A,B")
    fewer = "a multiple of 4 (default: 24 for forwards, 4 for the rest)"
    add(seggpt, "--layers", fewer, 0, type=layers, metavar="N")
    add(numerics, "--images", "scenes (default: 4)", 4, type=integer())
    why = "tell which providers can run here, and why others cannot"
    add(grid, "--list", why, False, action="store_true")
    device = "default: cuda where there is one, else cpu"
    add(not hosts, "--device", device, "cpu" if hosts else None, choices=("cpu", "cuda"))
    add(True, "--threads", "on the CPU (default: 2)", 2, type=integer(), metavar="N")
    add(timed, "--repeats", "rounds", None, type=integer(), metavar="N")
    late = "begin nothing new after this time (default: no limit)"
    add(timed, "--minutes", late, math.inf, type=float, metavar="M")
    quick = f"B0, {_QUICK_REPEATS} rounds; adds no rows unless --output is given"
    add(timed, "--quick", quick, False, action="store_true")
    add(True, "--output", "add rows here (default: in bench/results)", None, type=Path)
    done = "leave out what the output has from this command"
    add(timed, "--resume", done, False, action="store_true")
    add(True, "--commit", "for the rows, where git does not tell", None, metavar="ID")
    return parser

"""The stages of `bench.gpu`: what each runs, its share of the time, and where it cannot run.

The order: first whether anything works at all, then the figures of whole models, which tell most
and are behind parity gates of their own, then ops, which tell where the time goes, then all tests;
what takes long to tell a little more comes last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = "gpu.jsonl"
TUNED_ROWS = "gpu_tuned.jsonl"
OP_ROWS = "ops_gpu.jsonl"
TUNED = "tuned.json"
SETUP = "setup.json"
TESTS = "tests.jsonl"
SANITIZER = "sanitizer.jsonl"
PLOTS = "plots"

# Processes run in DIR/layout. Rows keep their command, so it names no path of the machine.
DIR = ".."


@dataclass(frozen=True)
class Options:
    """One call.

    Attributes:
        out: the folder of results, absolute.
        minutes: after which nothing runs any more.
        device: "cuda", or "cpu" to try the script itself.
        quick: the smallest work of every stage.
        commit: for the rows.
    """

    out: Path
    minutes: float
    device: str
    quick: bool
    commit: str

    def setup(self) -> dict[str, Any]:
        """What the setup check found; empty where it did not run."""
        try:
            found = json.loads((self.out / SETUP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


# From options, seconds that are left, and whether to leave out what is done: arguments of python.
Command = Callable[[Options, float, bool], list[str]]


def _never(options: Options) -> str | None:
    return None


@dataclass(frozen=True)
class Stage:
    """A part of the run, in a process of its own.

    Attributes:
        share: of the time, against the shares of the stages after it.
        least: seconds; it is not begun with less.
        skip: why it cannot run here, or None.
        variables: of the environment.
        always: run in every call.
        unfinished: words in its output by which it says that it is not complete.
    """

    name: str
    purpose: str
    share: float
    command: Command
    least: float = 20.0
    skip: Callable[[Options], str | None] = _never
    variables: Callable[[Options], dict[str, str]] = lambda options: {}
    always: bool = False
    unfinished: tuple[str, ...] = ("the time is up",)


def _minutes(seconds: float) -> str:
    """For a command that stops by itself: a little less than it has."""
    return f"{0.9 * seconds / 60:.2f}"


def _module(name: str, *arguments: str) -> list[str]:
    return ["-m", name, *arguments]


# What cannot run where


def _no_gpu(options: Options) -> str | None:
    if options.device != "cuda":
        return f"needs a GPU, and --device is {options.device}"
    if options.setup().get("cuda") is False:
        return "the setup check found no GPU that torch can use"
    return None


def _lacks(options: Options, *modules: str) -> str | None:
    versions = options.setup().get("modules", {})
    absent = [name for name in modules if name in versions and versions[name] is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def _no_models(options: Options) -> str | None:
    on_gpu = options.device == "cuda"
    return (_no_gpu(options) if on_gpu else None) or _lacks(options, "transformers", "tqdm")


def _no_gpu_models(options: Options) -> str | None:
    """Of what takes too long elsewhere."""
    return _no_gpu(options) or _no_models(options)


def _no_ops(options: Options) -> str | None:
    on_gpu = options.device == "cuda"
    return (_no_gpu(options) if on_gpu else None) or _lacks(options, "tqdm")


def _no_tests(options: Options) -> str | None:
    return _no_gpu(options) or _lacks(options, "pytest", "triton")


def _no_tuner(options: Options) -> str | None:
    return _no_gpu(options) or _lacks(options, "triton")


def _no_tuned(options: Options) -> str | None:
    if not (options.out / TUNED).is_file():
        return f"the tuner wrote no {TUNED}"
    return _no_models(options)


def sanitizer_program() -> str | None:
    """compute-sanitizer, which comes with CUDA, also where it is not on the PATH."""
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


def _no_sanitizer(options: Options) -> str | None:
    if reason := _no_tests(options):
        return reason
    return None if sanitizer_program() else "compute-sanitizer is not installed"


def _no_plots(options: Options) -> str | None:
    if not any((options.out / name).is_file() for name in (ROWS, TUNED_ROWS)):
        return "there are no rows to plot"
    return _lacks(options, "matplotlib")


# What runs


def _setup(options: Options, seconds: float, resume: bool) -> list[str]:
    return _module("bench.gpu_check", "--out", DIR, "--device", options.device)


def _tests(*files: str) -> Command:
    """The kernel tests in `files`, or all."""

    def command(options: Options, seconds: float, resume: bool) -> list[str]:
        again = [] if resume else ["--again"]
        return _module(
            "bench.gpu_tests", "--out", DIR, "--minutes", _minutes(seconds), *again, *files
        )

    return command


def _sanitizer(options: Options, seconds: float, resume: bool) -> list[str]:
    again = [] if resume else ["--again"]
    return _module("bench.gpu_sanitizer", "--out", DIR, "--minutes", _minutes(seconds), *again)


def _grid(
    rows: str, providers: str, kinds: str, variants: str, sizes: str, batches: str
) -> Command:
    """`python -m bench` of a part of the grid; its rows go to `rows`."""

    def command(options: Options, seconds: float, resume: bool) -> list[str]:
        small = ["b0", "64", "1"] if options.quick else [variants, sizes, batches]
        return _module(
            "bench",
            *("--device", options.device, "--kinds", kinds),
            *("--variants", small[0], "--sizes", small[1], "--batches", small[2]),
            *("--providers", providers, "--commit", options.commit),
            *(["--repeats", "3"] if options.quick else []),
            *("--output", f"{DIR}/{rows}", "--minutes", _minutes(seconds)),
            *(["--resume"] if resume else []),
        )

    return command


def _ops(options: Options, seconds: float, resume: bool) -> list[str]:
    small = ["b0", "64"] if options.quick else ["b0,b2", "512"]
    return _module(
        "bench.ops",
        *("--device", options.device),
        *("--variants", small[0], "--sizes", small[1], "--batches", "1"),
        *(["--repeats", "3"] if options.quick else []),
        *("--commit", options.commit),
        *("--output", f"{DIR}/{OP_ROWS}", "--minutes", _minutes(seconds)),
        *(["--resume"] if resume else []),
    )


def _tune(options: Options, seconds: float, resume: bool) -> list[str]:
    minutes = max(1, int(seconds / 60))
    return _module(
        *("fastseg", "tune", "--output", f"{DIR}/{TUNED}", "--variants", "b0"),
        *("--batch", "1", "--minutes", str(minutes), "--device", options.device),
    )


def _plots(options: Options, seconds: float, resume: bool) -> list[str]:
    rows = [f"{DIR}/{name}" for name in (ROWS, TUNED_ROWS) if (options.out / name).is_file()]
    return _module("bench.plots", "--rows", *rows, "--out", f"{DIR}/{PLOTS}")


# A later run of a case takes the place of an earlier one, so it has all its providers and more.
_QUICK_TO_BUILD = "transformers-cuda-graph,fastseg-eager,fastseg-triton,fastseg-cuda-graph"
_PEERS = f"{_QUICK_TO_BUILD},transformers-compiled,fastseg-accelerate,fastseg-compiled"
_PEERS += ",torch-tensorrt,smp"
_ALL_VARIANTS = "b0,b1,b2,b3,b4,b5"

STAGES = (
    Stage("setup", "versions, device, clocks, one small kernel", 10, _setup, least=30, always=True),
    Stage(
        "smoke",
        "the smallest kernel tests, and a whole tiny model",
        8,
        _tests("norm/test_layer_norm.py", "test_model.py"),
        skip=_no_tests,
    ),
    Stage(
        "models",
        "B0 to B5 at 512x512: fastseg and transformers, eager and in CUDA graphs",
        18,
        _grid(ROWS, _QUICK_TO_BUILD, "forward,labels", _ALL_VARIANTS, "512", "1,8"),
        skip=_no_models,
    ),
    Stage("ops", "each op of B0 and B2: eager, compiled, kernels, floor", 12, _ops, skip=_no_ops),
    Stage("tests", "all kernel tests", 18, _tests(), skip=_no_tests),
    Stage(
        "peers",
        "B0 and B2 against torch.compile too, from pixels and from images",
        15,
        _grid(ROWS, _PEERS, "forward,end-to-end", "b0,b2", "512", "1,8"),
        skip=_no_models,
    ),
    Stage(
        "tune",
        "launch configurations for B0, batch 1",
        10,
        _tune,
        least=75,  # it takes whole minutes
        skip=_no_tuner,
        unfinished=("later calls were not tuned",),
    ),
    Stage(
        "models-tuned",
        "B0 once more, with the configurations found",
        4,
        _grid(TUNED_ROWS, _QUICK_TO_BUILD, "forward", "b0", "512", "1"),
        skip=_no_tuned,
        variables=lambda options: {"FASTSEG_CONFIGS": str(options.out / TUNED)},
    ),
    Stage("sanitizer", "memcheck and racecheck of tiny models", 8, _sanitizer, skip=_no_sanitizer),
    Stage(
        "autotune",
        'B0 and B2 against torch.compile(mode="max-autotune") too',
        10,
        _grid(ROWS, f"{_PEERS},transformers-max-autotune", "forward", "b0,b2", "512", "1,8"),
        skip=_no_gpu_models,
    ),
    Stage(
        "large",
        "1024x1024 and 1024x2048, batch 1, 8 and 32",
        10,
        _grid(ROWS, _QUICK_TO_BUILD, "forward", _ALL_VARIANTS, "1024,1024x2048", "1,8,32"),
        skip=_no_gpu_models,
    ),
    Stage("plots", "of the rows so far", 4, _plots, least=15, skip=_no_plots, always=True),
)

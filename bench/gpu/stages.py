"""The stages of `bench gpu`: what each runs, its share of the time, and where it cannot run.

The order: first whether anything works at all, then the figures of whole models, which tell most
and are behind parity gates of their own, then ops, which tell where the time goes, then all tests;
what takes long to tell a little more comes last.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = "gpu.jsonl"
TUNED_ROWS = "gpu_tuned.jsonl"
OP_ROWS = "ops_gpu.jsonl"
TUNED = "tuned.json"
TESTS = "tests.jsonl"
RECORDS = "stages.jsonl"


@dataclass(frozen=True)
class Options:
    """One call."""

    out: Path  # the folder of results, absolute
    minutes: float  # after which nothing runs any more
    device: str  # "cuda", or "cpu" to try the script itself
    quick: bool  # the smallest work of every stage
    commit: str  # for the rows


# From options, seconds that are left, and whether to leave out what is done: a command line.
Command = Callable[[Options, float, bool], list[str]]
Skip = Callable[[Options], str | None]


@dataclass(frozen=True)
class Stage:
    """A part of the run, in a process of its own."""

    name: str
    purpose: str
    share: float  # of the time, against the shares of the stages after it
    command: Command
    skip: Skip = lambda options: None  # why it cannot run here, or None
    least: float = 20.0  # seconds; it is not begun with less
    variables: Mapping[str, str] = field(default_factory=dict)  # {out}: the folder of results
    always: bool = False  # run in every call
    unfinished: str = "the time is up"  # words by which it says that it is not complete


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none where it is absent."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """The last record of each stage that was begun or skipped, by its name."""
    return {record["name"]: record for record in read_lines(out / RECORDS)}


def _needs(*modules: str, gpu: bool = False, file: str = "", sanitizer: bool = False) -> Skip:
    """Modules that are installed, a GPU, a file among the results, compute-sanitizer."""

    def skip(options: Options) -> str | None:
        if gpu and options.device != "cuda":
            return f"needs a GPU, and --device is {options.device}"
        if read_records(options.out).get("setup", {}).get("status") == "failed":
            return "the setup check failed"
        if file and not (options.out / file).is_file():
            return f"there is no {file}"
        if sanitizer and not shutil.which(_SANITIZER):
            return "compute-sanitizer is not installed"
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    return skip


def _line(text: str, small: str = "") -> Command:
    """A command line with what the call knows in braces, and of a quick one `small` behind."""

    def command(options: Options, seconds: float, resume: bool) -> list[str]:
        spread = importlib.util.find_spec("xdist") is not None
        known = {
            "python": f"{shlex.quote(sys.executable)} -m",
            "device": options.device,
            "commit": options.commit,
            "minutes": f"{0.9 * seconds / 60:.2f}",  # it stops by itself
            "whole_minutes": max(1, int(seconds / 60)),
            "resume": "--resume" if resume else "",
            "again": "" if resume else "--again",
            "workers": "-n auto --maxprocesses 8" if spread else "",
        }
        return shlex.split(f"{text} {small if options.quick else ''}".format(**known))

    return command


def _bench(arguments: str, rows: str) -> Command:
    """`python -m bench` with these. Rows keep their command, so it names no path of the machine."""
    text = f"{{python}} bench {arguments} --device {{device}} --commit {{commit}} {{resume}} "
    text += f"--minutes {{minutes}} --output ../{rows}"  # processes run in DIR/layout
    # Of options the last counts.
    return _line(text, "--variants b0 --sizes 64 --batches 1 --repeats 3")


def _tests(*files: str) -> Command:
    """Kernel tests; those in the log are not run again, and the sanitizer's is a stage."""
    folder = "tests/kernels/triton"
    text = f"{{python}} pytest -c {shlex.quote(str(ROOT / 'pyproject.toml'))} --rootdir . "
    text += "-o addopts= -o pythonpath= -q -m gpu --tb=short -p no:cacheprovider "
    text += f"-p bench.gpu.pytest_plugin --log-tests ../{TESTS} {{again}} {{workers}} "
    text += f"--deselect {folder}/test_gpu.py::test_sanitizer "
    return _line(text + " ".join(f"{folder}/{name}" for name in files or ("",)))


_SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
_CASES = f"{shlex.quote(sys.executable)} tests/kernels/triton/sanitizer_cases.py"
_MEMCHECK = _line(f"{_SANITIZER} --tool memcheck --error-exitcode 99 {_CASES}")
_RACECHECK = _line(f"{_SANITIZER} --tool racecheck --error-exitcode 99 {_CASES}")
_SETUP = _line("{python} bench.gpu.check --device {device}")
_SMOKE = _tests("norm/test_layer_norm.py", "test_model.py")
_TUNE = _line(f"{{python}} fastseg tune --output ../{TUNED} --variants b0 --batch 1 "
              "--minutes {whole_minutes} --device {device}")  # fmt: skip
_PLOTS = _line(f"{{python}} bench plots --rows ../{ROWS} --out ../plots")
# A later run of a case takes the place of an earlier one, so it has all its providers and more.
_QUICK = "transformers-cuda-graph,fastseg-eager,fastseg-triton,fastseg-cuda-graph"
_PEERS = f"{_QUICK},transformers-compiled,fastseg-accelerate,fastseg-compiled,torch-tensorrt"
_AT_512 = "--kinds {} --variants {} --batches {} --providers {} --sizes 512"
_OF_MODELS = _AT_512.format("forward,labels", "b0,b1,b2,b3,b4,b5", "1,8", _QUICK)
_OF_PEERS = _AT_512.format("forward,end-to-end", "b0,b2", "1,8", _PEERS)
_OF_TUNED = _AT_512.format("forward", "b0", "1", _QUICK)
_OF_AUTOTUNE = _AT_512.format("forward", "b0,b2", "1,8", f"{_PEERS},transformers-max-autotune")
_OF_LARGE = f"--kinds forward --sizes 1024,1024x2048 --batches 1,8,32 --providers {_QUICK}"
_OF_OPS = "ops --variants b0,b2 --sizes 512 --batches 1"
_MODELS = _needs("transformers", "tqdm")
_GPU_MODELS = _needs("transformers", "tqdm", gpu=True)  # of what takes too long elsewhere
_KERNELS = _needs("pytest", "triton", gpu=True)
_CHECKED = _needs("triton", gpu=True, sanitizer=True)
# Each tensor an allocation of its own, so that memcheck sees where it ends.
_UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_CONFIGS = {"FASTSEG_CONFIGS": f"{{out}}/{TUNED}"}

# fmt: off
STAGES = (
    Stage("setup", "versions, device, clocks, one small kernel", 10, _SETUP, least=30, always=True),
    Stage("smoke", "the smallest kernel tests, and a whole tiny model", 8, _SMOKE, _KERNELS),
    Stage("models", "B0 to B5 at 512x512: fastseg and transformers, eager and in CUDA graphs", 18,
          _bench(_OF_MODELS, ROWS), _MODELS),
    Stage("ops", "each op of B0 and B2: eager, compiled, kernels, floor", 12,
          _bench(_OF_OPS, OP_ROWS), _needs("tqdm")),
    Stage("tests", "all kernel tests", 18, _tests(), _KERNELS),
    Stage("peers", "B0 and B2 against torch.compile too, from pixels and from images", 15,
          _bench(_OF_PEERS, ROWS), _MODELS),
    Stage("tune", "launch configurations for B0, batch 1", 10, _TUNE, _needs("triton", gpu=True),
          least=75, unfinished="later calls were not tuned"),  # it takes whole minutes
    Stage("models-tuned", "B0 once more, with the configurations found", 4,
          _bench(_OF_TUNED, TUNED_ROWS), _needs("transformers", file=TUNED), variables=_CONFIGS),
    Stage("memcheck", "compute-sanitizer's memcheck of tiny models", 4, _MEMCHECK, _CHECKED,
          variables=_UNCACHED),
    Stage("racecheck", "compute-sanitizer's racecheck of tiny models", 4, _RACECHECK, _CHECKED,
          variables=_UNCACHED),
    Stage("autotune", 'B0 and B2 against torch.compile(mode="max-autotune") too', 10,
          _bench(_OF_AUTOTUNE, ROWS), _GPU_MODELS),
    Stage("large", "1024x1024 and 1024x2048, batch 1, 8 and 32", 10, _bench(_OF_LARGE, ROWS),
          _GPU_MODELS),
    Stage("plots", "of the rows so far", 4, _PLOTS, _needs("matplotlib", "pandas", file=ROWS),
          least=15, always=True),
)
# fmt: on

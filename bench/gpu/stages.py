"""The stages of `bench gpu`: what each runs, its share of the time, and where it cannot run.

The order: kernels are compiled by all cores, so that everything after it only runs; whether results
are right; where the time goes; whole models and their strongest peer; then what can be made better,
and whether it was; a training step; all tests; and last the sanitizer, which takes long.
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
KERNELS = "kernels.jsonl"
TUNED = "tuned.json"
PARITY = "parity.jsonl"
TESTS = "tests.jsonl"
RECORDS = "stages.jsonl"


@dataclass(frozen=True)
class Options:
    """One call."""

    out: Path  # the folder of results, absolute
    minutes: float  # after which nothing runs any more
    device: str  # "cuda", or "cpu" to rehearse
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


def _needs(*modules: str, file: str = "", sanitizer: bool = False) -> Skip:
    """Modules that are installed, a file among the results, compute-sanitizer for a GPU."""

    def skip(options: Options) -> str | None:
        if read_records(options.out).get("setup", {}).get("status") == "failed":
            return "the setup check failed"
        if file and not (options.out / file).is_file():
            return f"there is no {file}"
        if sanitizer and options.device == "cuda" and not shutil.which(_SANITIZER):
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
            "mended": "" if options.device == "cuda" else "tests.kernels.triton.mend_interpreter",
            "device": options.device,
            "commit": options.commit,
            "minutes": f"{0.85 * seconds / 60:.2f}",  # it stops by itself
            "resume": "--resume" if resume else "",
            "again": "" if resume else "--again",
            "workers": "-n auto --maxprocesses 14 --dist loadgroup" if spread else "",
        }
        return shlex.split(f"{text} {small if options.quick else ''}".format(**known))

    return command


def _bench(arguments: str, rows: str, small: str = "") -> Command:
    """`python -m bench` with these. Rows keep their command, so it names no path of the machine."""
    text = f"{{python}} bench {arguments} --device {{device}} --commit {{commit}} {{resume}} "
    text += f"--minutes {{minutes}} --output ../{rows}"  # processes run in DIR/layout
    # Of options the last counts.
    return _line(text, f"--variants b0 --sizes 64 --batches 1 --repeats 3 {small}")


def _pytest(log: str, on_gpu: str, elsewhere: str) -> Command:
    """Tests of these files in one pool, but for those that are in the log."""
    text = f"{{python}} pytest -c {shlex.quote(str(ROOT / 'pyproject.toml'))} --rootdir . "
    text += "-o addopts= -o pythonpath= -q --tb=short -p no:cacheprovider {workers} "
    text += f"-p bench.gpu.pytest_plugin --log-tests ../{log} {{again}} --test-seconds 60 "

    def command(options: Options, seconds: float, resume: bool) -> list[str]:
        files = on_gpu if options.device == "cuda" else elsewhere
        return _line(text + files)(options, seconds, resume)

    return command


_SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def _sanitizer(tool: str) -> Command:
    """One forward of tiny models under compute-sanitizer; without it where there is no GPU."""
    program = "{python} {mended} tests.kernels.triton.sanitizer_cases {device}"

    def command(options: Options, seconds: float, resume: bool) -> list[str]:
        before = f"{_SANITIZER} --tool {tool} --error-exitcode 99 "
        text = before * (options.device == "cuda") + program
        return _line(text)(options, seconds, resume)

    return command


_SETUP = _line("{python} bench.gpu.check --device {device}")
_PRECOMPILE = _line("{python} bench.gpu.precompile --device {device}", "--quick")
_TIMES = f"{{python}} bench.gpu.kernel_times --device {{device}} --output ../{KERNELS}"
_PARITY = _pytest(PARITY, *["tests/kernels/test_forwards.py"] * 2)
# What tells most comes first; the tuner has had a stage, and the sanitizer gets one. Without a GPU,
# Triton's interpreter runs the smallest.
_IN = "tests/kernels/triton"
_ALL_TESTS = f"-m gpu {_IN}/test_gpu.py {_IN}/test_model.py {_IN} --ignore {_IN}/tune "
_ALL_TESTS += f"--deselect {_IN}/test_gpu.py::test_sanitizer"
_TESTS = _pytest(TESTS, _ALL_TESTS, f"{_IN}/norm {_IN}/test_gpu.py")
_TUNE = f"{{python}} {{mended}} fastseg tune --output ../{TUNED} --minutes {{minutes}} --device "
_SMALL_TUNE = "--variants b0 --batch 1 --size 32 32 --dtype float32"
# A later run of a case takes the place of an earlier one, so it has all its providers and more.
_GRAPHS = "transformers-cuda-graph,fastseg-cuda-graph"
_FEW = f"{_GRAPHS},fastseg-accelerate,fastseg-triton,fastseg-unchecked-graph"
_PEERS = f"{_FEW},transformers-compiled,transformers-reduce-overhead,fastseg-compiled"
_AT_512 = "--kinds forward --sizes 512 --variants {} --batches {} --providers {}"
_OF_MODELS = _AT_512.format("b0,b2,b5", "1,8", _FEW)
_OF_PEERS = _AT_512.format("b0,b2", "1", _PEERS)
_OF_TRAINING = "training --hosts transformers-5 --variants b0,b2 --batches 8"
_OF_TUNED = _AT_512.format("b0,b2,b5", "1,8", _GRAPHS)
_MODELS = _needs("transformers", "tqdm")
_KERNELS = _needs("triton")
_TESTED = _needs("pytest", "triton")
_CHECKED = _needs("triton", sanitizer=True)
# Each tensor an allocation of its own, so that memcheck sees where it ends.
_UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_CONFIGS = {"FASTSEG_CONFIGS": f"{{out}}/{TUNED}"}
_INTERPRET = {"TRITON_INTERPRET": "{interpret}"}  # "1" without a GPU

# Shares are the seconds of a call of ten minutes.
# fmt: off
STAGES = (
    Stage("setup", "versions, device, clocks, one small kernel", 10, _SETUP, least=30, always=True),
    Stage("precompile", "the kernels of B0, B2 and B5, by all cores", 50,
          _PRECOMPILE, _KERNELS),
    Stage("parity", "B0, B2, B5 against float64; repeats, streams, graphs", 30,
          _PARITY, _TESTED),
    Stage("kernels", "each kernel's time, from replays of graphs", 45,
          _line(_TIMES, "--quick"), _KERNELS),
    Stage("models", "B0, B2, B5, batch 1 and 8: fastseg and transformers, with and without graphs",
          60, _bench(_OF_MODELS, ROWS), _MODELS),
    Stage("peers", "B0 and B2 against torch.compile, also in reduce-overhead", 100,
          _bench(_OF_PEERS, ROWS, "--providers transformers-reduce-overhead"), _MODELS),
    Stage("tune", "launch configurations of B0 and B2, what takes most time first", 105,
          _line(_TUNE + "{device}", _SMALL_TUNE), _KERNELS, variables=_INTERPRET, least=30,
          unfinished="later calls were not tuned"),
    Stage("models-tuned", "B0, B2, B5 once more, with the configurations found", 30,
          _bench(_OF_TUNED, TUNED_ROWS), _needs("transformers", file=TUNED), variables=_CONFIGS),
    Stage("training", "a training step of B0 and B2, batch 8: fastseg and transformers", 30,
          _bench(_OF_TRAINING, ROWS, "--classes 19"), _MODELS),
    Stage("tests", "all kernel tests", 125, _TESTS, _TESTED, variables=_INTERPRET),
    Stage("memcheck", "compute-sanitizer's memcheck of tiny models", 30, _sanitizer("memcheck"),
          _CHECKED, variables=_INTERPRET | _UNCACHED),
    Stage("racecheck", "compute-sanitizer's racecheck of tiny models", 30, _sanitizer("racecheck"),
          _CHECKED, variables=_INTERPRET | _UNCACHED),
)
# fmt: on

"""bench.gpu: stages, their time, what a second call does, the layout. No test needs a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest

from bench import (
    gpu,
    gpu_layout,
    gpu_run,
    gpu_sanitizer,
    gpu_stages,
    gpu_summary,
    gpu_tests,
    op_options,
    options,
)
from bench.gpu_stages import Options, Stage

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Fake stages take no time, and neither shall what is kept back for the real ones."""
    monkeypatch.setattr(gpu_run, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(gpu_run, "_MARGIN_SECONDS", 0.0)


def fake(name, code, share=1.0, least=0.1, **fields):
    """A stage that runs `code`, which knows `resume` and `seconds`; NAME.runs counts its runs."""

    def command(options, seconds, resume):
        head = f"import sys; open('../{name}.runs', 'a').write('x')\n"
        known = "resume, seconds = sys.argv[1] == 'True', float(sys.argv[2])\n"
        script = options.out / f"{name}.py"
        script.write_text(head + known + textwrap.dedent(code))
        return [str(script), str(resume), str(seconds)]

    return Stage(name, "", share, command, least=least, **fields)


def given(out, seconds=60.0):
    return Options(out, seconds / 60, device="cpu", quick=True, commit="abc")


def run(out, stages, seconds=60.0, chosen=None, again=()):
    names = [stage.name for stage in stages]
    return gpu_run.run(given(out, seconds), stages, chosen or names, again)


def runs(out, name):
    path = out / f"{name}.runs"
    return len(path.read_text()) if path.exists() else 0


def statuses(out):
    return {name: record["status"] for name, record in gpu_run.read_records(out).items()}


# Stages


def test_each_stage_leaves_a_record_and_a_log(tmp_path, capsys):
    stages = [
        fake("good", "print('all is well')"),
        fake("bad", "print('first'); raise SystemExit('the last words')"),
        fake("absent", "", skip=lambda options: "no such tool"),
    ]
    assert run(tmp_path, stages) == 1
    assert statuses(tmp_path) == {"good": "ok", "bad": "failed", "absent": "skipped"}
    records = gpu_run.read_records(tmp_path)
    assert records["bad"]["reason"] == "exit status 1: the last words"
    assert records["absent"]["reason"] == "no such tool"
    assert "all is well" in (tmp_path / "good.log").read_text()
    assert runs(tmp_path, "absent") == 0
    table = (tmp_path / "summary.md").read_text()
    assert "| bad | failed | " in table
    assert "the last words" in table
    assert table in capsys.readouterr().out


def test_a_stage_ends_with_its_time_and_all_that_it_started(tmp_path):
    # Both the stage and its child ignore SIGTERM.
    code = """
        import os, signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ.get("CHILD") is None:
            subprocess.Popen(
                [sys.executable, *sys.argv], env={**os.environ, "CHILD": "1"}
            )
        open("../pids", "a").write(f"{os.getpid()}\\n")
        open("../rows.jsonl", "a").write('{"whole": 1}\\n{"half')
        time.sleep(60)
    """
    began = time.monotonic()
    stages = [fake("slow", code), fake("next", "")]
    assert run(tmp_path, stages, seconds=8.0) == 0
    assert time.monotonic() - began < 8.0
    assert statuses(tmp_path) == {"slow": "timeout", "next": "ok"}
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(map(alive, pids))
    # What was written stays, whole lines of it, so that rows can follow.
    assert (tmp_path / "rows.jsonl").read_text().startswith('{"whole": 1}\n')
    assert (tmp_path / "rows.jsonl").read_text().endswith("\n")


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and nobody has asked for its status


def test_time_is_shared_and_what_is_left_flows_on(tmp_path):
    stages = [fake("one", ""), fake("two", "", share=2.0), fake("three", "")]
    assert gpu_run._share(stages[0], stages, 80.0) == 20.0
    assert gpu_run._share(stages[1], stages[1:], 75.0) == 50.0
    assert gpu_run._share(stages[2], stages[2:], 70.0) == 70.0
    demanding = fake("four", "", least=30.0)
    assert gpu_run._share(demanding, [demanding, *stages], 50.0) == 30.0
    assert gpu_run._share(demanding, [demanding, *stages], 29.0) is None


def test_a_stage_with_too_little_time_is_not_begun(tmp_path, capsys):
    assert run(tmp_path, [fake("one", ""), fake("long", "", least=100.0)], seconds=20.0) == 0
    assert statuses(tmp_path) == {"one": "ok"}
    assert "| long | not begun | | |" in (tmp_path / "summary.md").read_text()
    assert "long: not begun, the time is up" in capsys.readouterr().out


def test_a_second_call_goes_on(tmp_path):
    stages = [
        fake("good", ""),
        fake("bad", "raise SystemExit(1)"),
        fake("slow", "import time; time.sleep(0 if resume and seconds > 5 else 60)"),
        fake("partial", "print('x: not begun, the time is up' if seconds < 5 else 'all of it')"),
        fake("red", "print('the time is up'); raise SystemExit(1)"),
        fake("plots", "", always=True),
    ]
    assert run(tmp_path, stages, seconds=6.0) == 1
    assert statuses(tmp_path) == {
        **{"good": "ok", "bad": "failed", "slow": "timeout"},
        **{"partial": "timeout", "red": "failed", "plots": "ok"},
    }
    assert run(tmp_path, stages) == 1
    assert [runs(tmp_path, stage.name) for stage in stages] == [1, 1, 2, 2, 2, 2]
    assert statuses(tmp_path)["slow"] == statuses(tmp_path)["partial"] == "ok"
    # Every run of every stage has its line.
    assert len((tmp_path / "stages.jsonl").read_text().splitlines()) == 10


def test_again_starts_a_stage_from_the_start(tmp_path):
    stages = [fake("one", "print('resume', resume)"), fake("two", "")]
    run(tmp_path, stages)
    run(tmp_path, stages, chosen=["two"], again=["one"])
    assert [runs(tmp_path, "one"), runs(tmp_path, "two")] == [2, 1]
    said = [line for line in (tmp_path / "one.log").read_text().splitlines() if "resume" in line]
    assert [line for line in said if line.startswith("resume")] == ["resume True", "resume False"]


def test_lines_cut_short_are_dropped_before_more_follow(tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": 2')
    run(tmp_path, [fake("one", "")])
    assert path.read_bytes() == b'{"a": 1}\n'
    assert "a line cut short is dropped" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_everything_written(tmp_path, number):
    script = f"""
        import signal, sys
        # A process in the background inherits that SIGINT is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path.insert(0, {str(ROOT)!r})
        from bench import gpu
        from bench.gpu_stages import Stage
        code = "import os, time; open('../pid', 'w').write(str(os.getpid())); time.sleep(60)"
        stages = [
            Stage("one", "", 1, lambda *given: ["-c", "print('done')"], least=1),
            Stage("two", "", 1, lambda *given: ["-c", code], least=1),
            Stage("three", "", 1, lambda *given: ["-c", ""], least=1),
        ]
        sys.exit(gpu.main(["--out", {str(tmp_path)!r}, "--commit", "abc"], stages))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    stop = time.monotonic() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < stop
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert not alive(int((tmp_path / "pid").read_text()))
    assert statuses(tmp_path) == {"one": "ok", "two": "interrupted"}
    assert "| three | not begun | | |" in printed
    assert "| two | interrupted | " in (tmp_path / "summary.md").read_text()


# The command line and the real stages


def test_the_list_and_wrong_names(capsys, tmp_path):
    assert gpu.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed[0] == "setup"
    assert listed[-1] == "plots"
    assert listed == [stage.name for stage in gpu_stages.STAGES]
    for wrong in (["--stages", "ops,opps"], ["--minutes", "0"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit):
            gpu.main(["--out", str(tmp_path), *wrong])
        assert repr(wrong[1].split(",")[-1]) in capsys.readouterr().err


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_commands_are_such_as_their_programs_take(tmp_path, quick, resume):
    where = Options(tmp_path, 10.0, device="cuda", quick=quick, commit="abc")
    parsed = {}
    for stage in gpu_stages.STAGES:
        dash, module, *arguments = stage.command(where, 120.0, resume)
        assert dash == "-m"
        if module == "bench":
            parsed[stage.name] = options.parse(arguments)
        elif module == "bench.ops":
            parsed[stage.name] = op_options.parse(arguments)
        elif module == "bench.gpu_tests":
            assert set(gpu_tests._parser().parse_args(arguments).files) <= set(gpu_tests.FILES)
    assert set(parsed) >= {"models", "ops", "peers", "models-tuned", "autotune", "large"}
    for name, one in parsed.items():
        assert one.minutes == pytest.approx(1.8)
        assert one.commit == "abc"
        assert one.device.type == "cuda"
        assert one.output.parent == Path("..")
        assert str(tmp_path) not in one.command, name
        assert one.resume is resume, name
    # A later run takes the place of an earlier one in tables: it has all its providers.
    assert set(parsed["models"].providers) < set(parsed["peers"].providers)
    assert set(parsed["peers"].providers) < set(parsed["autotune"].providers)
    assert parsed["models-tuned"].output != parsed["models"].output


def test_every_file_of_kernel_tests_is_run():
    folder = ROOT / gpu_tests.FOLDER
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("test_*.py"))
    assert sorted(gpu_tests.FILES) == files


def test_stages_that_cannot_run_say_why(tmp_path):
    (tmp_path / "setup.json").write_text(
        json.dumps({"cuda": False, "modules": {"matplotlib": None, "tqdm": "4"}})
    )
    where = Options(tmp_path, 10.0, device="cuda", quick=False, commit="abc")
    reasons = {stage.name: stage.skip(where) for stage in gpu_stages.STAGES}
    assert reasons.pop("setup") is None
    assert all(reasons.values())
    assert "no GPU" in reasons["models"]
    assert "no rows" in reasons["plots"]
    (tmp_path / "gpu.jsonl").touch()
    assert next(s for s in gpu_stages.STAGES if s.name == "plots").skip(where) == (
        "not installed: matplotlib"
    )


# The layout


def test_the_layout_serves_where_fastseg_is_not_installed(tmp_path):
    layout = gpu_layout.make(tmp_path / "layout")
    gpu_layout.make(layout)  # again, as a second call does
    # Without the module site there are no .pth files, and so no editable installation.
    packages = sysconfig.get_path("purelib")
    find = "[bool(find_spec(name)) for name in ('fastseg', 'kernels')]"
    code = f"from importlib.util import find_spec; print({find})"

    def python(*arguments, paths):
        return subprocess.run(
            [sys.executable, "-S", *arguments],
            cwd=layout if layout in paths else tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
            capture_output=True,
            text=True,
            check=False,
        )

    assert python("-c", code, paths=[packages]).stdout.split() == ["[False,", "False]"]
    assert python("-c", code, paths=[layout, packages]).stdout.split() == ["[True,", "False]"]
    (tmp_path / "out").mkdir()
    done = python(
        *("-m", "bench.gpu_check", "--out", str(tmp_path / "out"), "--device", "cpu"),
        paths=[layout, packages],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "setup.json").read_text())
    assert found["failures"] == []
    assert found["fastseg"].endswith(str(layout / "fastseg"))
    assert found["modules"]["torch"]
    assert (ROOT / "fastseg" / "kernels").resolve() == ROOT / "kernels"  # as it was


def test_the_layout_needs_a_checkout(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkout"):
        gpu_layout.make(tmp_path / "layout", root=tmp_path)


# The tests and the sanitizer


STUB = """
import types

def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")

lost = False
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
"""
CASES = """
import sys, pytest, torch

pytestmark = pytest.mark.gpu

def test_the_checkout_is_not_on_the_path():
    assert CHECKOUT not in sys.path

@pytest.mark.parametrize("number", range(4))
def test_fine(number):
    assert not torch.lost

def test_plainly_wrong():
    assert not torch.lost
    assert 1 == 2, "plainly"

def test_loses_the_gpu():
    torch.lost = True
    assert False

@pytest.mark.parametrize("number", range(4))
def test_after(number):
    assert not torch.lost, "a victim of another test"
    if number:
        pytest.skip("not here")
"""


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """Processes started in the test get the layout, and a torch of a few lines."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text(STUB)
    layout = gpu_layout.make(tmp_path / "layout")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stub'}{os.pathsep}{layout}")
    monkeypatch.chdir(tmp_path)
    # Other plugins take seconds to load.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_lost_gpu_costs_one_test(tmp_path, stubbed, workers):
    path = tmp_path / "test_cases.py"
    path.write_text(CASES.replace("CHECKOUT", repr(str(ROOT))))
    entry = gpu_tests.run_file(path, tmp_path, workers, 60.0)
    assert entry["status"] == "failed"
    lost = (tmp_path / "lost_gpu.log").read_text()
    assert "test_loses_the_gpu" in lost
    assert "test_after" not in lost
    if workers == 1:  # the process is gone, and its report with it
        assert entry["reason"] == "pytest ended with status 86"
    else:  # another process takes the rest
        assert [entry[name] for name in ("passed", "failed", "skipped")] == [6, 2, 3]
        assert any("plainly" in failure for failure in entry["failures"])


def test_a_file_that_hangs_is_stopped(tmp_path, stubbed):
    path = tmp_path / "test_cases.py"
    path.write_text("import time; time.sleep(60)")
    began = time.monotonic()
    entry = gpu_tests.run_file(path, tmp_path, 1, 1.0)
    assert time.monotonic() - began < 20
    assert entry["status"] == "timeout"
    assert entry["passed"] == 0


def test_files_that_are_done_are_not_run_again(tmp_path, monkeypatch, capsys):
    first, second, third = gpu_tests.FILES[:3]
    became = {first: "ok", second: "timeout", third: "failed"}
    ran = []

    def run_file(path, out, workers, seconds):
        ran.append(path.relative_to(gpu_tests.FOLDER).as_posix())
        counts = {"passed": 1, "failed": 0, "skipped": 0}
        return {"status": became[ran[-1]], "reason": "why", **counts, "failures": []}

    monkeypatch.setattr(gpu_tests, "run_file", run_file)
    arguments = ["--out", str(tmp_path), first, second, third]
    assert gpu_tests.main(arguments) == 1
    assert any(word in capsys.readouterr().out for word in Stage.unfinished)
    became[second] = "ok"
    assert gpu_tests.main(arguments) == 1  # what failed before still counts
    assert ran == [first, second, third, second]
    assert not any(word in capsys.readouterr().out for word in Stage.unfinished)
    found = gpu_summary._tests(tmp_path)
    assert found == f"3 files: 3 passed, 0 failed, 0 skipped; {third}: why"
    gpu_tests.main([*arguments, "--again"])
    assert ran[4:] == [first, second, third]
    gpu_tests.main([*arguments, "--again", "--minutes", "0"])
    assert len(ran) == 7


@pytest.mark.parametrize(("code", "status"), [(0, "ok"), (99, "failed")])
def test_the_sanitizer_reports_what_it_found(tmp_path, code, status, capfd):
    program = tmp_path / "compute-sanitizer"
    lines = ("#!/bin/sh", 'echo "$@"', f'echo "= ERROR SUMMARY: {code} errors"', f"exit {code}")
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    entry = gpu_sanitizer.run_tool(str(program), "memcheck", tmp_path / "script.py")
    assert entry["status"] == status
    assert entry["found"] == f"{code} errors"
    assert "--tool memcheck --error-exitcode 99" in capfd.readouterr().out


# The summary


def test_best_figures_are_those_of_the_newest_rows():
    def row(provider, p50, **fields):
        case = {"kind": "forward", "case": "b0", "size": [512, 512], "batch": 1}
        figures = {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50, "unit": "ms", "floor_ms": 0.05}
        where = {"dtype": "bfloat16", "cache": "warm", "part": "whole", "date": "1"}
        return {**case, **where, "provider": provider, **figures, **fields}

    rows = [
        row("fastseg CUDA graph", 0.05, date="0"),  # of an earlier run
        row("torch-tensorrt", 0.5, date="0"),
        row("transformers eager", 4.0),
        row("transformers CUDA graph", 1.0),
        row("fastseg CUDA graph", 0.25),
        row("fastseg Triton", 2.0),
        row("fastseg CUDA graph", 0.01, part="pre", kind="end to end"),
        row("transformers eager", 4.0, case="b1"),
    ]
    head, rule, *lines = gpu_summary.best_figures(rows)
    assert lines == [
        "| forward, b0, 512x512, batch 1, bfloat16, warm "
        "| 0.250 (0.225 to 0.275), fastseg CUDA graph "
        "| 1.000 (0.900 to 1.100), transformers CUDA graph | 4.00x | 20% |"
    ]
    assert head.count("|") == rule.count("|") == lines[0].count("|")
    assert gpu_summary.best_figures([]) == []

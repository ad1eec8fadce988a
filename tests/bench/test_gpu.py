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

from bench import options
from bench.gpu import __main__ as command
from bench.gpu import run as gpu_run
from bench.gpu import stages, summary
from bench.gpu.stages import ROOT, STAGES, Options, Stage
from bench.rows import append_rows
from tests.bench.cases import GPU_NAME, row


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Fake stages take no time, and neither shall what is kept back for the real ones."""
    monkeypatch.setattr(gpu_run, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(gpu_run, "_MARGIN_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def fake(name, code="", share=1.0, least=0.1, **fields):
    """A stage that runs `code`, which knows `resume` and `seconds`; NAME.runs counts its runs."""

    def line(options, seconds, resume):
        head = f"import sys, time; open('../{name}.runs', 'a').write('x')\n"
        known = f"resume, seconds = {resume}, {seconds}\n"
        script = options.out / f"{name}.py"
        script.write_text(head + known + textwrap.dedent(code))
        return [sys.executable, str(script)]

    return Stage(name, "", share, line, least=least, **fields)


def run(out, stages, seconds=60.0, chosen=None, again=()):
    given = Options(out, seconds / 60, device="cpu", quick=True, commit="abc")
    return gpu_run.run(given, stages, chosen or [stage.name for stage in stages], again)


def runs(out, name):
    path = out / f"{name}.runs"
    return len(path.read_text()) if path.exists() else 0


def statuses(out):
    return {name: record["status"] for name, record in summary.read_records(out).items()}


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and nobody has asked for its status


# Stages


def test_each_stage_leaves_a_record_and_a_log(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n{"b": 2')  # of a process that was killed
    plan = [
        fake("good", "print('all is well')"),
        fake("bad", "print('first'); raise SystemExit('the last words')"),
        fake("absent", skip=lambda options: "no such tool"),
        fake("long", least=100.0),
    ]
    assert run(tmp_path, plan) == 1
    assert statuses(tmp_path) == {"good": "ok", "bad": "failed", "absent": "skipped"}
    records = summary.read_records(tmp_path)
    assert records["bad"]["reason"] == "exit status 1: the last words"
    assert records["absent"]["reason"] == "no such tool"
    assert "all is well" in (tmp_path / "good.log").read_text()
    assert runs(tmp_path, "absent") == 0
    table, said = (tmp_path / "summary.md").read_text(), capsys.readouterr().out
    assert table in said
    assert "| bad | failed | " in table
    assert "| long | not begun | | |" in table
    assert "long: not begun, the time is up" in said
    # Rows can follow what was cut short.
    assert (tmp_path / "rows.jsonl").read_bytes() == b'{"a": 1}\n'
    assert "a line cut short is dropped" in said


@pytest.mark.slow
def test_a_stage_ends_with_its_time_and_all_that_it_started(tmp_path):
    # Both the stage and its child ignore SIGTERM.
    code = """
        import os, signal, subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.environ.get("CHILD") is None:
            subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "CHILD": "1"})
        open("../pids", "a").write(f"{os.getpid()}\\n")
        open("../rows.jsonl", "a").write('{"whole": 1}\\n{"half')
        time.sleep(60)
    """
    assert run(tmp_path, [fake("slow", code), fake("next")], seconds=8.0) == 0
    assert statuses(tmp_path) == {"slow": "timeout", "next": "ok"}
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(map(alive, pids))
    assert (tmp_path / "rows.jsonl").read_text().endswith('{"whole": 1}\n')


def test_time_is_shared_and_what_is_left_flows_on():
    one, two, three = fake("one"), fake("two", share=2.0), fake("three")
    assert gpu_run._share(one, [one, two, three], 80.0) == 20.0
    assert gpu_run._share(two, [two, three], 75.0) == 50.0
    assert gpu_run._share(three, [three], 70.0) == 70.0
    demanding = fake("four", least=30.0)
    assert gpu_run._share(demanding, [demanding, one, two], 50.0) == 30.0
    assert gpu_run._share(demanding, [demanding, one, two], 29.0) is None


def test_a_second_call_goes_on(tmp_path):
    plan = [
        fake("good", "print('resume', resume)"),
        fake("bad", "raise SystemExit(1)"),
        fake("slow", "time.sleep(0 if resume and seconds > 5 else 60)"),
        fake("partial", "print('x: not begun, the time is up' if seconds < 5 else 'all of it')"),
        fake("red", "print('the time is up'); raise SystemExit(1)"),
        fake("plots", always=True),
    ]
    assert run(tmp_path, plan, seconds=6.0) == 1
    assert statuses(tmp_path) == {
        **{"good": "ok", "bad": "failed", "slow": "timeout"},
        **{"partial": "timeout", "red": "failed", "plots": "ok"},
    }
    assert run(tmp_path, plan) == 1
    assert [runs(tmp_path, stage.name) for stage in plan] == [1, 1, 2, 2, 2, 2]
    assert statuses(tmp_path)["slow"] == statuses(tmp_path)["partial"] == "ok"
    # Every run of every stage has its line.
    assert len((tmp_path / "stages.jsonl").read_text().splitlines()) == 10
    run(tmp_path, plan[:2], chosen=["bad"], again=["good"])
    assert [runs(tmp_path, name) for name in ("good", "bad")] == [2, 1]
    said = (tmp_path / "good.log").read_text().splitlines()
    assert [line for line in said if line.startswith("resume")] == ["resume True", "resume False"]


def test_a_signal_leaves_everything_written(tmp_path):
    script = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from bench.gpu.__main__ import main
        from bench.gpu.stages import Stage
        def stage(name, code):
            return Stage(name, "", 1, lambda *given: [sys.executable, "-c", code], least=1)
        sleep = "import os, time; open('../pid', 'w').write(str(os.getpid())); time.sleep(60)"
        stages = [stage("one", "print('done')"), stage("two", sleep), stage("three", "")]
        sys.exit(main(["--out", {str(tmp_path)!r}, "--commit", "abc"], stages))
    """
    program = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    stop = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < stop
        time.sleep(0.05)
    process.terminate()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not alive(int((tmp_path / "pid").read_text()))
    assert statuses(tmp_path) == {"one": "ok", "two": "interrupted"}
    assert "| three | not begun | | |" in printed
    assert "| two | interrupted | " in (tmp_path / "summary.md").read_text()


# The command line and the real stages


def test_wrong_options_are_named(capsys):
    for wrong in (["--stages", "ops,opps"], ["--minutes", "0"], ["--minutes", "nan"]):
        with pytest.raises(SystemExit, match="2"):
            command.main(["--out", "absent", *wrong])
        assert wrong[0] in capsys.readouterr().err


def test_results_are_not_gone_on_with_unless_asked_for(tmp_path, capsys):
    (tmp_path / "stages.jsonl").touch()
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", str(tmp_path)])
    assert "--resume goes on with them" in capsys.readouterr().err
    assert command.main(["--out", str(tmp_path), "--resume"], []) == 0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("quick", "resume"), [(False, True), (True, False)])
def test_commands_are_such_as_their_programs_take(tmp_path, device, quick, resume):
    where = Options(tmp_path, 10.0, device=device, quick=quick, commit="abc")
    parsed, tests = {}, {}
    for stage in STAGES:
        line = stage.command(where, 120.0, resume)
        if line[1:4] == ["-m", "bench", "training"]:
            training = options.parse(line[4:], "training")
        elif line[1:3] == ["-m", "bench"]:
            parsed[stage.name] = options.parse(line[3:])
        elif "pytest" in line:
            tests[stage.name] = [word for word in line if word.startswith("tests/")]
            assert ("--again" in line) is not resume
    files = [word.partition("::")[0] for words in tests.values() for word in words]
    assert all((ROOT / file).exists() for file in files)
    # In the order of what tells most, and then all.
    assert tests["tests"][:3] == [f"tests/kernels/triton{name}" for name in
                         (("/test_gpu.py", "/test_model.py", "") if device == "cuda" else
                          ("/norm", "/test_gpu.py"))]  # fmt: skip
    assert set(parsed) == {"models", "peers", "models-tuned"}
    assert training.hosts == ["transformers 5"]
    parsed["training"] = training
    for name, one in parsed.items():
        assert (one.minutes, one.commit, one.device.type) == (pytest.approx(1.7), "abc", device)
        assert (one.output.parent, one.resume) == (Path(".."), resume)
        assert str(tmp_path) not in one.line, name
        assert {(s.variant, s.size) for s in one.settings} == {("b0", (64, 64))} or not quick
    # A later run takes the place of an earlier one in tables: it has all its providers.
    assert quick or set(parsed["models"].providers) < set(parsed["peers"].providers)
    assert "transformers reduce-overhead" in parsed["peers"].providers
    assert parsed["models-tuned"].output != parsed["models"].output


def test_the_stages_fit_into_ten_minutes():
    """Of which each has its share, so one that hangs costs no other."""
    assert sum(stage.share for stage in STAGES) <= 650
    left, seconds = 570.0, {}
    for index, stage in enumerate(STAGES):
        seconds[stage.name] = gpu_run._share(stage, STAGES[index:], left)
        assert seconds[stage.name] is not None, stage.name
        left -= seconds[stage.name]
    assert left >= 0
    assert all(seconds[stage.name] >= 0.8 * stage.share for stage in STAGES)


def test_stages_that_cannot_run_say_why(tmp_path, monkeypatch):
    where = Options(tmp_path, 10.0, device="cuda", quick=False, commit="abc")
    by_name = {stage.name: stage for stage in STAGES}
    tuned = by_name["models-tuned"]
    assert tuned.skip(where) == "there is no tuned.json"
    (tmp_path / "tuned.json").touch()
    found = lambda name: None if name == "transformers" else name  # noqa: E731
    monkeypatch.setattr(stages.importlib.util, "find_spec", found)
    assert tuned.skip(where) == "not installed: transformers"
    monkeypatch.setattr(stages.shutil, "which", lambda name: None)
    assert by_name["memcheck"].skip(where) == "compute-sanitizer is not installed"
    (tmp_path / "stages.jsonl").write_text('{"name": "setup", "status": "failed"}\n')
    setup, *others = (stage.skip(where) for stage in STAGES)
    assert (setup, set(others)) == (None, {"the setup check failed"})


@pytest.mark.slow
def test_the_layout_serves_where_fastseg_is_not_installed(tmp_path):
    layout = gpu_run.make_layout(tmp_path / "layout")
    gpu_run.make_layout(layout)  # again, as a second call does
    code = (
        "from importlib.util import find_spec; import fastseg, sys; from bench.gpu import check; "
    )
    code += "print(fastseg.__file__, find_spec('kernels')); sys.exit(check.main())"
    # Without the module site there are no .pth files, and so no editable installation.
    program = [sys.executable, "-S", "-c", code, "--device", "cpu"]
    paths = os.pathsep.join([str(layout), sysconfig.get_path("purelib")])
    known = {"cwd": layout, "env": {**os.environ, "PYTHONPATH": paths}, "text": True}
    done = subprocess.run(program, **known, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{layout / 'fastseg' / '__init__.py'} None\n")
    assert (ROOT / "fastseg" / "kernels").resolve() == ROOT / "kernels"  # as it was
    with pytest.raises(FileNotFoundError, match="expected a checkout"):
        gpu_run.make_layout(tmp_path / "layout", root=tmp_path)


# The plugin of the tests

STUB = """
import types
lost = False
def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
"""
CASES = """
import os, pytest, torch
def test_fine():
    assert not torch.lost
def test_plainly_wrong():
    assert "MENDED" in os.environ, "plainly"
def test_loses_the_gpu():
    torch.lost = "MENDED" not in os.environ
    assert not torch.lost
@pytest.mark.parametrize("number", range(3))
def test_after(number):
    assert not torch.lost, "a victim of another test"
    if number:
        pytest.skip("not here")
"""


@pytest.mark.slow
@pytest.mark.parametrize("spread", [(), ("-p", "xdist.plugin", "-n", "2")])
def test_a_lost_gpu_costs_one_test_and_what_is_done_is_not_run_again(tmp_path, spread):
    (tmp_path / "torch.py").write_text(STUB)
    (tmp_path / "test_cases.py").write_text(CASES)
    log = tmp_path / "tests.jsonl"

    def status(*more, **variables):
        plugin = ("-p", "bench.gpu.pytest_plugin", "--log-tests", str(log))
        paths = os.pathsep.join(map(str, (tmp_path, ROOT)))
        # Other plugins take seconds to load.
        usual = {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        program = [sys.executable, "-m", "pytest", *spread, *plugin, *more, "test_cases.py"]
        known = {**os.environ, **usual, **variables}
        return subprocess.run(program, cwd=tmp_path, env=known, check=False).returncode

    def outcomes():
        return {one["test"].split("::")[1]: one["outcome"] for one in summary.read_lines(log)}

    expected = {"test_fine": "passed", "test_plainly_wrong": "failed"}
    expected["test_loses_the_gpu"] = "failed"
    if not spread:  # else another process takes the rest
        assert status() == 86
        assert outcomes() == expected
    assert status() == 1
    expected |= {f"test_after[{n}]": "skipped" if n else "passed" for n in range(3)}
    assert outcomes() == expected
    # What has failed stays a failure, though it is not run again.
    before = log.read_text()
    assert status(MENDED="1") == 1
    assert log.read_text() == before
    assert status("--again", MENDED="1") == 0
    assert set(outcomes().values()) == {"passed", "skipped"}


@pytest.mark.slow
def test_a_test_that_hangs_fails(tmp_path):
    (tmp_path / "test_cases.py").write_text(
        "import time\ndef test_hangs():\n    time.sleep(60)\ndef test_after():\n    pass\n"
    )
    log = tmp_path / "tests.jsonl"
    plugins = ("-p", "xdist.plugin", "-n", "1", "-p", "bench.gpu.pytest_plugin")
    options = ("--log-tests", str(log), "--test-seconds", "2", "test_cases.py")
    known = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    program = [sys.executable, "-m", "pytest", *plugins, *options]
    done = subprocess.run(program, cwd=tmp_path, env={**os.environ, **known}, check=False)
    assert done.returncode == 1
    outcomes = {one["test"].split("::")[1]: one["outcome"] for one in summary.read_lines(log)}
    assert outcomes == {"test_hangs": "failed", "test_after": "passed"}


def test_the_summary_is_a_screen_of_what_counts(tmp_path):
    rows = [row(4.0, device=GPU_NAME), row(0.5, "fastseg CUDA graph", device=GPU_NAME, ratio=8.0)]
    step = {"kind": "training", "mode": "19 classes", "device": GPU_NAME, "peak_mb": 700.0}
    append_rows(tmp_path / "gpu.jsonl", [*rows, row(90.0, **step)])
    append_rows(
        tmp_path / "gpu_tuned.jsonl", [rows[0], row(0.25, rows[1].provider, device=GPU_NAME)]
    )
    case = "b0, 512x512, batch 1, float32"
    kernel = {"case": case, "grid": "8x1x1", "count": 2.0}
    lines = [
        {"case": case, "kernel": "", "us": 400.0, "count": 1, "busy_us": 300.0},
        {**kernel, "kernel": "linear_kernel", "us": 100.0},
        {**kernel, "kernel": "decode_head_kernel", "us": 50.0},
    ]
    (tmp_path / "kernels.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    red = {"test": "test_forwards.py::test_logits", "outcome": "failed", "message": "wrong"}
    (tmp_path / "tests.jsonl").write_text(json.dumps(red) + "\n")
    text = summary.summary(tmp_path, [stage.name for stage in STAGES])
    assert len(text.splitlines()) < 50
    assert "- test_forwards.py::test_logits: wrong" in text
    assert f"- {case}: 400 us, in kernels 300" in text
    assert "linear_kernel 67%, decode_head_kernel 33%" in text
    assert "- b0, batch 1, float32, transformers eager: 90 ms, 700 MB" in text
    assert f"| {case} | 4 |  |  |  |  | 0.5 | 0.25 |" in text

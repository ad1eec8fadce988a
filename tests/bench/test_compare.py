"""`python -m bench --compare`: commits of a repository whose fastseg sleeps, and the noise band."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from bench import compare
from bench.machine import ROOT

# What a side needs of fastseg, and what each variant does with it.
FASTSEG = """
import time, types
import torch
from . import kernels
from .settings import PAUSE, SCALE

class Net(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.weight = torch.nn.Parameter(torch.ones(4, 3))

    def forward(self, pixels):
        if self.name == "segformer_b2" and SCALE != 1:
            raise TypeError("no b2 any more")
        if self.name == "segformer_b3":
            import fastseg.models.segformer.presets  # which only the installed fastseg has
        time.sleep(PAUSE)
        scale = SCALE if self.name == "segformer_b1" else 1
        logits = torch.einsum("kc,bchw->bkhw", self.weight, pixels[..., :8, :8])
        return types.SimpleNamespace(logits=scale * logits)

def from_preset(name, num_classes):
    return Net(name)

def segment(model, images):
    pixels = torch.from_numpy(images[0]).float().permute(2, 0, 1)[None]
    return [model(pixels).logits.argmax(1)[0]]
"""
KERNELS = """
import time

def upsample_argmax(logits, size):
    print("libraries print")
    time.sleep(0.05)
    return logits[..., :8, :8].argmax(1)
"""
FAST, SLOW = "PAUSE, SCALE = 0.01, 1", "PAUSE, SCALE = 0.15, 1.001"
STUCK = """
import os, time
from pathlib import Path
Path(__file__).parents[3].joinpath("pid").write_text(str(os.getpid()))
time.sleep(100)
"""


def git(repository, *arguments):
    identity = ("-c", "user.name=one", "-c", "user.email=one@example.com")
    command = ["git", *identity, *arguments]
    return subprocess.run(
        command, cwd=repository, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where folders of a comparison are made."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read anew
    (tmp_path / "scratch").mkdir()
    yield tmp_path / "scratch"
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def repository(tmp_path, scratch):
    """With the commits "slow", "stuck" and "fast"; the working tree is at "fast"."""
    folder = tmp_path / "repository"
    for name, text in (("fastseg", FASTSEG), ("kernels", KERNELS)):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    (folder / "fastseg" / "kernels").symlink_to("../kernels")
    git(folder, "init", "--quiet")
    for name, settings in (("slow", SLOW), ("stuck", STUCK), ("fast", FAST)):
        (folder / "fastseg" / "settings.py").write_text(settings)
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--message", name)
        git(folder, "tag", name)
    yield folder
    assert not list(scratch.glob("fastseg-compare-*"))
    assert len(git(folder, "worktree", "list").splitlines()) == 1


@pytest.mark.slow
def test_slower_code_fails(repository, capsys):
    # Sleeps take longer on a busy machine; the sides differ by a factor of fifteen.
    given = "--compare fast --to slow --variants b0,b1,b2,b3 --rounds 4 --threshold 100"
    assert compare.main([*given.split(), "--threads", "1"], repository) == 1
    output = capsys.readouterr().out
    lines = [line.strip("| ").split("|") for line in output.splitlines() if line.startswith("| ")]
    found = {line[0].strip(): line[-1].strip() for line in lines[1:]}
    for case in ("forward b0, 512x512", "forward b0, 64x64", "segment b0, 480x640"):
        assert found[case] == "slower"
    assert found["labels, 150 classes, 512x512"] == "same"
    wrong = found["forward b1, 512x512"]
    assert wrong.startswith("no verdict, relative RMS difference 0.001,")
    assert found["forward b2, 512x512"] == "no figure, new: TypeError: no b2 any more"
    # Nothing is borrowed from the fastseg that is installed here; what the base lacks is skipped.
    assert found["forward b3, 512x512"].startswith("no figure, base: ModuleNotFoundError")
    for side, commit in (("base", "fast"), ("new", "slow")):
        short = git(repository, "rev-parse", "--short", commit).strip()
        assert f"{side}: {short} {commit}\n" in output


def test_the_working_tree_is_taken_with_what_is_not_committed(repository, capsys):
    (repository / "fastseg" / "settings.py").write_text("from .new import PAUSE, SCALE")
    (repository / "fastseg" / "new.py").write_text(SLOW)
    before = git(repository, "status", "--porcelain")
    with compare.checkouts(repository, "fast", None) as (base, new):
        names = ("settings.py", "new.py", "kernels/__init__.py")
        found = [(new / "fastseg" / name).read_text() for name in names]
        assert found == ["from .new import PAUSE, SCALE", SLOW, KERNELS]
        assert (base / "fastseg" / "settings.py").read_text() == FAST
        assert not (base / "fastseg" / "new.py").exists()
    assert "new: the working tree" in capsys.readouterr().out
    assert git(repository, "status", "--porcelain") == before
    with compare.checkouts(repository, "fast", "slow") as (_, new):
        assert (new / "fastseg" / "settings.py").read_text() == SLOW


@pytest.mark.slow
def test_nothing_is_left_after_sigterm(repository, scratch):
    code = "import sys; from pathlib import Path; from bench import compare; "
    code += "sys.exit(compare.main(['--compare', 'stuck'], Path(sys.argv[1])))"
    process = subprocess.Popen([sys.executable, "-c", code, str(repository)], cwd=ROOT)
    stop, pid = time.monotonic() + 90, scratch / "pid"
    try:
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < stop
            time.sleep(0.1)
        process.terminate()
        assert process.wait(timeout=60) != 0
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    finally:
        process.kill()
        with contextlib.suppress(OSError):
            os.kill(int(pid.read_text()), signal.SIGKILL)


def test_unknown_commits_and_commits_without_the_folders(repository, capsys):
    for given in (
        ["--compare=nowhere"],
        ["--compare=--all"],
        ["--compare", "fast", "--to=nowhere"],
    ):
        assert compare.main(given, repository) == 2
        assert given[-1].split("=")[1] in capsys.readouterr().err
    git(repository, "rm", "-r", "--quiet", "kernels")
    git(repository, "commit", "--quiet", "--message", "no kernels")
    assert compare.main(["--compare", "HEAD", "--to", "HEAD"], repository) == 2
    assert "base: expected folders fastseg/ and kernels/" in capsys.readouterr().err


def test_wrong_options_are_named(capsys):
    for wrong in ("--rounds 3", "--threshold x", "--variants b9", "--threads 0", "--device mps"):
        with pytest.raises(SystemExit, match="2"):
            compare.main(["--compare", "HEAD", *wrong.split()])
        assert wrong.split()[0] in capsys.readouterr().err


# The verdict

CASE = "forward b0, 512x512"


def findings(seed, spread, new=1.0):
    """Of 100 comparisons, the new side `new` times as long: spikes, and a drift of the machine."""
    random = np.random.default_rng(seed)
    for _ in range(100):
        spikes = np.where(random.random((3, 24)) < 0.1, 2, 1)
        noise = np.exp(spread * random.standard_normal((3, 24)))
        first, second, other = np.linspace(50, 100, 24) * noise * spikes
        yield compare.judge(CASE, np.transpose([first, new * other, second]), 0.03)


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.2])
def test_equal_code_is_the_same(spread):
    found = list(findings(1, spread))
    assert sum(one.verdict == "same" for one in found) >= 97
    # The drift of the machine, a factor of two, is in no ratio.
    assert np.median([one.ratio for one in found]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("new", "verdict"), [(1.1, "slower"), (1 / 1.1, "faster")])
def test_ten_percent_are_found(new, verdict):
    found = list(findings(2, 0.03, new))
    assert sum(one.verdict == verdict for one in found) >= 97
    assert all(one.failed == (one.verdict == "slower") for one in found)


def test_band_holds_a_lasting_difference_of_equal_code():
    times = [50.0, 60.0, 70.0, 80.0, 90.0, 100.0]
    slower = [1.08 * time for time in times]
    assert compare.noise_band(times, times) == 0
    assert compare.noise_band(times, slower) == pytest.approx(0.08)
    finding = compare.judge(CASE, list(zip(times, slower, times, strict=True)), 0.03)
    assert (finding.band, finding.verdict) == (0.03, "slower")
    assert (finding.base_ms, finding.new_ms) == pytest.approx((75, 81))
    assert finding.ratio == pytest.approx(1 / 1.08)
    assert (
        compare.judge(CASE, list(zip(times, slower, slower, strict=True)), 0.03).verdict == "same"
    )


def test_parity_of_the_sides():
    base = np.array([3.0, 4.0], dtype=np.float32)
    error, bound, _ = compare.parity_error(base, base + np.float32([0, 0.5]))
    assert (error, bound) == (pytest.approx(0.1), 1e-5)
    assert not compare.parity_error(base, base * np.nan)[0] <= bound
    assert compare.parity_error(base, base.astype(np.float64))[0] == math.inf
    labels = np.zeros((100, 100), dtype=np.int64)
    other = labels.copy()
    other[0, 0] = 1
    assert compare.parity_error(labels, other)[:2] == (1e-4, 1e-4)
    other[0, 1] = 1
    assert compare.parity_error(labels, other)[0] == 2e-4
    assert compare.parity_error(labels, other[:50])[0] == math.inf

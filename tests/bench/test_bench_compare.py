"""`python -m bench --compare`: commits of a repository whose fastseg sleeps, and the noise band."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from bench import compare, compare_band

# What a side needs of fastseg, and what each variant does with it.
FASTSEG = """
import os, sys, time, types
import torch
from . import kernels
from .settings import PAUSE, SCALE, CRASH

class Net(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.weight = torch.nn.Parameter(torch.ones(4, 3))

    def forward(self, pixels):
        if self.name == "segformer_b4" and CRASH:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
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
FAST = "PAUSE, SCALE, CRASH = 0.01, 1, False"
SLOW = "PAUSE, SCALE, CRASH = 0.15, 1.001, False"
CRASH = "PAUSE, SCALE, CRASH = 0.01, 1, True"
# Sleeps take longer on a busy machine; the sides differ by a factor of fifteen.
OPTIONS = ("--rounds", "6", "--threshold", "100", "--threads", "1")


def _git(repository: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=one", "-c", "user.email=one@example.com"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=repository, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """With the commits "fast", "slow" and "crash"; the working tree is at "fast"."""
    folder = tmp_path / "repository"
    for name, text in (("fastseg", FASTSEG), ("kernels", KERNELS)):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    _git(folder, "init", "--quiet")
    for name, settings in (("slow", SLOW), ("crash", CRASH), ("fast", FAST)):
        (folder / "fastseg" / "settings.py").write_text(settings)
        _git(folder, "add", ".")
        _git(folder, "commit", "--quiet", "--message", name)
        _git(folder, "tag", name)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(compare, "_TURN_MS", 1)
    yield folder
    assert list(scratch.iterdir()) == []
    assert len(_git(folder, "worktree", "list").splitlines()) == 1


def _verdicts(output: str) -> dict[str, str]:
    """By case: what stands behind the figures, or instead of them."""
    cells = [re.split(r"\s{2,}", line) for line in output.splitlines()]
    return {
        line[0]: line[-1] for line in cells if line[0].startswith(("forward", "labels", "segment"))
    }


@pytest.mark.slow
def test_slower_code_fails(repository, capsys):
    argv = ["--compare", "fast", "--to", "slow", "--variants", "b0,b1,b2,b3", *OPTIONS]
    assert compare.main(argv, repository) == 1
    output = capsys.readouterr().out
    verdicts = _verdicts(output)
    for case in ("forward b0, 512x512", "forward b0, 64x64", "segment b0, 480x640"):
        assert verdicts[case] == "slower, twice"
    assert verdicts["labels, 150 classes, 512x512"] == "same"
    wrong = verdicts["forward b1, 512x512"]
    assert wrong.startswith("no verdict, relative RMS difference 0.001,")
    assert verdicts["forward b2, 512x512"] == "no figure, new: TypeError: no b2 any more"
    # Nothing is borrowed from the fastseg that is installed here; what the base lacks is skipped.
    assert "no figure, base: ModuleNotFoundError" in verdicts["forward b3, 512x512"]
    # Every process says which commit it runs, and from where.
    for name, commit, folder in (
        ("base", "fast", "base"),
        ("base again", "fast", "base"),
        ("new", "slow", "new"),
    ):
        short = _git(repository, "rev-parse", "--short", commit).strip()
        found = re.search(rf"^{name}: {short} {commit}\n.*, (.*)$", output, re.MULTILINE)
        assert found is not None
        assert found[1].endswith(f"/{folder}/fastseg/__init__.py")


@pytest.mark.slow
def test_a_base_that_sleeps_and_an_edited_working_tree(repository, capsys):
    argv = ["--compare", "slow", "--variants", "b0", *OPTIONS]
    (repository / "fastseg" / "settings.py").write_text(FAST + "  # edited")
    assert compare.main(argv, repository) == 0
    output = capsys.readouterr().out
    assert "with uncommitted changes" in output
    assert _verdicts(output) == {
        "forward b0, 512x512": "faster",
        "forward b0, 64x64": "faster",
        "labels, 150 classes, 512x512": "same",
        "segment b0, 480x640": "faster",
    }


def test_a_process_that_ends_is_an_error(repository, capsys):
    argv = ["--compare", "fast", "--to", "crash", "--variants", "b4", *OPTIONS]
    assert compare.main(argv, repository) == 2
    message = capsys.readouterr().err
    assert "new: its process ended with 3" in message
    assert "out of luck" in message


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_a_signal(repository, monkeypatch, request, end):
    processes = []
    # A process in the background inherits that SIGINT is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupted(self, case, calls):
        processes.extend(side._process for side in self._sides.values())
        os.kill(os.getpid(), end)
        raise AssertionError("the signal did nothing")

    monkeypatch.setattr(compare._Comparison, "_rounds", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        compare.main(["--compare", "fast", "--variants", "b0", *OPTIONS], repository)
    assert len(processes) == 3
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("revision", ["nowhere", "--all"])
def test_unknown_commits(repository, capsys, revision):
    assert compare.main([f"--compare={revision}"], repository) == 2
    assert f"got '{revision}'" in capsys.readouterr().err
    assert compare.main(["--compare", "fast", f"--to={revision}"], repository) == 2
    assert f"got '{revision}'" in capsys.readouterr().err


def test_commits_without_the_folders(repository, capsys):
    _git(repository, "rm", "-r", "--quiet", "kernels")
    _git(repository, "commit", "--quiet", "--message", "no kernels")
    assert compare.main(["--compare", "HEAD"], repository) == 2
    assert "no kernels: expected the folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "HEAD"], "--compare"),
        (["--compare", "HEAD", "--rounds", "5"], "from 6, got '5'"),
        (["--compare", "HEAD", "--threshold", "x"], "percentage, got 'x'"),
        (["--compare", "HEAD", "--variants", "b9"], "got 'b9'"),
    ],
)
def test_wrong_options(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        compare.main(argv)
    assert message in capsys.readouterr().err


# The band


def _rounds(random: np.random.Generator, spread: float, new: float = 1) -> list[np.ndarray]:
    """Rounds of A, A' and the new side, `new` times as long: spikes, and a drift of the machine."""
    drift = np.linspace(50, 100, 24)
    spikes = np.where(random.random((3, 24)) < 0.1, 2, 1)
    samples = drift * np.exp(spread * random.standard_normal((3, 24))) * spikes
    return [samples[0], samples[1], new * samples[2]]


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.2])
def test_equal_code_is_the_same(spread):
    random = np.random.default_rng(1)
    findings = [compare_band.judge(*_rounds(random, spread), 0.03) for _ in range(100)]
    assert sum(finding.verdict == "same" for finding in findings) >= 97
    # The drift of the machine, a factor of two, is in no ratio.
    assert np.median([finding.ratio for finding in findings]) == pytest.approx(1, abs=0.02)


def test_ten_percent_are_found():
    random = np.random.default_rng(2)
    findings = [compare_band.judge(*_rounds(random, 0.03, new=1.1), 0.03) for _ in range(100)]
    assert sum(finding.verdict == "slower" for finding in findings) >= 97
    findings = [compare_band.judge(*_rounds(random, 0.03, new=1 / 1.1), 0.03) for _ in range(100)]
    assert sum(finding.verdict == "faster" for finding in findings) >= 97


def test_band_holds_a_lasting_difference_of_equal_code():
    times = [50.0, 60.0, 70.0, 80.0, 90.0, 100.0]
    assert compare_band.noise_band(times, times) == 0
    slower = [1.08 * time for time in times]
    assert compare_band.noise_band(times, slower) == pytest.approx(0.08)
    finding = compare_band.judge(times, times, slower, 0.03)
    assert (finding.band, finding.verdict) == (0.03, "slower")
    assert (finding.base_ms, finding.new_ms) == pytest.approx((75, 81))
    assert finding.ratio == pytest.approx(1 / 1.08)
    assert compare_band.judge(times, slower, slower, 0.03).verdict == "same"


def test_parity_of_the_sides():
    base = np.array([3.0, 4.0], dtype=np.float32)
    error, bound, _ = compare_band.parity_error(base, base + np.float32([0, 0.5]))
    assert error == pytest.approx(0.1)
    assert bound == 1e-5
    assert not compare_band.parity_error(base, base * np.nan)[0] <= bound
    assert compare_band.parity_error(base, base.astype(np.float64))[0] == math.inf
    labels = np.zeros((100, 100), dtype=np.int64)
    other = labels.copy()
    other[0, 0] = 1
    assert compare_band.parity_error(labels, other)[:2] == (1e-4, 1e-4)
    other[0, 1] = 1
    assert compare_band.parity_error(labels, other)[0] == 2e-4
    assert compare_band.parity_error(labels, other[:50])[0] == math.inf

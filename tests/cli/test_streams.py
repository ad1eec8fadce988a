"""Standard streams that are cut off, full, closed or of another encoding, and Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastseg
from fastseg.cli.streams import LastingStream, run_lasting
from tests.cli.cli_cases import photo, tree

ROOT = Path(fastseg.__file__).parents[1]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fastseg", *map(str, arguments)]


@pytest.fixture
def predict_command(model_folder, tmp_path) -> list[str]:
    """`fastseg predict` of a folder of one picture, and of a picture that is not there."""
    (tmp_path / "in").mkdir()
    photo("coffee").save(tmp_path / "in" / "a.png")
    where = ["--model", model_folder, "--output", tmp_path / "out", "--device", "cpu"]
    return command("predict", tmp_path / "in", tmp_path / "nowhere.png", *where)


def cut_off() -> int:
    """A pipe whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        pytest.param(["predict", "--help"], marks=pytest.mark.slow),
        pytest.param(["bench", "--help"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_reader_that_left_ends_a_command_quietly(arguments):
    output = cut_off()
    done = subprocess.run(
        command(*arguments), cwd=ROOT, stdout=output, stderr=subprocess.PIPE, check=False
    )
    os.close(output)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b""


@pytest.mark.slow
def test_work_goes_on_where_nobody_reads(predict_command, tmp_path):
    """Both streams are cut off while there is a picture to report: the other one is segmented."""
    output = cut_off()
    done = subprocess.run(predict_command, cwd=ROOT, stdout=output, stderr=output, check=False)
    os.close(output)
    assert done.returncode == 1  # of what failed
    assert tree(tmp_path / "out") == {"a_labels.png", "a_overlay.jpg"}


@pytest.mark.parametrize(
    "closed", ["2>&-", pytest.param(">&-", marks=pytest.mark.slow), "<&- >&- 2>&-"]
)
@pytest.mark.slow
def test_work_goes_on_where_streams_are_closed(predict_command, tmp_path, closed):
    done = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *predict_command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert tree(tmp_path / "out") == {"a_labels.png", "a_overlay.jpg"}
    assert ("1 of 1 images" in done.stdout) == (closed == "2>&-")
    # Nothing that is for one stream goes to the other, or into a file that has taken its place.
    assert "nowhere.png" not in done.stdout
    assert ("nowhere.png" in done.stderr) == (closed == ">&-")


@pytest.mark.slow
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    """Messages of libraries in C would be written into it."""
    code = (
        "import os; from fastseg.cli.streams import run_lasting\n"
        f"file = lambda: open({str(tmp_path / 'result')!r}, 'w')\n"
        "def work():\n"
        "    with file() as result:\n"
        "        os.write(2, b'a message')\n"
        "        result.write(str(result.fileno()))\n"
        "    return 0\n"
        "raise SystemExit(run_lasting(work))"
    )
    closing = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    subprocess.run(closing, cwd=ROOT, check=True)
    assert int((tmp_path / "result").read_text()) > 2


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_an_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("info"), cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "fastseg: error: standard output: No space left on device\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c(predict_command, tmp_path):
    """It ends the process by its signal, which a loop in a shell asks for; no file is cut off."""
    for number in range(500):
        os.link(tmp_path / "in" / "a.png", tmp_path / "in" / f"b{number}.png")
    process = subprocess.Popen(
        predict_command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for _ in range(600):
        if (tmp_path / "out" / "a_labels.png").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT
    assert said.endswith("fastseg predict: interrupted\n")
    assert "Traceback" not in said
    assert 0 < len(tree(tmp_path / "out")) < 1000
    assert not [name for name in tree(tmp_path / "out") if not name.endswith((".png", ".jpg"))]


def test_what_an_encoding_lacks_is_escaped():
    bytes_written = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(bytes_written, encoding="ascii"))
    print("caf\xe9", "\udce9", file=stream)
    stream.flush()
    assert bytes_written.getvalue() == b"caf\\xe9 \\udce9\n"
    assert stream.error is None
    assert stream.encoding == "ascii"


class Failing(io.StringIO):
    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "after"),
    [
        (BrokenPipeError(32, "Broken pipe"), 0, 141),
        (BrokenPipeError(32, "Broken pipe"), 1, 1),
        (OSError(28, "No space left"), 0, 1),
        (OSError(28, "No space left"), 2, 2),
    ],
)
def test_status_of_what_could_not_be_said(monkeypatch, error, status, after):
    failing = Failing()
    failing.error = error
    monkeypatch.setattr(sys, "stdout", failing)
    steps = []

    def work() -> int:
        for step in range(3):
            print(step)
            steps.append(step)
        return status

    assert run_lasting(work) == after
    assert steps == [0, 1, 2]
    assert sys.stdout is failing


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (3, 3), ("because", 1)])
def test_status_of_what_exits(capsys, code, status):
    def work() -> int:
        raise SystemExit(code)

    assert run_lasting(work) == status
    assert capsys.readouterr().err == ("because\n" if code == "because" else "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_progress_bar_is_for_terminals(predict, photos, monkeypatch, stream):
    """Whether there is one or not, errors are lines of their own."""
    errors = stream()
    monkeypatch.setattr(sys, "stderr", errors)
    (photos / "broken.jpg").write_bytes(b"no jpeg")
    assert predict(photos) == 1
    said = errors.getvalue()
    assert ("3/3" in said) == (stream is Terminal)
    assert ("\r" in said) == (stream is Terminal)
    lines = said.replace("\r", "\n").splitlines()
    assert [line for line in lines if line.startswith(f"{photos / 'broken.jpg'}: ")]

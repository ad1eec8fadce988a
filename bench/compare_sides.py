"""The two sides of a comparison: copies of commits in a temporary folder, and their processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_WORKER = Path(__file__).with_name("compare_worker.py")
_STDERR_LINES = 20
_END_SECONDS = 5


class CompareError(Exception):
    """Why there is no comparison."""


class CaseError(Exception):
    """Why a side cannot run a case."""


class Checkout(NamedTuple):
    """Code of one side, laid out so that it is imported without an installation."""

    folder: Path  # holds fastseg, and in it kernels
    title: str


@contextlib.contextmanager
def checkouts(repository: Path, base: str, new: str | None) -> Iterator[tuple[Checkout, Checkout]]:
    """Copies of commit `base` and of commit `new`, or, where None, of the working tree as it is.

    They are removed in the end, whatever happens before.

    Raises:
        CompareError: a commit is unknown, or has no fastseg/ and kernels/.
    """
    base_commit = _commit(repository, base)
    new_commit = None if new is None else _commit(repository, new)
    with tempfile.TemporaryDirectory(prefix="fastseg-compare-") as name:
        root = Path(name)
        try:
            base_side = _worktree(repository, base_commit, root / "base")
            if new_commit is None:
                new_side = _working_tree(repository, root / "new")
            else:
                new_side = _worktree(repository, new_commit, root / "new")
            yield base_side, new_side
        finally:
            for side in ("base", "new"):
                # What was not made, or is a plain copy, is no worktree.
                with contextlib.suppress(CompareError):
                    _git(repository, "worktree", "remove", "--force", str(root / side))


def _commit(repository: Path, revision: str) -> str:
    try:
        return _git(
            repository, "rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}"
        )
    except CompareError as error:
        raise CompareError(
            f"expected a commit of {repository}, got {revision!r}: {error}"
        ) from None


def _worktree(repository: Path, commit: str, folder: Path) -> Checkout:
    _git(repository, "worktree", "add", "--quiet", "--detach", str(folder), commit)
    title = _git(repository, "show", "--no-patch", "--format=%h %s", commit)
    _nest_kernels(folder, title)
    return Checkout(folder, title)


def _working_tree(repository: Path, folder: Path) -> Checkout:
    """A copy: what is edited during the run does not count."""
    head = _git(repository, "rev-parse", "--short", "HEAD")
    dirty = _git(repository, "status", "--porcelain", "--", "fastseg", "kernels")
    title = f"working tree at {head}, {'with' if dirty else 'without'} uncommitted changes"
    for name in ("fastseg", "kernels"):
        if (repository / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(repository / name, folder / name, ignore=ignored, symlinks=True)
    _nest_kernels(folder, title)
    return Checkout(folder, title)


def _nest_kernels(folder: Path, title: str) -> None:
    """Put kernels/ where an installation has it."""
    nested = folder / "fastseg" / "kernels"
    is_there = nested.is_dir() and not nested.is_symlink()
    if (folder / "fastseg").is_dir() and (folder / "kernels").is_dir() and not is_there:
        nested.unlink(missing_ok=True)  # a checkout's link, which may be a text file
        (folder / "kernels").rename(nested)
    if not nested.is_dir():
        raise CompareError(f"{title}: expected the folders fastseg/ and kernels/")


def _git(repository: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=repository, capture_output=True, text=True, check=True
        )
    except OSError as error:
        raise CompareError(f"git: {error}") from error
    except subprocess.CalledProcessError as error:
        raise CompareError(f"git {arguments[0]}: {error.stderr.strip()}") from error
    return done.stdout.strip()


class Side:
    """A process that runs the code of a checkout and answers requests."""

    def __init__(self, name: str, checkout: Checkout) -> None:
        self.name = name
        self.checkout = checkout
        self._scratch = tempfile.TemporaryDirectory(prefix="fastseg-side-")
        scratch = Path(self._scratch.name)
        # Alone in its folder: Python puts the folder of a script before all others.
        worker = shutil.copy(_WORKER, scratch)
        self.output = scratch / "output.npy"
        self._stderr = scratch / "stderr.txt"
        paths = [str(checkout.folder), os.environ.get("PYTHONPATH", "")]
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends this one
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request of compare_worker.

        Raises:
            CaseError: the request failed.
            CompareError: the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            status = self._process.wait()
            raise CompareError(f"{self.name}: its process ended with {status}:\n{self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise CaseError(f"{self.name}: {answer['error']}")
        return answer

    def _tail(self) -> str:
        lines = self._stderr.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_STDERR_LINES:])

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._scratch.cleanup()

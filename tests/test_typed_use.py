"""A user's code that calls fastseg passes a type checker: `typed_use.py` is such code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

USE = Path(__file__).with_name("typed_use.py")


@pytest.mark.slow
def test_typical_calls_pass_mypy(tmp_path):
    # As of an installed package: errors inside fastseg and torch are not the user's.
    strict = ("--strict", "--follow-imports=silent", "--ignore-missing-imports")
    own = ("--config-file", os.devnull, "--cache-dir", str(tmp_path))
    # NumPy's arrays without parameters are what most people write.
    loose = ("--allow-any-generics",)
    found = subprocess.run(
        [sys.executable, "-m", "mypy", *strict, *loose, *own, str(USE)],
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(USE.parents[1])},
    )
    assert found.returncode == 0, found.stdout + found.stderr

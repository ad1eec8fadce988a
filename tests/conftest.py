"""Fixtures that all tests share."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

# `import transformers` is of the 5.x line here; this folder holds one of the 4.x line.
TRANSFORMERS4 = Path(__file__).parent.parent / ".venv" / "transformers4"
# segmentation_models_pytorch needs a torchvision that would change what transformers does.
SMP = Path(__file__).parent.parent / ".venv" / "smp"


@pytest.hookimpl(tryfirst=True)  # before "slow" is selected by
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases that @pytest.mark.every(n) leaves out of `make test` are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("every")
        if marker is not None:
            function = item.nodeid.split("[")[0]
            if seen[function] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[function] += 1


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    # The tests run in as many processes as there are cores; the models here are small. Threads
    # that wait for each other, in processes that tests start too, would take all their time.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # for libraries that still draw from it


@pytest.fixture(scope="session")
def run_transformers4() -> Callable[..., str]:
    """`run_transformers4(code, *arguments)`: what `code` prints in a process of its own.

    There `import transformers` gives 4.57.6, and `sys.argv[1:]` holds the arguments.
    """
    if not (TRANSFORMERS4 / "transformers").is_dir():
        pytest.fail("no transformers of the 4.x line: `make test` installs one")
    return functools.partial(_run_beside, TRANSFORMERS4)


@pytest.fixture(scope="session")
def run_smp() -> Callable[..., str]:
    """The same of code that imports segmentation_models_pytorch."""
    if not (SMP / "segmentation_models_pytorch").is_dir():
        pytest.fail("no segmentation_models_pytorch: `make test` installs one")
    return functools.partial(_run_beside, SMP)


def _run_beside(packages: Path, code: str, *arguments: object) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(packages),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def head_forms(monkeypatch):
    """Names of the decode head's forms with gradients that ran, in turn; of trials too."""
    from fastseg.training import head

    monkeypatch.setattr(head, "_FEWEST", 0)  # maps here are small
    made = []
    for name in ("logits_in_stripes", "_fused_map"):
        function = getattr(head, name)
        monkeypatch.setattr(
            head,
            name,
            lambda *given, name=name, function=function: made.append(name) or function(*given),
        )
    return made

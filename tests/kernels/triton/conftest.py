"""Tests of the Triton kernels, on a GPU where there is one and in Triton's interpreter elsewhere.

The interpreter is chosen when triton is imported, for the whole process: `make test` starts pytest
a second time, with TRITON_INTERPRET=1, for this folder alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.triton.kernel_cases import HAS_GPU, INTERPRETING

if not (INTERPRETING or HAS_GPU):
    collect_ignore_glob = ["*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    in_half = 0
    for item in items:
        if folder not in item.path.parents:
            continue
        if HAS_GPU:
            item.add_marker(pytest.mark.gpu)
            continue
        # The interpreter takes minutes: float32 on all shapes, half precision on every third.
        if any(name in item.name for name in ("float16", "half")):
            in_half += 1
            if in_half % 3:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter() -> None:
    if INTERPRETING:
        from tests.kernels.triton.mend_interpreter import mend

        mend()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` gives with NaN, so that an unwritten output cannot pass."""

    def poison(function):
        def wrapped(*arguments, **keywords):
            tensor = function(*arguments, **keywords)
            if type(tensor) is torch.Tensor and not tensor.is_meta:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 111)
            return tensor

        return wrapped

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def kernels_run() -> object:
    """An op that falls back to its eager twin fails the test, unless the test asks for another."""
    import fastseg

    with fastseg.backend("triton"), torch.no_grad():
        yield

"""A pytest plugin (`-p bench.gpu_pytest`): a process that has lost its GPU ends.

After an illegal access every call of CUDA fails in that process, and with it every later test. The
process writes down the test that did it and ends; pytest-xdist starts another for the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

LOST = 86  # the exit status


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lost-gpu-log", metavar="FILE", help="gets the tests that lost the GPU")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    yield
    if call.excinfo is None or not _gpu_is_lost():
        return
    log = item.config.getoption("--lost-gpu-log")
    if log:
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(f"{item.nodeid}\n{call.excinfo.getrepr()}\n\n")
    os._exit(LOST)


def _gpu_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False

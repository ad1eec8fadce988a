"""A pytest plugin (`-p bench.gpu.pytest_plugin`): tests leave a line each, and cannot hang.

`--log-tests FILE` gets a line a test as it ends, and what has a line is not run again: a run that
was stopped goes on. After an illegal access every call of CUDA fails in that process, and with it
every later test; and a kernel may never end. So the process of a test that lost the GPU, or that
takes longer than `--test-seconds`, ends, and pytest-xdist starts another for the rest.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .stages import read_lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--log-tests", type=Path, metavar="FILE", help="gets a line a test")
    parser.addoption("--test-seconds", type=float, metavar="S", help="of one test, at most")
    parser.addoption("--again", action="store_true", help="also tests that have a line")


def pytest_configure(config: pytest.Config) -> None:
    log = config.getoption("--log-tests")
    if config.getoption("--again") and not hasattr(config, "workerinput"):
        log.unlink(missing_ok=True)
    config.pluginmanager.register(_Log(config, log))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ends the process of a test that takes too long, as one that waits for a kernel for good."""
    if seconds := item.config.getoption("--test-seconds"):
        faulthandler.dump_traceback_later(seconds, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


class _Log:
    def __init__(self, config: pytest.Config, log: Path) -> None:
        self._log = log
        # All workers select the same tests, also one that starts later.
        workers = getattr(config, "workerinput", None)
        self._is_worker = workers is not None
        self._done = workers["done"] if workers else [one["test"] for one in read_lines(log)]

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["done"] = self._done

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = set(self._done)
        items[:] = [item for item in items if item.nodeid not in done]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        yield
        if call.excinfo is not None and _gpu_is_lost():
            if not self._is_worker:  # else the one that starts workers tells
                self._write(item.nodeid, "failed", f"the GPU was lost: {call.excinfo.exconly()}")
            os._exit(86)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self._is_worker and (report.when == "call" or not report.passed):
            said = str(report.longrepr).strip().splitlines() if report.longrepr else [""]
            self._write(report.nodeid, report.outcome, said[-1][:200])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Tests of an earlier run count too."""
        lines = read_lines(self._log)
        if not self._is_worker and exitstatus in (0, 5) and lines:
            session.exitstatus = int(any(one["outcome"] == "failed" for one in lines))

    def _write(self, test: str, outcome: str, message: str) -> None:
        line = {"test": test, "outcome": outcome, "message": message}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _gpu_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False

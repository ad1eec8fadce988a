"""Ctrl-C at places where it can do no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """A context manager: after `hold` Ctrl-C is kept back until `release`, `check` or the end.

    A KeyboardInterrupt can come up between any two steps of Python, and so inside the locks of a
    pool of threads, which then stay locked: its threads never end, and whoever waits for them does
    not either. Outside of the main thread, and where SIGINT has no handler, there is nothing to do.
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._held = False
        self._came = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                signal.signal(signal.SIGINT, self._handle)
                self._before = before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if error is None:
                self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._came = True
        else:
            self._before(number, frame)

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._held = False
        self.check()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """`hold` for a block."""
        self.hold()
        yield
        self.release()

    def check(self) -> None:
        """Do now what Ctrl-C was to do, where it came."""
        if self._came:
            self._came = False
            self._before(signal.SIGINT, None)

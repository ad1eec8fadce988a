"""Standard streams that are closed, cut off, full or of another encoding end no command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from .options import first_line

# As shells report a process ended by Ctrl-C, and one whose reader has left.
INTERRUPTED, CUT_OFF = 130, 141


def run_lasting(command: Callable[[], int]) -> int:
    """Run `command`, which returns an exit status or exits, whatever happens to its streams."""
    _occupy_closed()
    output, errors = LastingStream(sys.stdout), LastingStream(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = command()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except KeyboardInterrupt:
            status = INTERRUPTED
        output.flush()
        if isinstance(output.error, BrokenPipeError):
            status = status or CUT_OFF
        elif output.error is not None:
            print(f"fastseg: error: standard output: {first_line(output.error)}", file=sys.stderr)
            status = status or 1
        errors.flush()
    return status


def _occupy_closed() -> None:
    """Give standard streams that are closed a place to write to: nowhere.

    Else the next file that is opened, a result, would take their number, and libraries in C would
    write their messages into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for the whole process


class LastingStream:
    """A text stream that, where it cannot write any more, keeps the reason in `error` and is mute.

    What its encoding cannot express is written in escapes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._try(self._write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _try(self, function: Callable[..., Any], *arguments: str) -> None:
        if self.error is not None:
            return
        try:
            function(*arguments)
        except OSError as error:
            self.error = error
            # What is left in the buffer goes nowhere, or Python would report it at the exit.
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

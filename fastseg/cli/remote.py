"""Pictures that are no files: behind URLs and on standard input, copied once and within limits."""

from __future__ import annotations

import contextlib
import hashlib
import math
import queue
import re
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import fastseg

from .options import first_line

STANDARD_INPUT = "-"
MAX_MIB = 256  # of a picture, over the net or on standard input
SECONDS = 120.0  # for a whole download
SILENCE = 20.0  # seconds without an answer
REDIRECTS = 5

_CHUNK = 1 << 16
_LOOK = 0.1  # seconds after which one who waits looks whether that is still wanted


@dataclass(frozen=True)
class Copies:
    """Where copies of what URLs give are kept, in `folder`; `unwanted` ends what waits for one."""

    folder: Path
    unwanted: threading.Event = field(default_factory=threading.Event)


def is_remote(argument: str) -> bool:
    """Return whether an argument is a URL or "-"."""
    return argument == STANDARD_INPUT or argument.lower().startswith(("http://", "https://"))


class Remote:
    """A picture behind a URL or, where `where` is "-", on standard input.

    `name` is that of a file, by the last segment of the URL's path: what is no letter or digit and
    none of a few signs is replaced.
    """

    def __init__(self, where: str, copies: Copies) -> None:
        """`copies`: with that of this one, which is made where it is first asked for."""
        self._copies = copies
        self.where = where
        self.name = "stdin" if where == STANDARD_INPUT else _name(where)
        # Its suffix tells of formats that cannot be read.
        start = hashlib.sha256(where.encode("utf-8", "surrogateescape")).hexdigest()
        self._copy = copies.folder / f"{start}{Path(self.name).suffix}"
        self._reason: str | None = None

    def __str__(self) -> str:
        return self.where

    @property
    def identity(self) -> bytes:
        """What tells it from other pictures: the URL; of standard input its content."""
        if self.where == STANDARD_INPUT:
            with contextlib.suppress(ValueError, OSError):  # told when it is read
                return self.file().read_bytes()
        return self.where.encode("utf-8", "surrogateescape")

    def file(self) -> Path:
        """The copy.

        Raises:
            ValueError: there is none, for a reason that stays the same.
        """
        if self._reason is None and not self._copy.exists():
            try:
                if self.where == STANDARD_INPUT:
                    self._wait_for(lambda: _store(_standard_input(), self._copy), math.inf)
                else:
                    self._wait_for(lambda: _download(self.where, self._copy), SECONDS)
            except Exception as error:  # of a server's making
                self._reason = _why(error)
        if self._reason is not None:
            raise ValueError(self._reason)
        return self._copy

    def _wait_for(self, function: Callable[[], object], seconds: float) -> None:
        """Call `function`; ValueError where it takes longer, or nobody waits for it any more.

        A thread of its own, as looking up a name, headers that trickle in and standard input know
        no time limit.
        """
        outcome: queue.Queue[Exception | None] = queue.Queue()

        def work() -> None:
            try:
                function()
            except Exception as error:
                outcome.put(error)
            else:
                outcome.put(None)

        threading.Thread(target=work, daemon=True).start()
        stop = time.monotonic() + seconds
        while not self._copies.unwanted.is_set():
            try:
                error = outcome.get(timeout=_LOOK)
            except queue.Empty:
                if time.monotonic() > stop:
                    raise ValueError(f"not there after {seconds:g} seconds") from None
                continue
            if error is not None:
                raise error
            return
        raise ValueError("interrupted")

    def drop(self) -> None:
        """Remove the copy of what a URL gave, which is not asked for again."""
        if self.where != STANDARD_INPUT:
            self._copy.unlink(missing_ok=True)


def _name(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        last = urllib.parse.unquote(parts.path).rstrip("/").rpartition("/")[2]
        host = parts.hostname or "picture"
    except ValueError:  # no URL, as is told when it is read
        last, host = "", "picture"
    for name in (last, host):
        safe = re.sub(r"[^\w .,()+@=~-]", "_", name).strip(" .")
        if safe:
            # With what is added to it, a name has at most 255 bytes.
            return safe.encode()[-200:].decode(errors="ignore")
    return "picture"


def _download(url: str, target: Path) -> None:
    quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    headers = {"User-Agent": f"fastseg/{fastseg.__version__}"}
    request = urllib.request.Request(quoted, headers=headers)
    opener = urllib.request.build_opener(_Redirects)
    stop = time.monotonic() + SECONDS
    with opener.open(request, timeout=SILENCE) as response:
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() else None
        if expected is not None:
            _check_size(expected)

        def chunks() -> Iterator[bytes]:
            # Of what has arrived, so that the thread of a download that is given up ends.
            while chunk := response.read1(_CHUNK):
                if time.monotonic() > stop:
                    raise ValueError(f"not there after {SECONDS:g} seconds")
                yield chunk

        stored = _store(chunks(), target)
    if expected is not None and stored < expected:
        target.unlink()
        raise ValueError(f"the connection ended after {stored} of {expected} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = max_repeats = REDIRECTS
    inf_msg = f"more than {REDIRECTS} redirects: "

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
    ) -> Any:
        allowed = ("https://",) if req.type == "https" else ("https://", "http://")
        if not newurl.lower().startswith(allowed):
            raise ValueError(f"redirected from {req.type} to {newurl}: not allowed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _standard_input() -> Iterator[bytes]:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise ValueError("standard input is closed")
    if sys.stdin.isatty():
        raise ValueError("expected a picture on standard input, found a terminal")
    while chunk := stream.read(_CHUNK):
        yield chunk


def _store(chunks: Iterator[bytes], target: Path) -> int:
    """Write `chunks` into a file, which appears whole or not at all; return its size."""
    stored = 0
    part = target.with_name(f"{target.name}.part")
    with open(part, "wb") as file:
        for chunk in chunks:
            stored += len(chunk)
            _check_size(stored)
            file.write(chunk)
    part.replace(target)
    return stored


def _check_size(size: int) -> None:
    if size > MAX_MIB << 20:
        raise ValueError(f"larger than {MAX_MIB} MiB: fetch it into a file first")


def _why(error: Exception) -> str:
    if isinstance(error, HTTPError):
        said = " ".join(str(error.reason).split())
        return said if error.code < 400 else f"the server answers {error.code} {said}"
    reason = error.reason if isinstance(error, URLError) else error
    untrusted = getattr(reason, "verify_message", "")  # of ssl, which a Python may lack
    if untrusted:
        return f"its certificate is not trusted: {untrusted}"
    if isinstance(reason, TimeoutError):
        return f"no answer for {SILENCE:g} seconds"
    return first_line(reason) if isinstance(reason, Exception) else str(reason)

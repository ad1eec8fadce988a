"""Pictures on their way through reading, a model and writing, many at once.

A picture is in the hands of one thread that reads it, waits for the model, and writes what came of
it. Few read and write at a time, and the threads of the model take those that wait for it together,
where they are of one kind. So what is alive is bounded, in pictures and in pixels, however many
there are and whichever stage is the slowest.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from fastseg.kernels.blocks.workers import thread_pool

from .interrupts import Interrupts

STAGES = READ, MODEL, WRITE = "read", "model", "write"

PIXELS = 1 << 27  # that are alive at once; a picture with more is alone
_LOOK_SECONDS = 0.1  # between looks whether Ctrl-C came
_AHEAD = 10_000  # items that have begun, or wait, behind one that takes long

# Called with the pixels of a picture, before it is read: what is inside of its block has a place.
Place = Callable[[int], AbstractContextManager[None]]


@dataclass
class Outcome:
    """What became of an item: what `write` gave, or the error, and the stage that it is of.

    `seconds` has what each stage took, without waiting for others; the model's share of a batch.
    """

    item: Any
    result: Any = None
    error: Exception | None = None
    stage: str = READ
    seconds: dict[str, float] = field(default_factory=dict)


class Pipeline:
    """Three stages; a context manager that waits for its threads, and gives up what has not begun.

    Args:
        read: from an item and a `Place` to what the model takes of it.
        model: from a list of these to as many results.
        write: from an item, what was read of it, and its result to what the outcome tells of it.
        kind: of what was read; those of an equal kind may be in one list.
        workers: how many items are read or written at once.
        batch_size: of the model, at most: it never waits for more.
        model_threads: how many call the model; torch's threads are spread over them.
    """

    def __init__(
        self,
        read: Callable[[Any, Place], Any],
        model: Callable[[list[Any]], list[Any]],
        write: Callable[[Any, Any, Any], Any],
        *,
        kind: Callable[[Any], Hashable],
        workers: int,
        batch_size: int = 1,
        model_threads: int = 1,
    ) -> None:
        self._read, self._write, self._kind = read, write, kind
        self._places = threading.Semaphore(workers)
        self._gate = _Gate(PIXELS)
        self._model = _Queue(model, batch_size)
        self._model_threads = model_threads
        # In the model, waiting for it, and the others.
        self._threads = workers + 2 * batch_size * model_threads

    def __enter__(self) -> Pipeline:
        self._stack = contextlib.ExitStack()
        with self._stack:
            self._interrupts = self._stack.enter_context(Interrupts())
            with self._interrupts.held():
                count, torch_threads = self._model_threads, torch.get_num_threads()
                pool = self._stack.enter_context(thread_pool(count, max(torch_threads // count, 1)))
                self._pool = self._stack.enter_context(thread_pool(self._threads, 1))
                self._stack.callback(self._stop)
                for _ in range(count):
                    pool.submit(self._model.serve)
            self._begun = time.perf_counter()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._interrupts.hold()  # until all threads have ended
        self._stack.__exit__(kind, error, at)

    def _stop(self) -> None:
        self._gate.close()
        self._model.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def run(self, items: Iterable[Any]) -> Iterator[Outcome]:
        """The outcomes of all items, in their order."""
        pending: deque[Future[Outcome]] = deque()
        for item in items:
            with self._interrupts.held():
                pending.append(self._pool.submit(self._carry, item))
            while outcome := self._next(pending, _AHEAD):
                yield outcome
        while outcome := self._next(pending, 1):
            yield outcome

    def _next(self, pending: deque[Future[Outcome]], most: int) -> Outcome | None:
        """The first outcome if it is there, or is to be waited for, as `most` are pending."""
        with self._interrupts.held():
            while pending and len(pending) >= most and not pending[0].done():
                wait([pending[0]], timeout=_LOOK_SECONDS)
                self._interrupts.check()
            return pending.popleft().result() if pending and pending[0].done() else None

    def busy_share(self) -> float:
        """The share of the time since the beginning in which the model was at work."""
        return self._model.busy / (time.perf_counter() - self._begun) / self._model_threads

    def _carry(self, item: Any) -> Outcome:
        outcome = Outcome(item)
        inside = 0

        @contextlib.contextmanager
        def place(pixels: int) -> Iterator[None]:
            nonlocal inside
            self._gate.enter(pixels)
            inside += pixels
            with self._places, _timed(outcome):
                yield

        try:
            given = self._read(item, place)
            outcome.stage = MODEL
            request = self._model.ask(given, self._kind(given))
            found = request.result()
            outcome.seconds[MODEL] = request.seconds
            outcome.stage = WRITE
            with self._places, _timed(outcome):
                outcome.result = self._write(item, given, found)
        except Exception as error:
            # Frames of a traceback would keep the picture.
            outcome.error = error.with_traceback(None)
            error.__context__ = error.__cause__ = None
        finally:
            self._gate.leave(inside)
        return outcome


@contextlib.contextmanager
def _timed(outcome: Outcome) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - begun
        outcome.seconds[outcome.stage] = outcome.seconds.get(outcome.stage, 0.0) + seconds


class _Gate:
    """Lets in what has at most `limit` pixels together with all that is inside, or is alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0
        self._closed = False
        self._changed = threading.Condition()

    def enter(self, pixels: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or not self._inside or self._inside + pixels <= self._limit
            )
            if self._closed:
                raise CancelledError
            self._inside += pixels

    def leave(self, pixels: int) -> None:
        with self._changed:
            self._inside -= pixels
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Request(Future):
    """What waits for the model."""

    def __init__(self, given: Any, kind: Hashable) -> None:
        super().__init__()
        self.given, self.kind, self.seconds = given, kind, 0.0


class _Queue:
    """What waits for the model, and the threads that run it, each in `serve`."""

    def __init__(self, model: Callable[[list[Any]], list[Any]], batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._waiting: list[_Request] = []
        self._closed = False
        self._changed = threading.Condition()
        self.busy = 0.0  # seconds, of all threads

    def ask(self, given: Any, kind: Hashable) -> _Request:
        request = _Request(given, kind)
        with self._changed:
            if self._closed:
                raise CancelledError
            self._waiting.append(request)
            self._changed.notify()
        return request

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for request in self._waiting:
                request.cancel()
            self._changed.notify_all()

    def serve(self) -> None:
        while self._run(self._next()):
            pass

    def _next(self) -> list[_Request]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return []
            alike = [one for one in self._waiting if one.kind == self._waiting[0].kind]
            batch = alike[: self._batch_size]
            self._waiting = [one for one in self._waiting if one not in batch]
            return batch

    def _run(self, batch: list[_Request]) -> bool:
        """Return whether there was anything to do."""
        begun = time.perf_counter()
        try:
            results = self._model([one.given for one in batch]) if batch else []
        except BaseException as error:
            if isinstance(error, Exception) and len(batch) > 1:
                # It may be the fault of one: the others go on without it.
                return all([self._run([one]) for one in batch])
            for one in batch:
                one.set_exception(error)
            return True
        seconds = time.perf_counter() - begun
        with self._changed:
            self.busy += seconds
        for one, result in zip(batch, results, strict=True):
            one.seconds = seconds / len(batch)
            one.set_result(result)
        return bool(batch)

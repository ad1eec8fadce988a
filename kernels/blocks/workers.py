"""Parts of a CPU operator's work in threads of their own.

torch's threads meet at the end of every operator inside; where those take a millisecond or less, a
second thread gains little. Threads with a picture each meet once, at the end.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


@contextlib.contextmanager
def thread_pool(workers: int, torch_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in which torch's operators run on `torch_threads` threads each."""
    with _begun("fastseg", workers, torch_threads) as pool:
        yield pool


def map_parts(
    function: Callable[[Part], Result], parts: Sequence[Part], device: torch.device
) -> list[Result]:
    """`[function(part) for part in parts]`, in threads on a CPU where each gets a part or more.

    Inside, operators run on one thread and keep nothing for gradients. A profiler, which would not
    see them there, gets all in the caller's thread.
    """
    workers = torch.get_num_threads()
    if (
        device.type != "cpu"
        or not 1 < workers <= len(parts)
        or torch.compiler.is_compiling()
        or torch.autograd._profiler_enabled()
    ):
        return [function(part) for part in parts]
    is_inference = torch.is_inference_mode_enabled()

    def run(part: Part) -> Result:
        with torch.inference_mode(is_inference), torch.no_grad():
            return function(part)

    return list(_pool(os.getpid(), workers).map(run, parts))


def parts_each(batch: int, device: torch.device) -> int:
    """Into how many parts to cut each picture of a batch, for threads to have as many each."""
    if device.type != "cpu" or not batch:
        return 1
    threads = torch.get_num_threads()
    return threads // math.gcd(batch, threads)


@functools.lru_cache(maxsize=2)
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """The pool of a process: threads are gone in a fork of it."""
    return _begun("operator", workers, 1)


def _begun(name: str, workers: int, torch_threads: int) -> ThreadPoolExecutor:
    """A pool whose threads are there, with so many threads of torch's each.

    torch keeps that number by thread, and the one set last for threads that are new to it. So all
    workers begin here, and then the caller's number is set again.
    """

    def begin() -> None:
        torch.get_num_threads()  # a thread that is new to torch would forget what is set
        torch.set_num_threads(torch_threads)

    before = torch.get_num_threads()
    begun = threading.Barrier(workers + 1)
    pool = ThreadPoolExecutor(workers, name, begin)
    try:
        for _ in range(workers):
            pool.submit(begun.wait)  # holds its thread, so that the next one is new
        begun.wait()
    finally:
        begun.abort()
        torch.set_num_threads(before)
    return pool

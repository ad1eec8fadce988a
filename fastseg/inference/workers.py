"""Threads that each run a model on a CPU with an image of their own.

Threads inside of operators wait for each other at every small one; with an image each they meet
only at the end of a batch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


@contextlib.contextmanager
def thread_pool(workers: int, torch_threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads in which torch's operators run on `torch_threads` threads each.

    torch keeps that number by thread, and the one set last for threads that are new to it. So all
    workers begin here, and then the caller's number is set again.
    """

    def begin() -> None:
        torch.get_num_threads()  # a thread that is new to torch would forget what is set
        torch.set_num_threads(torch_threads)

    before = torch.get_num_threads()
    begun = threading.Barrier(workers + 1)
    pool = ThreadPoolExecutor(workers, "fastseg", begin)
    with pool:
        try:
            for _ in range(workers):
                pool.submit(begun.wait)  # holds its thread, so that the next one is new
            begun.wait()
        finally:
            begun.abort()
            torch.set_num_threads(before)
        yield pool


def worker_count(model: Any, images: int) -> int:
    """Into how many threads so many images are to be spread; 1 where the caller's runs them.

    What torch keeps by thread, as autocast and modes that see every operator, is not there in
    others, and graphs of torch.compile are not for several at a time.
    """
    if (
        images < 2
        or next(model.parameters()).device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or any(map(_is_compiled, model.modules()))
    ):
        return 1
    return min(images, torch.get_num_threads())


def _is_compiled(module: torch.nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None

"""Compile launches in a pool of processes, so that a later run finds them in Triton's cache.

No process needs a GPU: each gives Triton a driver that knows a target and nothing else, and goes
the way of a launch up to the launch itself, so that the keys of the cache are those of a launch.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
import types
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from ..core.launch import Launch

_TYPES = {
    **{torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"},
    **{torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"},
}
_FROM_CACHE = 0.2  # seconds that Triton takes at most for a kernel in its cache
_FEWEST_FOR_A_POOL = 4  # kernels: its processes take five seconds to import torch


def gpu_target(name: str) -> GPUTarget:
    """What Triton calls a target: "sm_90", "gfx942" and their like."""
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """The launch as Triton would specialise it, and its compile options."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.options
    options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        specialized = not parameter.do_not_specialize
        is_one = specialized and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):  # torch's allocator aligns to 512 bytes
            signature[name], divisible = _TYPES[value.dtype], True
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible = specialized and value % 16 == 0
        else:
            signature[name], divisible = "fp32", False
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes), options


def key(launch: Launch) -> str:
    """Equal for launches that compile to the same kernel."""
    source, options = source_of(launch)
    return f"{source.hash()}{sorted(options.items())}"


class Precompiled(NamedTuple):
    """What became of a launch."""

    kernel: str
    seconds: float
    error: str | None  # of the compiler, in a line


class _Driver:
    """A driver of Triton without a device."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def pretend_device(target: str) -> None:
    """Give Triton, in this process, a driver that knows `target` alone, as "sm_90"."""
    driver.set_active(_Driver(gpu_target(target)))


def present_target() -> str:
    """The target of the device at hand, as "sm_90" or "gfx942"."""
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


class Precompiler:
    """A pool of processes that compile for `target`; a context manager, which ends them.

    Args:
        target: as "sm_90" or "gfx942".
        processes: as many as there are cores, of many all but two, for who measures meanwhile.
    """

    def __init__(self, target: str, processes: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        processes = processes or (cores - 2 if cores > 4 else cores)
        # A process that forks from one with CUDA in it cannot use Triton.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, context, pretend_device, (target,))
        self._begun: dict[str, Future[Precompiled]] = {}

    def begin(self, launches: Iterable[Launch]) -> list[Future[Precompiled]]:
        """Queue what of `launches` is not queued; futures of all of them, each kernel once.

        Where a compiler has ended its process there are none, and a warning: kernels compile as
        they run.
        """
        by_key = {key(launch): launch for launch in launches}
        try:
            with _no_main():
                for name, launch in by_key.items():
                    if name not in self._begun:
                        self._begun[name] = self._pool.submit(_compile, *_described(launch))
        except BrokenExecutor as error:
            warnings.warn(f"nothing is compiled beforehand any more: {error}", stacklevel=2)
            return []
        return [self._begun[name] for name in by_key]

    def __enter__(self) -> Precompiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: Any, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)


def compile_missing(launches: Iterable[Launch]) -> int:
    """Compile what Triton's cache lacks of `launches` for the device at hand; how many these were.

    What is in the cache takes milliseconds to find. At the first that is not, and where there are
    more to look at, a pool of processes takes over.
    """
    remaining = list({key(launch): launch for launch in launches}.values())
    done: list[Precompiled] = []
    while remaining:
        done.append(_compile(*_described(remaining.pop(0))))
        if done[-1].seconds > _FROM_CACHE and len(remaining) >= _FEWEST_FOR_A_POOL:
            with Precompiler(present_target()) as pool:
                done += [one.result() for one in pool.begin(remaining)]
            break
    return sum(one.seconds > _FROM_CACHE for one in done)


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Start processes that do not import the program's main module, which need have no guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _described(launch: Launch) -> tuple[str, str, tuple[Any, ...], dict[str, Any]]:
    """What another process needs of a launch: the kernel by its names, tensors by their dtypes."""
    arguments = (one.dtype if isinstance(one, torch.Tensor) else one for one in launch.arguments)
    return launch.kernel.__module__, launch.name, tuple(arguments), launch.options


def _compile(
    module: str, name: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Precompiled:
    kernel = getattr(importlib.import_module(module), name)
    began = time.perf_counter()
    error = None
    try:
        kernel.warmup(*arguments, grid=(1,), **options)
    except Exception as failure:  # of the compiler: the others are compiled all the same
        said = str(failure).strip().splitlines() or [""]  # of which the last says what is wrong
        error = f"{type(failure).__name__}: {said[-1]}"
    return Precompiled(name, time.perf_counter() - began, error)

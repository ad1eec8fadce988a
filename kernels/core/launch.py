"""Every kernel launch goes through `launch`: a device guard, and a record for tools and plans."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .optional_triton import triton


def ceil_div(size: int, block: int) -> int:
    """Number of blocks that cover `size`."""
    return -(-size // block)


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # the kernel's parameters from the first on, but for constexprs
    options: dict[str, Any]  # constexprs by name, num_warps, num_stages

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def bound(self) -> list[Any]:
        """The arguments of all the kernel's parameters, constexprs too, in their order."""
        by_name = dict(zip(self.kernel.arg_names, self.arguments, strict=False)) | self.options
        return [by_name[name] for name in self.kernel.arg_names]


_records: list[list[Launch]] = []
_dry = False
_thread = threading.local()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` over `grid` on the device of its first argument, a tensor.

    Triton launches on the current device whatever its tensors' is, hence the guard.
    """
    # As Triton does by default up to 3.9, which warns of a change to come.
    options.setdefault("enable_fp_fusion", True)
    one = Launch(kernel, grid, arguments, options)
    if _records:
        _records[-1].append(one)
        if _dry:
            return
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = _run(one)
    else:
        compiled = _run(one)
    notes = notes_of_thread()
    if notes is not None:
        notes.launched(compiled, one)


def _run(one: Launch) -> Any:
    return one.kernel[one.grid](*one.arguments, **one.options)


def current_stream(device: torch.device) -> int:
    """The handle of the stream on which Triton launches."""
    return int(triton.runtime.driver.active.get_current_stream(device.index or 0))


def notes_of_thread() -> Any:
    """What `noted_by` was given, inside its block; None outside."""
    return getattr(_thread, "notes", None)


@contextlib.contextmanager
def noted_by(notes: Any) -> Iterator[None]:
    """Tell `notes`, a `Recorder` of plans.py, of this thread's launches inside the block."""
    _thread.notes = notes
    try:
        yield
    finally:
        _thread.notes = None


def is_recorded() -> bool:
    """Return whether a block of `record_launches` is open."""
    return bool(_records)


@contextlib.contextmanager
def record_launches(dry: bool = False) -> Iterator[list[Launch]]:
    """The launches inside the block, in order; with `dry` they are recorded and not run.

    A tool for tests and reports: it holds for the whole process.
    """
    global _dry
    before, _dry = _dry, dry
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()
        _dry = before

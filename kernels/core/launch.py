"""Every kernel launch goes through `launch`: a device guard, and a record for tools."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


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


_records: list[list[Launch]] = []
_dry = False


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel` over `grid` on the device of its first argument, a tensor.

    Triton launches on the current device whatever its tensors' is, hence the guard.
    """
    # As Triton does by default up to 3.9, which warns of a change to come.
    options.setdefault("enable_fp_fusion", True)
    if _records:
        _records[-1].append(Launch(kernel, grid, arguments, options))
        if _dry:
            return
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


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

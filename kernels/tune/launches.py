"""What would be launched on a GPU that is not there: on meta tensors, nothing computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..core.launch import Launch, record_launches
from ..core.registry import RunsLaunchers


class Trace(NamedTuple):
    """Of a forward: its kernels in order, and the compute operators of torch beside them."""

    launches: list[Launch]
    torch_operators: list[str]


def trace(function: Callable[..., Any], *arguments: Any) -> Trace:
    """Call `function` on meta tensors that are dispatched to kernels, and tell what it launches.

    It is called twice, and the second call counts: the first folds weights and makes buffers.
    """
    with record_launches(dry=True), RunsLaunchers():
        function(*arguments)
    with record_launches(dry=True) as launches, RunsLaunchers() as mode:
        function(*arguments)
    return Trace(launches, mode.torch_operators)

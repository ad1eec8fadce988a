"""What would be launched on a GPU that is not there: on meta tensors, nothing computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

from ..core import registry
from ..core.launch import Launch, record_launches
from ..core.plans import NO_KERNEL


class Trace(NamedTuple):
    """Of a forward: its kernels in order, and the compute operators of torch beside them."""

    launches: list[Launch]
    torch_operators: list[str]


class RunsLaunchers(TorchDispatchMode):
    """Runs the launchers of fastseg's ops instead of their fakes, and notes torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastseg":
            with self:
                return registry.launcher(func._opname)(*args, **kwargs)
        name = func._opname
        if not func.is_view and name not in NO_KERNEL:
            self.torch_operators.append(name)
        return func(*args, **kwargs)


def trace(function: Callable[..., Any], *arguments: Any) -> Trace:
    """Call `function` on meta tensors that are dispatched to kernels, and tell what it launches.

    It is called twice, and the second call counts: the first folds weights and makes buffers.
    """
    with record_launches(dry=True), RunsLaunchers():
        function(*arguments)
    with record_launches(dry=True) as launches, RunsLaunchers() as mode:
        function(*arguments)
    return Trace(launches, mode.torch_operators)

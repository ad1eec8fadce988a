"""What a forward would launch on a GPU that is not there: on meta tensors, nothing computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastseg
from fastseg.kernels.core import configurations, dispatch, registry
from fastseg.kernels.core.launch import Launch, record_launches

# Operators of torch that start no kernel: they give memory, or no tensor at all. Views are known by
# their schema.
_NO_KERNEL = (
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "promote_types",
)


class Trace(NamedTuple):
    """Of a forward: its kernels in order, and the compute operators of torch beside them."""

    launches: list[Launch]
    torch_operators: list[str]


class _Launchers(TorchDispatchMode):
    """Runs the launchers of fastseg's ops instead of their fakes, and notes torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastseg":
            with self:
                return registry.FUSED[func._opname](*args, **kwargs)
        name = func._opname
        if not func.is_view and name not in _NO_KERNEL:
            self.torch_operators.append(name)
        return func(*args, **kwargs)


@contextlib.contextmanager
def pretend_gpu(family: str) -> Iterator[None]:
    """Meta tensors inside the block dispatch to kernels, configured for `family`."""
    with (
        mock.patch.object(dispatch, "_device_reason", return_value=None),
        mock.patch.object(configurations, "device_family", return_value=family),
        torch.no_grad(),
    ):
        yield


def trace(function: Callable[..., Any], *arguments: Any) -> Trace:
    """Call `function` inside `pretend_gpu`, and tell what it would launch.

    It is called twice, and the second call counts: the first folds weights and makes buffers.
    """
    with record_launches(dry=True), _Launchers():
        function(*arguments)
    with record_launches(dry=True) as launches, _Launchers() as mode:
        function(*arguments)
    return Trace(launches, mode.torch_operators)


def trace_model(
    variant: str, size: tuple[int, int], batch: int, dtype: torch.dtype, family: str
) -> Trace:
    """A forward of `variant` ("segformer_b0" to "segformer_b5", 150 classes) to its label map."""
    with torch.device("meta"):
        model = fastseg.from_preset(variant, num_classes=150).eval().to(dtype)
    with pretend_gpu(family):
        pixels = torch.empty(batch, 3, *size, device="meta", dtype=dtype)
        return trace(lambda: fastseg.kernels.upsample_argmax(model(pixels).logits, size))

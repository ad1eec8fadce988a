"""Argument checks that the ops share. Each names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .optional_triton import interpreting

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def autocasts(device: torch.device) -> bool:
    """Return whether autocast is on for `device`; not every kind has it."""
    return _may_autocast(device.type) and torch.is_autocast_enabled(device.type)


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace it
def _may_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def check_matrix(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """`matrix`; raise unless it is a floating tensor of two dimensions."""
    if not isinstance(matrix, torch.Tensor) or not matrix.is_floating_point():
        got = getattr(matrix, "dtype", type(matrix).__name__)
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    if matrix.ndim != 2:
        raise ValueError(f"{name}: expected a matrix, got shape {tuple(matrix.shape)}")
    return matrix


def check_parameter(
    name: str, parameter: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor
) -> None:
    """Raise unless `parameter` has `shape` and is on the device and of the dtype of `like`.

    Under autocast dtypes may differ: torch casts as it goes.
    """
    if parameter is None:
        raise ValueError(f"{name}: expected a tensor of shape {shape}, got None")
    if not isinstance(parameter, torch.Tensor):
        got = type(parameter).__name__
        raise TypeError(f"{name}: expected a tensor of shape {shape}, got {got}")
    if tuple(parameter.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(parameter.shape)}")
    if parameter.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {parameter.device}")
    if parameter.dtype != like.dtype and not autocasts(like.device):
        raise TypeError(f"{name}: expected {like.dtype} as the others, got {parameter.dtype}")


def check_wide(
    name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor
) -> None:
    """Raise unless `tensor` is None, or has `shape`, beside `like`, and at least float32."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape or tensor.device != like.device:
        raise ValueError(
            f"{name}: expected shape {shape} on {like.device}, "
            f"got {tuple(tensor.shape)} on {tensor.device}"
        )
    wide = torch.promote_types(like.dtype, torch.float32)
    if tensor.dtype != wide:
        raise TypeError(f"{name}: expected {wide}, got {tensor.dtype}")


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return whether `torch.export` traces this, and not `torch.compile`.

    torch 2.11 traces `torch.compiler.is_exporting` itself as True in every graph.
    """
    return torch.compiler.is_exporting()


def common_reason(*tensors: torch.Tensor | None) -> str | None:
    """Reason why kernels cannot take `tensors`, whatever the op: the first reason, or None.

    The kernels have no backward, and their dtypes are those of `KERNEL_DTYPES`.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if present[0].dtype not in KERNEL_DTYPES:
        return f"there are no kernels for {present[0].dtype}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return "gradients are asked for"
    if autocasts(present[0].device):
        return "autocast is on"
    return None


def whole_in_graph(tensors_of_call: Callable[[], list[torch.Tensor]]) -> bool:
    """Return whether a graph of torch.compile takes an op for a CPU whole, as one operator.

    It runs the eager twin then, which works a stripe at a time and chooses by what it finds; traced
    into, it would be one piece, for any size. Not where the graph is for readers that do not know
    the op (exports), nor where the twin's operators have a say of their own: gradients, autocast.
    """
    if not torch.compiler.is_compiling() or is_exporting() or interpreting():
        return False
    tensors = tensors_of_call()
    on_cpu = all(tensor is None or tensor.device.type == "cpu" for tensor in tensors)
    return on_cpu and common_reason(*tensors) is None

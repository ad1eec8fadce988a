"""Trying out whether a module computes what the names of its parts say, on a copy.

The copy gets random weights in float32 on the CPU, where convolutions in float64 are slow, and runs
both ways. Neither the module nor the global random state is touched, and the weights need not be
loaded yet. What is copied and compared is a family's to say.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .conditions import all_parts

# Rounding makes 1e-6; of what could be mistaken, the two forms of GELU differ least, by 2e-4.
TOLERANCE = 2e-5


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Run without what the caller has set for tensors to come: defaults, autocast, modes."""
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def failed(error: Exception) -> str:
    """Describe a trial that ended with `error`."""
    text = str(error).strip().split("\n")[0]
    return f"it could not be tried out: {type(error).__name__}: {text}"


def trial_copy(
    module: nn.Module, repeated: Callable[[nn.Module], Iterable[Any]] = lambda part: ()
) -> nn.Module:
    """A copy in eval mode, in float32 on the CPU, with random weights and without hooks.

    Args:
        repeated: lists of layers in a module, such as `nn.ModuleList`; the first layer is copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for layers in repeated(part):
            memo.update((id(layer), nn.Identity()) for layer in list(layers)[1:])
        # In the place of tensors, which may be on any device, or without memory.
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None or id(tensor) in memo:
                continue
            is_float = tensor.is_floating_point()
            made = torch.zeros(tensor.shape, dtype=None if is_float else tensor.dtype)
            if is_float:
                _randomize(made, name)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(made, requires_grad=False) if is_parameter else made
    twin = copy.deepcopy(module, memo)
    for part in list(twin.modules()):
        for layers in repeated(part):
            del layers[1:]
    for part in all_parts(twin):
        part.__dict__.pop("forward", None)
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
    return twin.eval()


def _randomize(tensor: torch.Tensor, name: str) -> None:
    """Draw values of order one after each layer; statistics and gains are positive."""
    generator = seeded(tensor.numel())
    if tensor.ndim > 1:
        tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
    elif name == "bias" or name.endswith(("mean", "_bias")):
        tensor.normal_(std=0.3, generator=generator)
    else:
        tensor.uniform_(0.5, 1.5, generator=generator)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator apart from the global one."""
    return torch.Generator().manual_seed(seed)


def difference(expected: Any, result: Any, family: str) -> str | None:
    """Describe how outputs differ; None where they are the same up to rounding.

    Args:
        family: of the model that the result is of, as in "SegFormer".
    """
    if isinstance(expected, list | tuple) and type(expected) is not type(result):
        return f"it gives a {type(expected).__name__}, no {type(result).__name__}"
    wanted, got = _flat(expected), _flat(result)
    if [one.shape for one in wanted] != [one.shape for one in got]:
        return f"it gives outputs of other shapes than a {family}'s"
    for one, other in zip(wanted, got, strict=True):
        if one.numel() == 0:
            continue
        error = (one.double() - other.double()).square().mean().sqrt()
        relative = (error / one.double().square().mean().sqrt()).item()
        if not relative <= TOLERANCE:
            return f"it computes something else than a {family}'s ({relative:.1e} off)"
    return None


def _flat(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for one in output for tensor in _flat(one)]
    return []

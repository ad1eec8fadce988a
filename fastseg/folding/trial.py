"""Whether a host computes what the names of its parts say: tried out on copies.

Names alone do not tell a layer with a scale of its own, or another order of norms, from a
SegFormer's. So one copy of each kind of layer, and of the whole with one layer a stage, gets random
weights in float32 on the CPU, where convolutions in float64 are slow, and runs both ways. Neither
the model nor the global random state is touched, and the weights need not be loaded yet.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastseg.models.segformer.encoder_plan import EncoderPlan, LayerPlan
from fastseg.models.segformer.head_plan import HeadPlan
from fastseg.models.segformer.hosts.encoders import HOST, EncoderHost, find_encoder
from fastseg.models.segformer.hosts.heads import HeadHost
from fastseg.models.segformer.hosts.names import LayerNames

from .cache import all_parts

# Rounding makes 1e-6; of what could be mistaken, the two forms of GELU differ least, by 2e-4.
TOLERANCE = 2e-5
_PLAIN = (bool, int, float, str, tuple, list, FunctionType)  # attributes that tell kinds apart
_GRID = (4, 5)  # of tokens, at least
_PIXELS = (64, 96)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Without what the caller has set for tensors to come: defaults, autocast, modes."""
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


def kind_of(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that differ in their weights alone, or in rates of dropout."""
    return tuple(
        (
            name,
            type(part) if name else None,  # of the whole the class may change
            tuple((n, tuple(p.shape)) for n, p in part._parameters.items() if p is not None),
            tuple(
                (key, repr(value))
                for key, value in sorted(part.__dict__.items(), key=lambda item: item[0])
                if isinstance(value, _PLAIN)
                and not key.startswith("_")
                and key not in ("training", "p", "drop_prob", "layer_idx")
            ),
            tuple(sorted(part.__dict__.keys() & {"forward"})),
        )
        for name, part in module.named_modules()
    )


@_apart()
def layer_refusal(layer: nn.Module, names: LayerNames) -> str | None:
    """Why this layer has to stay the host's; None where it computes what it seems to."""
    try:
        twin: Any = _trial_copy(layer)
        plan = LayerPlan(twin, names, None)
        plan.settle(any_mode=False)
        halves = [half for half in plan.parts() if plan.reason is None and half.reason is None]
        if not halves:
            return None  # nothing of it would be replaced
        channels = next(iter(halves[0].roots[0].parameters())).shape[0]
        height, width = _grid(twin)
        x = torch.randn(2, height * width, channels, generator=_generator())
        return _difference(names.call(twin, x, height, width), plan.run(x, height, width, None))
    except Exception as error:  # of the host's code, which may be anything
        return _failed(error)


@_apart()
def encoder_refusal(encoder: Any, host: EncoderHost, refused: dict[str, str]) -> str | None:
    """Why the encoder has to stay the host's, run with its first layer of each stage.

    Args:
        refused: names of layers that stay the host's, and why.
    """
    try:
        twin: Any = _trial_copy(encoder)
        ids = {id(m): refused[n] for n, m in twin.named_modules() if n in refused}
        plan = EncoderPlan(twin, host, ids)
        if plan.settle() is not None:
            return None  # nothing of it would be replaced
        embed = plan.stages[0].stage.embed
        conv = next(m for m in embed.modules() if isinstance(m, nn.Conv2d))
        size = _PIXELS
        if len(plan.stages) == 1:  # as transformers has them, wide ones too
            height, width = _grid(twin)
            size = (height * conv.stride[0], width * conv.stride[1])
        x = torch.randn(1, conv.in_channels, *size, generator=_generator())
        output = host.forward(twin, plan.run, x)
        expected = getattr(type(twin), host.method)(twin, x)
        return None if output is HOST else _difference(expected, output)
    except Exception as error:  # of the host's code, which may be anything
        return _failed(error)


@_apart()
def head_refusal(head: Any, host: HeadHost) -> str | None:
    """Why the head has to stay the host's; None where it computes what it seems to."""
    try:
        twin: Any = _trial_copy(head)
        plan = HeadPlan(twin, host)
        if plan.settle() is not None:
            return None  # nothing of it would be replaced
        generator = _generator()
        if host.name == "segmentation_models_pytorch":
            inputs: Any = torch.randn(1, 3, *_PIXELS, generator=generator)
        else:
            weights = plan.neck.packed()
            widths = [w.shape[1] for w in weights.get("weights", [])]
            if "projections" in weights:
                widths = [weight.shape[1] for weight, _ in weights["projections"]]
            inputs = [
                torch.randn(
                    *(2, channels, -(-8 // 2**stage), -(-12 // 2**stage)),
                    generator=generator,
                )
                for stage, channels in enumerate(widths)
            ]
        output = plan.run(host.maps(twin, inputs))
        return _difference(type(twin).forward(twin, inputs), output)
    except Exception as error:  # of the host's code, which may be anything
        return _failed(error)


def _grid(module: nn.Module) -> tuple[int, int]:
    """Height and width in tokens: enough for 2 x 3 keys after the reduction.

    A softmax over one key would hide the queries and their scale.
    """
    kernel = max((p.shape[-1] for p in module.parameters() if p.ndim == 4), default=1)
    return max(_GRID[0], 2 * kernel), max(_GRID[1], 3 * kernel)


def _failed(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"it could not be tried out: {type(error).__name__}: {text}"


def _trial_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode, in float32 on the CPU, with random weights and without hooks.

    Of encoders in it the first layer of each stage is copied.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        if (host := find_encoder(part)) is not None:
            for stage in host.stages(part):
                memo.update((id(layer), nn.Identity()) for layer in list(stage.layers)[1:])
        # In the place of tensors, which may be on any device, or without memory.
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is None or id(tensor) in memo:
                continue
            made = torch.zeros(tensor.shape, dtype=None if _is_float(tensor) else tensor.dtype)
            if _is_float(tensor):
                _randomize(made, name)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(made, requires_grad=False) if is_parameter else made
    twin = copy.deepcopy(module, memo)
    for part in list(twin.modules()):
        if (host := find_encoder(part)) is not None:
            for stage in host.stages(part):
                del stage.layers[1:]
    for part in all_parts(twin):
        part.__dict__.pop("forward", None)
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
    return twin.eval()


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()


def _randomize(tensor: torch.Tensor, name: str) -> None:
    """Of order one after each layer; statistics and gains are positive."""
    generator = _generator(tensor.numel())
    if tensor.ndim > 1:
        tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
    elif name == "bias" or name.endswith(("mean", "_bias")):
        tensor.normal_(std=0.3, generator=generator)
    else:
        tensor.uniform_(0.5, 1.5, generator=generator)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _difference(expected: Any, result: Any) -> str | None:
    """What is said of outputs that are not the same; None for the same."""
    wanted, got = _flat(expected), _flat(result)
    if [one.shape for one in wanted] != [one.shape for one in got]:
        return "it gives outputs of other shapes than a SegFormer's"
    for one, other in zip(wanted, got, strict=True):
        if one.numel() == 0:
            continue
        error = (one.double() - other.double()).square().mean().sqrt()
        relative = (error / one.double().square().mean().sqrt()).item()
        if not relative <= TOLERANCE:
            return f"it computes something else than a SegFormer's ({relative:.1e} off)"
    return None


def _flat(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for one in output for tensor in _flat(one)]
    return []

"""Trials on copies: whether a host's encoder, layers and head compute what a SegFormer's do.

Names alone do not tell a layer with a scale of its own, or another order of norms, from a
SegFormer's. So one copy of each kind of layer, and of the whole with one layer a stage, runs both
ways before anything is replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastseg.folding.conditions import kind_of
from fastseg.folding.swap import HOST
from fastseg.folding.trial import apart, difference, failed, seeded, trial_copy
from fastseg.training.masks import compared

from .encoder_plan import EncoderHost, LayerPlan
from .head_plan import HeadHost, HeadPlan
from .head_training import TRIAL
from .hosts.encoders import find_encoders
from .hosts.names import LayerNames

_FAMILY = "SegFormer"
_GRID = (4, 5)  # of tokens, at least
_PIXELS = (64, 96)


def try_out(module: nn.Module, host: EncoderHost | HeadHost) -> tuple[str | None, dict[str, str]]:
    """Reason why `module` has to stay the host's, or None; and of layers in it, by their names."""
    if isinstance(host, HeadHost):
        return head_refusal(module, host), _training_refusal(module, host)
    refused = _refused_layers(module, host)
    return encoder_refusal(module, host, refused), refused


def _refused_layers(encoder: nn.Module, host: EncoderHost) -> dict[str, str]:
    """Names of the layers whose kind does not compute what it seems to, and why."""
    names = {id(module): name for name, module in encoder.named_modules()}
    verdicts: dict[Any, str | None] = {}
    refused = {}
    for stage in host.stages(encoder):
        for layer in stage.layers:
            kind = kind_of(layer)
            if kind not in verdicts:
                verdicts[kind] = layer_refusal(layer, host.layer)
            reason = verdicts[kind]
            if reason is not None:
                refused[names[id(layer)]] = reason
    return refused


@apart()
def layer_refusal(layer: nn.Module, names: LayerNames) -> str | None:
    """Reason why this layer has to stay the host's; None where it computes what it seems to."""
    try:
        twin: Any = trial_copy(layer)
        plan = LayerPlan(twin, names, None)
        plan.settle(any_mode=False)
        halves = [half for half in plan.parts() if plan.reason is None and half.reason is None]
        if not halves:
            return None  # nothing of it would be replaced
        channels = next(iter(halves[0].roots[0].parameters())).shape[0]
        height, width = _grid(twin)
        x = torch.randn(2, height * width, channels, generator=seeded())
        return difference(
            names.call(twin, x, height, width), plan.run(x, height, width, None), _FAMILY
        )
    except Exception as error:  # of the host's code, which may be anything
        return failed(error)


@apart()
def encoder_refusal(encoder: Any, host: EncoderHost, refused: dict[str, str]) -> str | None:
    """Reason why the encoder has to stay the host's, run with its first layer of each stage.

    Args:
        refused: names of layers that stay the host's, and why.
    """
    try:
        twin: Any = trial_copy(encoder, _stage_layers)
        plan = host.plan(twin, refused)
        if plan.settle() is not None:
            return None  # nothing of it would be replaced
        x = _example(twin, plan)
        output = host.forward(twin, plan.run, x)
        expected = getattr(type(twin), host.method)(twin, x)
        return None if output is HOST else difference(expected, output, _FAMILY)
    except Exception as error:  # of the host's code, which may be anything
        return failed(error)


def _example(encoder: nn.Module, plan: Any) -> torch.Tensor:
    """Pixels; of one stage alone a small map, or its tokens in a grid where it embeds nothing."""
    first = plan.stages[0].stage
    height, width = _grid(encoder)
    if first.embed is None:
        return torch.randn(1, height, width, len(first.norm.weight), generator=seeded())
    conv = next(m for m in first.embed.modules() if isinstance(m, nn.Conv2d))
    size = _PIXELS
    if len(plan.stages) == 1:  # as transformers has them, wide ones too
        size = (height * conv.stride[0], width * conv.stride[1])
    return torch.randn(1, conv.in_channels, *size, generator=seeded())


@apart()
def head_refusal(head: Any, host: HeadHost) -> str | None:
    """Reason why the head has to stay the host's; None where it computes what it seems to."""
    try:
        twin: Any = trial_copy(head, _stage_layers)
        plan = host.plan(twin, {})
        if plan.settle() is not None:
            return None  # nothing of it would be replaced
        inputs = _head_inputs(twin, host, plan)
        output = plan.run(host.maps(twin, inputs))
        return difference(type(twin).forward(twin, inputs), output, _FAMILY)
    except Exception as error:  # of the host's code, which may be anything
        return failed(error)


def _head_inputs(head: nn.Module, host: HeadHost, plan: HeadPlan) -> Any:
    """Pixels, or maps in a list."""
    generator = seeded()
    if host.takes_pixels:
        conv = next(m for m in head.modules() if isinstance(m, nn.Conv2d))
        return torch.randn(1, conv.in_channels, *_PIXELS, generator=generator)
    neck = plan.neck.folded()
    before = neck["projections"]
    first = neck["weights"].weights if before is None else [pair[0] for pair in before]
    sizes = [(-(-8 // 2**stage), -(-12 // 2**stage)) for stage in range(len(first))]
    return [
        torch.randn(2, weight.shape[1], *size, generator=generator)
        for weight, size in zip(first, sizes, strict=True)
    ]


@apart()
def _training_refusal(head: Any, host: HeadHost) -> dict[str, str]:
    """Reason why its form with gradients computes something else, dropout included; or none."""
    try:
        twin: Any = trial_copy(head, _stage_layers)
        plan = host.plan(twin, {})
        if host.with_gradients is None or plan.settle() is not None:
            return {}  # nothing of it would be replaced
        inputs, outputs = _head_inputs(twin, host, plan), []
        twin.train()
        for form in (type(twin).forward, host.with_gradients):
            with torch.random.fork_rng([]), compared():
                torch.manual_seed(0)
                outputs.append(form(twin, inputs))
        expected, output = outputs
        reason = None if output is HOST else difference(expected, output, _FAMILY)
    except Exception as error:  # of the host's code, which may be anything
        reason = failed(error)
    return {} if reason is None else {TRIAL: reason}


def _grid(module: nn.Module) -> tuple[int, int]:
    """Height and width in tokens: enough for 2 x 3 keys after the reduction.

    A softmax over one key would hide the queries and their scale.
    """
    kernel = max((p.shape[-1] for p in module.parameters() if p.ndim == 4), default=1)
    return max(_GRID[0], 2 * kernel), max(_GRID[1], 3 * kernel)


def _stage_layers(module: nn.Module) -> list[Any]:
    """The layers of each stage, where `module` is an encoder."""
    hosts = find_encoders(module)
    return [stage.layers for stage in hosts[0].stages(module)] if hosts else []

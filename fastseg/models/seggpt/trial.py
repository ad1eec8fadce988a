"""Trials on copies: whether a host's encoder, layers and decoder compute what a SegGPT's do."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastseg.folding.conditions import kind_of
from fastseg.folding.swap import HOST
from fastseg.folding.trial import apart, difference, failed, seeded, trial_copy

from .encoder_plan import LayerPlan
from .hosts import SegGptDecoderHost, SegGptEncoderHost, SegGptHost

_FAMILY = "SegGPT"
_GRID = (4, 5)  # of tokens: small, with an even number of rows


def try_out(module: nn.Module, host: SegGptHost) -> tuple[str | None, dict[str, str]]:
    """Reason why `module` has to stay the host's, or None; and of layers in it, by their names."""
    if isinstance(host, SegGptDecoderHost):
        return _decoder_refusal(module, host), {}
    refused = _refused_layers(module, host)
    return _encoder_refusal(module, host, refused), refused


def _refused_layers(encoder: Any, host: SegGptEncoderHost) -> dict[str, str]:
    """Names of the layers whose kind does not compute what it seems to, and why."""
    verdicts: dict[Any, str | None] = {}
    refused = {}
    for index, layer in enumerate(encoder.layers):
        kind = kind_of(layer)
        if kind not in verdicts:
            verdicts[kind] = _layer_refusal(layer, host)
        reason = verdicts[kind]
        if reason is not None:
            refused[f"layers.{index}"] = reason
    return refused


def _small_copy(module: nn.Module) -> Any:
    """A copy to try out, whose tables of relative positions are those of a small grid."""
    twin = trial_copy(module)
    for part in twin.modules():
        for name, side in zip(("rel_pos_h", "rel_pos_w"), _GRID, strict=True):
            if isinstance(getattr(part, name, None), nn.Parameter):
                width = getattr(part, name).shape[-1]
                vectors = torch.randn(2 * side - 1, width, generator=seeded(side))
                setattr(part, name, nn.Parameter(vectors * 0.3, requires_grad=False))
    return twin


@apart()
def _layer_refusal(layer: nn.Module, host: SegGptEncoderHost) -> str | None:
    """Reason why this layer has to stay the host's; None where it computes what it seems to."""
    try:
        twin = _small_copy(layer)
        plan = LayerPlan(twin, host.activation, None, own=False)
        plan.settle()
        if plan.reason is not None or all(half.reason is not None for half in plan.parts()):
            return None  # nothing of it would be replaced
        channels = plan.layer.layernorm_before.weight.shape[0]
        x = torch.randn(4, *_GRID, channels, generator=seeded())
        for groups in (0, 1, 2):
            expected = twin(x, groups or 1, groups > 0, False)[0]
            if reason := difference(expected, plan.run(x, groups), _FAMILY):
                return reason
    except Exception as error:  # of the host's code, which may be anything
        return failed(error)
    return None


@apart()
def _encoder_refusal(encoder: Any, host: SegGptEncoderHost, refused: dict[str, str]) -> str | None:
    """Reason why the encoder has to stay the host's, run as far as its first feature.

    Its first layer stands for all of them.
    """
    try:
        count = min(min(encoder.config.intermediate_hidden_state_indices) + 1, len(encoder.layers))
        shallow = copy.copy(encoder)
        shallow._modules = {
            **encoder._modules,
            "layers": nn.ModuleList([encoder.layers[0]] * count),
        }
        twin = _small_copy(shallow)
        plan = host.plan(twin, refused)
        if plan.settle() is not None:
            return None  # nothing of it would be replaced
        channels = twin.layernorm.weight.shape[0]
        for batch, ensemble in ((2, False), (2, True), (4, True)):
            x = torch.randn(batch, *_GRID, channels, generator=seeded())
            output = host.answer(twin, plan, x, ensemble, output_hidden_states=True)
            expected = type(twin).forward(twin, x, ensemble, output_hidden_states=True)
            if output is HOST:
                return None
            if reason := difference(expected, output, _FAMILY):
                return reason
    except Exception as error:  # of the host's code, which may be anything
        return failed(error)
    return None


@apart()
def _decoder_refusal(decoder: Any, host: SegGptDecoderHost) -> str | None:
    """Reason why the decoder has to stay the host's; None where it computes what it seems to."""
    try:
        twin = _small_copy(decoder)
        plan = host.plan(twin, {})
        if plan.settle() is not None:
            return None  # nothing of it would be replaced
        channels = twin.decoder_embed.weight.shape[1]
        x = torch.randn(1, 2, 3, channels, generator=seeded())
        output = host.answer(twin, plan, x)
        return None if output is HOST else difference(type(twin).forward(twin, x), output, _FAMILY)
    except Exception as error:  # of the host's code, which may be anything
        return failed(error)

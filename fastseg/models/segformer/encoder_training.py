"""An encoder with gradients: part by part in a form made for training, or by its own code.

Attention and patch embeddings are those of `token_layers.py`, Mix-FFN and stochastic depth those of
`fastseg/training/`. What they compute is what is written in the modules, with the same parameters,
random draws and gradients. A part that was changed, or that has dropout inside, runs by its own
code. The modules are read in each forward, so a graph of torch.compile has guards on them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastseg.folding.conditions import gradient_reason
from fastseg.folding.find import Declined, find
from fastseg.folding.fold import Part
from fastseg.folding.freshness import ModelWatch
from fastseg.folding.swap import HOST
from fastseg.kernels.blocks.tokens import tokens_to_map
from fastseg.training.drop_path import add_branch, draw_factors
from fastseg.training.mix_ffn import GELU_FORMS, mix_ffn, product_dtype

from .hosts.names import LayerNames
from .layers import scale_pixels
from .parts import MixFfn, find_attention, find_ffn
from .token_layers import attention, mix_ffn_on_tokens, patch_embedding

# Channels from which the first hidden tensor is kept: to make it again takes longer.
_KEEP_HIDDEN_FROM = 160
# Numbers of a hidden tensor from which it is made again in backward. Smaller ones are kept: on two
# cores of an EPYC torch's operators took 0.4 to 0.8 of the time there, and the same from here on.
_MAKE_AGAIN_FROM = 1 << 20


class LayerReasons(NamedTuple):
    """Why a layer, or a half of it, runs by its own code with gradients; None where it does not."""

    whole: str | None
    attention: str | None = None
    ffn: str | None = None


class StageReasons(NamedTuple):
    """The same of a stage."""

    embed: str | None
    layers: list[LayerReasons]


class EncoderTraining:
    """How an encoder runs with gradients.

    Args:
        plan: its `EncoderPlan`.

    Attributes:
        reasons: of each stage, as settled.
    """

    def __init__(self, plan: Any) -> None:
        self._plan = plan
        self._watch: ModelWatch | None = None
        self.reasons: list[StageReasons] = []

    def settle(self) -> None:
        """Find what runs by its own code, where a module has changed since."""
        if self._watch is not None and self._watch.is_same():
            return
        # Before the look: others may edit meanwhile.
        self._watch = ModelWatch(self._plan.encoder, derived=False, tensors=False)
        self.reasons = [
            StageReasons(
                None if stage.embed is None else stage.embed.problem_with_gradients(),
                [_layer_reasons(layer, self._plan.host.trains) for layer in stage.layers],
            )
            for stage in self._plan.stages
        ]

    def named_reasons(self) -> Iterator[tuple[str, str]]:
        """Pairs (part's name, reason), as settled."""
        names = {id(module): name for name, module in self._plan.encoder.named_modules()}
        for stage, reasons in zip(self._plan.stages, self.reasons, strict=True):
            if reasons.embed is not None:
                yield names.get(id(stage.stage.embed), "?"), reasons.embed
            for layer, of_layer in zip(stage.layers, reasons.layers, strict=True):
                name = names.get(id(layer.layer), "?")
                parts = ("", ", attention", ", Mix-FFN")
                for part, reason in zip(parts, of_layer, strict=True):
                    if reason is not None:
                        yield f"{name}{part}", reason

    def run(
        self,
        pixels: torch.Tensor,
        count: int | None = None,
        pixel_scale: torch.Tensor | None = None,
        pixel_offset: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Maps (B, C, H, W) of the first `count` stages, or all, in channels-last memory."""
        encoder, host = self._plan.encoder, self._plan.host
        maps: list[torch.Tensor] = []
        number = itertools.count()
        x = pixels
        for stage, reasons in zip(host.stages(encoder)[:count], self.reasons, strict=False):
            if not maps:
                x = scale_pixels(x, pixel_scale, pixel_offset, find(stage.embed, host.embed.proj))
            if reasons.embed is None:
                tokens, height, width = patch_embedding(stage.embed, host.embed, x)
            else:
                tokens, height, width = host.embed.call(stage.embed, x)
            for layer, of_layer in zip(stage.layers, reasons.layers, strict=True):
                run = functools.partial(_run_layer, layer, host.layer, of_layer)
                checkpoint = host.checkpoint(encoder, layer, next(number))
                if checkpoint is None or (of_layer.whole is not None and not host.own):
                    tokens = run(tokens, height, width)  # other libraries' layers do it themselves
                else:
                    tokens = checkpoint(run, tokens, height, width)
            x = tokens_to_map(stage.norm(tokens).contiguous(), height, width)
            maps.append(x)
        return maps


def _run_layer(
    layer: nn.Module,
    names: LayerNames,
    reasons: LayerReasons,
    x: torch.Tensor,
    height: int,
    width: int,
) -> torch.Tensor:
    if reasons.whole is not None:
        return names.call(layer, x, height, width)
    drop_path = find(layer, names.drop_path)
    if reasons.attention is None:
        modules = find_attention(layer, names)
        factors = draw_factors(drop_path, x, product_dtype(modules.output.weight))
        x = add_branch(x, functools.partial(attention, modules, height, width), factors)
    else:
        x = names.call_attention(layer, x, height, width)
    if reasons.ffn is not None:
        return names.call_ffn(layer, x, height, width)
    ffn = find_ffn(layer, names)
    factors = draw_factors(drop_path, x, product_dtype(ffn.fc2.weight))
    if _keeps_all(ffn, x):
        return add_branch(x, functools.partial(mix_ffn_on_tokens, ffn, height, width), factors)
    return mix_ffn(
        *(x, height, width, _parameters(ffn)),
        eps=ffn.norm.eps,
        activation=ffn.activation,
        factors=factors,
        keep_hidden=x.shape[2] >= _KEEP_HIDDEN_FROM,
    )


def _keeps_all(ffn: MixFfn, x: torch.Tensor) -> bool:
    """Return whether a Mix-FFN on a CPU is too small to make anything again.

    Half precision takes the operator always, which computes some of it in float32.
    """
    size = x.shape[0] * x.shape[1] * ffn.fc1.weight.shape[0]
    is_wide = product_dtype(ffn.fc1.weight) in (torch.float32, torch.float64)
    return size < _MAKE_AGAIN_FROM and is_wide and x.device.type == "cpu"


def _parameters(ffn: MixFfn) -> list[torch.Tensor]:
    return [
        tensor
        for module in (ffn.norm, ffn.fc1, ffn.dwconv, ffn.fc2)
        for tensor in (module.weight, module.bias)
    ]


# ------------------------------------------------------------------------------------ reasons


def with_gradients(encoder: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what the encoder's method returns; HOST where the whole runs by its own code."""
    if training_reason(encoder, *args, *kwargs.values()) is not None:
        return HOST
    encoder._settle_training()
    training = encoder.fastseg_state().settled.training
    return encoder._fastseg_host.forward(encoder, training.run, *args, **kwargs)


def training_reason(encoder: Any, *inputs: Any) -> str | None:
    """Reason why an encoder with gradients runs by its own code as a whole; or None."""
    if "forward" in encoder.__dict__:
        return "it has a forward of its own"
    if "_is_replica" in encoder.__dict__:
        return "it is a replica of DataParallel, which has no weights of its own"
    return gradient_reason(*inputs)


def training_lines(encoder: Any) -> Iterator[str]:
    """How an encoder runs with gradients, for people."""
    if reason := training_reason(encoder):
        yield f"as it is written: {reason}"
        return
    plan = encoder.fastseg_state().plan()
    plan.settle_training()
    is_cpu = next(encoder.parameters()).device.type == "cpu"
    yield "on tokens" + ("" if is_cpu else ", not yet measured on a GPU")
    for name, reason in plan.training.named_reasons():
        yield f"{name}: as it is written: {reason}"


def _layer_reasons(plan: Any, trains: str) -> LayerReasons:
    """The reasons of a `LayerPlan`; `trains` of its host."""
    layer, names = plan.layer, plan.names
    whole = plan.refused or plan.problem_with_gradients()
    if whole is None:
        # Trials are in eval mode: what training adds is known by the classes.
        kinds = (type(one) for one in (layer, find(layer, names.drop_path)))
        strange = (k for k in kinds if k is not nn.Identity and not k.__module__.startswith(trains))
        whole = next((f"a {kind.__name__} is not known in training" for kind in strange), None)
    if whole is not None:
        return LayerReasons(whole)
    return LayerReasons(
        None,
        _half_reason(plan.attention, plan, names.attention_dropouts, _attention_problem),
        _half_reason(plan.ffn, plan, names.ffn_dropouts, _ffn_problem),
    )


def _half_reason(
    half: Part,
    plan: Any,
    dropouts: tuple[str, ...],
    problem: Callable[[Any, LayerNames], str | None],
) -> str | None:
    if reason := half.problem_with_gradients():
        return reason
    for path in dropouts:
        dropout = find(plan.layer, path)
        share = getattr(dropout, "p", dropout)
        if share and getattr(dropout, "training", plan.layer.training):
            return f"{path} is on"
    try:
        return problem(plan.layer, plan.names)
    except Declined as declined:
        return str(declined)


def _attention_problem(layer: Any, names: LayerNames) -> str | None:
    modules = find_attention(layer, names)
    if modules.mixes_channels:
        return "its reduction mixes channels, as KerasCV's does"
    if (modules.key.bias is None) != (modules.value.bias is None):
        return "only one of keys and values has a bias"
    return None


def _ffn_problem(layer: Any, names: LayerNames) -> str | None:
    ffn = find_ffn(layer, names)
    if ffn.activation not in GELU_FORMS:
        return f"its activation is {ffn.activation}"
    if any(one is None for one in _parameters(ffn)):
        return "a layer in it has no bias"
    return None

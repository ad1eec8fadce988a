"""Plan of an encoder: op by op folded, or by the modules' own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastseg import kernels
from fastseg.exporting.folded import ExportedPlan, FoldedLayer, FoldedStage
from fastseg.folding.fold import Known, Part
from fastseg.kernels.blocks.tokens import tokens_to_map
from fastseg.kernels.core.weights import Weights

from .encoder_training import EncoderTraining
from .hosts.names import EmbedNames, LayerNames
from .layers import scale_pixels
from .parts import attention_part, embed_part, ffn_part

Maps = list[torch.Tensor]
RunStages = Callable[..., Maps]  # (pixels, number of stages or None) -> their maps


class Stage(NamedTuple):
    """The host's modules of one stage, as it holds them."""

    embed: nn.Module | None  # None where the host embeds outside, and gives (B, H, W, C)
    layers: nn.ModuleList | nn.Sequential
    norm: nn.Module
    # Containers that the host calls, and whose hooks would be left out.
    called: tuple[nn.Module, ...] = ()


@dataclass(frozen=True)
class EncoderHost:
    """A kind of encoder.

    Args:
        name: of the library, for reports; pickles have it too, so it stays.
        method: the method of the encoder that is replaced.
        stages: its stages, finest first.
        forward: (encoder, run, *arguments of the method) -> what the method returns, or HOST where
            only the host's own can answer.
        matches: whether a module is of this kind, by the names of its parts.
        own: it is fastseg's own, which needs no trial.
        with_gradients: (encoder, *arguments of the method) -> what the method returns, or HOST, in
            the place of the host's own code, where `_fastseg_training` allows it.
        training_lines: how that runs, for reports.
        trains: where its layers are from: what the module of their classes begins with.
        checkpoint: (encoder, layer, number of the layer) -> (function, *inputs) -> its output, to
            be computed again in backward; None where it is kept.
    """

    name: str
    method: str
    layer: LayerNames
    embed: EmbedNames
    stages: Callable[[Any], list[Stage]]
    forward: Callable[..., Any]
    matches: Callable[[nn.Module], bool] = lambda module: False
    own: bool = False
    with_gradients: Callable[..., Any] | None = None
    training_lines: Callable[[Any], Iterator[str]] | None = None
    trains: str = ""
    checkpoint: Callable[[Any, Any, int], Callable[..., Any] | None] = lambda *_: None

    def plan(self, encoder: nn.Module, refused: Mapping[str, str]) -> EncoderPlan:
        """Make the plan of `encoder`; layers with the names in `refused` stay the host's."""
        reasons = {id(m): refused[n] for n, m in encoder.named_modules() if n in refused}
        return EncoderPlan(encoder, self, reasons)

    def answer(self, encoder: nn.Module, plan: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns, or HOST."""
        return self.forward(encoder, plan.run, *args, **kwargs)


class LayerPlan(Known):
    """One Transformer layer: whole the host's, or half by half.

    Known are the layer itself, dropouts and stochastic depth between the halves.
    """

    def __init__(
        self, layer: nn.Module, names: LayerNames, refused: str | None, own: bool = False
    ) -> None:
        self.layer = layer
        self.names = names
        self.refused = refused  # what the check of its kind has found
        self.reason = refused
        self.attention = attention_part(layer, names, own)
        self.ffn = ffn_part(layer, names, own)
        inside = {id(root) for part in self.parts() for root in part.roots}
        around = [layer, *(c for c in layer.children() if id(c) not in inside)]
        super().__init__(layer, around, own)

    def parts(self) -> tuple[Part, Part]:
        return self.attention, self.ffn

    def settle(self, any_mode: bool = False, fold: bool = True) -> None:
        reason = self.refused or self.problem(any_mode)
        for half in self.parts():
            if reason is None:
                half.settle(any_mode, fold)
            else:
                half.decline(f"its layer: {reason}")
        self.reason = reason  # at the end: other threads may be reading it

    def run(self, x: torch.Tensor, height: int, width: int, norm: Any) -> torch.Tensor:
        """Tokens of the layer, after `norm` where one is given."""
        if self.reason is not None:
            return _normalized(self.names.call(self.layer, x, height, width), norm)
        if self.attention.reason is None:
            x = kernels.sr_attention(x, height, width, self.attention.folded())
        else:
            x = self.names.call_attention(self.layer, x, height, width)
        if self.ffn.reason is not None:
            return _normalized(self.names.call_ffn(self.layer, x, height, width), norm)
        weights = self.ffn.folded()
        if norm is None:
            return kernels.mix_ffn(x, height, width, weights)
        return kernels.mix_ffn(
            *(x, height, width, weights),
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            norm_eps=norm.eps,
        )


class StagePlan:
    """One stage: patch embedding, layers, LayerNorm."""

    def __init__(self, stage: Stage, host: EncoderHost, refused: dict[int, str]) -> None:
        self.stage = stage
        self._embed_names = host.embed
        self.embed = None
        if stage.embed is not None:
            self.embed = embed_part(stage.embed, host.embed, host.own)
        self.layers = [
            LayerPlan(one, host.layer, refused.get(id(one)), host.own) for one in stage.layers
        ]
        self.norm = Known(stage.norm, [stage.norm], host.own)
        called = list(stage.called)
        self.called = Known(stage.norm if not called else called[0], called, host.own)
        self.norm_reason: str | None = None

    def parts(self) -> Iterator[Part]:
        if self.embed is not None:
            yield self.embed
        for layer in self.layers:
            yield from layer.parts()

    def settle(self, any_mode: bool = False, fold: bool = True) -> None:
        if self.embed is not None:
            self.embed.settle(any_mode, fold)
        for layer in self.layers:
            layer.settle(any_mode, fold)
        norm: Any = self.stage.norm
        if not isinstance(norm, nn.LayerNorm) or norm.bias is None:
            self.norm_reason = f"is a {type(norm).__name__}"
        elif not self.layers:
            self.norm_reason = None
        elif {norm.weight.dtype} != {p.dtype for p in self.layers[-1].layer.parameters()}:
            self.norm_reason = "its weights are of another kind than the layer's before it"
        else:
            self.norm_reason = self.norm.problem(any_mode)

    def run(
        self,
        feature_map: torch.Tensor,
        pixel_scale: torch.Tensor | None = None,
        pixel_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.embed is None or self.stage.embed is None:
            height, width = feature_map.shape[1:3]
            tokens = feature_map.flatten(1, 2)
        elif self.embed.reason is None:
            tokens, height, width = kernels.patch_embed(
                *(feature_map, self.embed.folded()),
                pixel_scale=pixel_scale,
                pixel_offset=pixel_offset,
            )
        else:
            proj = self.stage.embed.get_submodule(self._embed_names.proj)
            feature_map = scale_pixels(feature_map, pixel_scale, pixel_offset, proj)
            tokens, height, width = self._embed_names.call(self.stage.embed, feature_map)
        norm: Any = self.stage.norm
        in_last = norm if self.norm_reason is None else None
        for layer in self.layers:
            is_last = layer is self.layers[-1]
            tokens = layer.run(tokens, height, width, in_last if is_last else None)
        if in_last is None or not self.layers:
            tokens = norm(tokens)
        return tokens_to_map(tokens.contiguous(), height, width)


def _normalized(tokens: torch.Tensor, norm: Any) -> torch.Tensor:
    if norm is None:
        return tokens
    return F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class EncoderPlan(ExportedPlan):
    """An encoder, stage by stage.

    Args:
        refused: why layers stay the host's, by their ids, as a check of their kinds has found.
    """

    def __init__(self, encoder: nn.Module, host: EncoderHost, refused: dict[int, str]) -> None:
        self.encoder = encoder
        self.host = host
        self.stages = [StagePlan(stage, host, refused) for stage in host.stages(encoder)]
        self.training = EncoderTraining(self)

    def settle_training(self) -> None:
        self.training.settle()

    def is_current(self) -> bool:
        stages = self.host.stages(self.encoder)
        return len(stages) == len(self.stages) and all(
            now.embed is plan.stage.embed
            and now.norm is plan.stage.norm
            and len(now.layers) == len(plan.layers)
            and all(a is b.layer for a, b in zip(now.layers, plan.layers, strict=True))
            and list(map(id, now.called)) == list(map(id, plan.stage.called))
            for now, plan in zip(stages, self.stages, strict=True)
        )

    def settle(self, any_mode: bool = False, fold: bool = True) -> str | None:
        for stage in self.stages:
            if reason := stage.called.problem(any_mode):
                return f"a container of layers {reason}"
            stage.settle(any_mode, fold)
        if not self.folded_parts():
            reasons = (f": {name} {reason}" for name, reason in self.reasons())
            return "none of its parts can be folded" + next(reasons, "")
        return None

    def parts(self) -> list[Part]:
        return [part for stage in self.stages for part in stage.parts()]

    def known(self) -> list[Known]:
        stages = self.stages
        around = [one for stage in stages for one in (stage.norm, stage.called, *stage.layers)]
        return [*self.parts(), *around]

    def modes(self) -> list[str | None]:
        return [*super().modes(), *(stage.norm_reason for stage in self.stages)]

    def reasons(self) -> Iterator[tuple[str, str]]:
        names = {id(module): name for name, module in self.encoder.named_modules()}
        for stage in self.stages:
            if stage.embed is not None and stage.embed.reason is not None:
                yield names.get(id(stage.stage.embed), "?"), stage.embed.reason
            for layer in stage.layers:
                name = names.get(id(layer.layer), "?")
                if layer.reason is not None:
                    yield name, layer.reason
                    continue
                for half, kind in ((layer.attention, "attention"), (layer.ffn, "Mix-FFN")):
                    if half.reason is not None:
                        yield f"{name}, {kind}", half.reason
            if stage.norm_reason is not None:
                yield names.get(id(stage.stage.norm), "?"), stage.norm_reason

    def weights(self) -> Iterator[tuple[str, Weights]]:
        for stage in self.stages:
            if stage.embed is not None and stage.embed.reason is None:
                yield "patch_embed", stage.embed.folded()
            for layer in stage.layers:
                if layer.attention.reason is None:
                    yield "sr_attention", layer.attention.folded()
                if layer.ffn.reason is None:
                    yield "mix_ffn", layer.ffn.folded()

    def folded_stages(self) -> tuple[FoldedStage, ...]:
        """The stages, all of them folded, as exporters take them."""
        stages = []
        for plan in self.stages:
            if plan.embed is None:
                raise ValueError("model: expected patch embeddings in all stages, to be exported")
            layers = (FoldedLayer(x.attention.folded(), x.ffn.folded()) for x in plan.layers)
            norm: Any = plan.stage.norm
            stages.append(FoldedStage(plan.embed.folded(), tuple(layers), norm))
        return tuple(stages)

    def run(
        self,
        pixels: torch.Tensor,
        count: int | None = None,
        pixel_scale: torch.Tensor | None = None,
        pixel_offset: torch.Tensor | None = None,
    ) -> Maps:
        """Maps (B, C, H, W) of the first `count` stages, or all, in channels-last memory.

        Args:
            pixel_scale, pixel_offset: of `kernels.patch_embed`.
        """
        return self.launches.call(self._run, pixels, count, pixel_scale, pixel_offset)

    def _run(self, pixels: torch.Tensor, count: int | None, *scale: torch.Tensor | None) -> Maps:
        maps: Maps = []
        feature_map = pixels
        for stage in self.stages[:count]:
            feature_map = stage.run(feature_map, *(() if maps else scale))
            maps.append(feature_map)
        return maps

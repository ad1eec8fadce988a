"""SegGPT's encoders and decoders as hosts: fastseg's own, and transformers' 4 and 5."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastseg.folding.find import find
from fastseg.folding.swap import HOST, register_host

from .decoder_plan import DecoderPlan
from .encoder_plan import EncoderPlan


def _output_class(module: Any, name: str) -> Any:
    """A class of the file that a module's class is in, which is the host's and not imported."""
    return getattr(sys.modules[type(module).__module__], name)


@dataclass(frozen=True)
class SegGptEncoderHost:
    """A kind of encoder, which both streams go through.

    Args:
        name: of the library, for reports; pickles have it too, so it stays.
        activation: path of the function in a layer.
        own: it is fastseg's own, which needs no trial.
    """

    name: str
    activation: str = "mlp.act"
    method: str = "forward"
    own: bool = False

    def plan(self, encoder: nn.Module, refused: Mapping[str, str]) -> EncoderPlan:
        """Make the plan of `encoder`; layers with the names in `refused` stay the host's."""
        reasons = {id(m): refused[n] for n, m in encoder.named_modules() if n in refused}
        return EncoderPlan(encoder, self.activation, reasons, self.own)

    def answer(
        self,
        encoder: Any,
        plan: Any,
        hidden_states: torch.Tensor,
        feature_ensemble: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """Return what the host's forward returns, or HOST."""
        if output_attentions or not plan.takes(hidden_states):
            return HOST
        found = plan.run(hidden_states, feature_ensemble, output_hidden_states)
        fields = {
            "last_hidden_state": found.last,
            "hidden_states": found.states,
            "attentions": None,
            "intermediate_hidden_states": found.features,
        }
        if not return_dict:
            return tuple(value for value in fields.values() if value is not None)
        return _output_class(encoder, "SegGptEncoderOutput")(**fields)


@dataclass(frozen=True)
class SegGptDecoderHost:
    """A kind of decoder; arguments as above."""

    name: str
    activation: str = "decoder_pred.act_fct"
    method: str = "forward"
    own: bool = False

    def plan(self, decoder: nn.Module, refused: Mapping[str, str]) -> DecoderPlan:
        """Make the plan of `decoder`; there are no layers in it to refuse."""
        return DecoderPlan(decoder, self.activation, self.own)

    def answer(self, decoder: Any, plan: Any, hidden_states: torch.Tensor) -> Any:
        """Return what the host's forward returns, or HOST."""
        return plan.run(hidden_states) if plan.takes(hidden_states) else HOST


ENCODER = SegGptEncoderHost("fastseg, SegGPT", activation="mlp.hidden_act", own=True)
DECODER = SegGptDecoderHost("fastseg, SegGPT", activation="decoder_pred.hidden_act", own=True)
TRANSFORMERS = SegGptEncoderHost("transformers, SegGPT")
TRANSFORMERS_DECODER = SegGptDecoderHost("transformers, SegGPT")
for _host in (TRANSFORMERS, TRANSFORMERS_DECODER):
    register_host(_host)

SegGptHost = SegGptEncoderHost | SegGptDecoderHost


def _has(module: nn.Module, *paths: str) -> bool:
    return all(find(module, path) is not None for path in paths)


def find_hosts(module: nn.Module) -> list[SegGptHost]:
    """The kinds of encoder or decoder that `module` may be by its names."""
    layer = ("layernorm_before", "layernorm_after", "mlp.lin1", "mlp.lin2", "mlp.act")
    attention = ("qkv", "proj", "rel_pos_h", "rel_pos_w")
    if (
        _has(module, "layernorm", "config", "layers.0")
        and hasattr(module.config, "merge_index")
        and all(
            _has(one, *layer, *(f"attention.{name}" for name in attention))
            for one in find(module, "layers")
        )
    ):
        return [TRANSFORMERS]
    head = ("conv", "layernorm", "act_fct", "head")
    if _has(module, "decoder_embed", *(f"decoder_pred.{name}" for name in head)):
        return [TRANSFORMERS_DECODER]
    return []


def resembles(module: nn.Module) -> bool:
    """Return whether it has the decoder of a SegGPT, or of Painter, of another library."""
    return _has(module, "decoder_embed", "decoder_pred") and not find_hosts(module)

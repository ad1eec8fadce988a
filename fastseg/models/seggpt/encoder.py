"""The encoder, a ViT that both streams go through, and the decoder that paints pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastseg.folding.swap import Accelerated, with_plan

from ..checkpointing import Checkpointing
from .config import SegGptConfig
from .encoder_plan import encode
from .hosts import DECODER, ENCODER
from .layers import SegGptDecoderHead, SegGptLayer
from .outputs import SegGptEncoderOutput


class SegGptEncoder(Accelerated, nn.Module):
    """Tokens of both streams to features of the stacked picture."""

    _fastseg_host = ENCODER

    def __init__(self, config: SegGptConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing: Checkpointing | None = None
        # Stochastic depth rises linearly; torch's own steps, whose last bits are transformers'.
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu")
        self.layers = nn.ModuleList(SegGptLayer(config, rate) for rate in rates.tolist())
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @with_plan
    def forward(
        self,
        hidden_states: torch.Tensor,
        feature_ensemble: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> SegGptEncoderOutput | tuple[Any, ...]:
        """Encode tokens (2 B, H, W, C), images first."""
        attentions: list[torch.Tensor] = []
        runs = [
            self._run(index, attentions if output_attentions else None)
            for index in range(len(self.layers))
        ]
        found = encode(self, runs, hidden_states, feature_ensemble, output_hidden_states)
        output = SegGptEncoderOutput(
            last_hidden_state=found.last,
            hidden_states=found.states,
            attentions=tuple(attentions) if output_attentions else None,
            intermediate_hidden_states=found.features,
        )
        return output if return_dict else output.to_tuple()

    def _run(
        self, index: int, attentions: list[torch.Tensor] | None
    ) -> Callable[[torch.Tensor, int], torch.Tensor]:
        layer = self.layers[index]

        def run(x: torch.Tensor, groups: int) -> torch.Tensor:
            arguments = x, groups or 1, groups > 0, attentions is not None
            if self.gradient_checkpointing is not None and self.training:
                x, *probabilities = self.gradient_checkpointing.run(index, layer, *arguments)
            else:
                x, *probabilities = layer(*arguments)
            if attentions is not None:
                attentions.extend(probabilities)
            return x

        return run


class SegGptDecoder(Accelerated, nn.Module):
    """Features (B, H, W, k C) of k layers to pixels (B, 3, H p, W p)."""

    _fastseg_host = DECODER

    def __init__(self, config: SegGptConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_size = config.patch_size
        self.decoder_hidden_size = config.decoder_hidden_size
        self.decoder_embed = nn.Linear(
            config.hidden_size * len(config.intermediate_hidden_state_indices),
            config.patch_size**2 * config.decoder_hidden_size,
        )
        self.decoder_pred = SegGptDecoderHead(config)

    @with_plan
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, height, width, _ = hidden_states.shape
        patch = self.patch_size
        pixels = self.decoder_embed(hidden_states)
        pixels = pixels.view(batch, height, width, patch, patch, self.decoder_hidden_size)
        pixels = pixels.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height * patch, width * patch)
        colours: torch.Tensor = self.decoder_pred(pixels)
        return colours

"""The Mix Transformer encoder: four stages, each by the plain or the folded path."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastseg.exporting.folded import FoldedLayer, FoldedStage
from fastseg.folding.conditions import ASKED_FOR, plain_reason
from fastseg.folding.modules import FoldedForward
from fastseg.kernels import select_backend
from fastseg.kernels.blocks.tokens import tokens_to_map

from .config import SegformerConfig
from .layers import SegformerLayer, SegformerOverlapPatchEmbeddings


class SegformerEncoder(FoldedForward, nn.Module):
    """Pixels (B, C, H, W) to one map for each stage, finest first."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing: dict[str, Any] | None = None
        channels = [config.num_channels, *config.hidden_sizes]
        self.patch_embeddings = nn.ModuleList(
            SegformerOverlapPatchEmbeddings(
                patch_size=config.patch_sizes[stage],
                stride=config.strides[stage],
                num_channels=channels[stage],
                hidden_size=channels[stage + 1],
                norm_eps=config.patch_norm_eps,
            )
            for stage in range(config.num_encoder_blocks)
        )
        # Stochastic depth rises linearly over all layers of all stages.
        layers = sum(config.depths)
        drop_path = iter(config.drop_path_rate * i / max(layers - 1, 1) for i in range(layers))
        self.block = nn.ModuleList(
            nn.ModuleList(
                SegformerLayer(
                    config,
                    hidden_size=config.hidden_sizes[stage],
                    num_attention_heads=config.num_attention_heads[stage],
                    drop_path=next(drop_path),
                    sr_ratio=config.sr_ratios[stage],
                    mlp_ratio=config.mlp_ratios[stage],
                )
                for _ in range(config.depths[stage])
            )
            for stage in range(config.num_encoder_blocks)
        )
        self.layer_norm = nn.ModuleList(
            nn.LayerNorm(size, eps=config.stage_norm_eps) for size in config.hidden_sizes
        )

    def forward(
        self, pixel_values: torch.Tensor, output_attentions: bool = False
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Encode pixels of any floating dtype and any size.

        Returns:
            the maps (B, C_i, H_i, W_i), each a view of tokens in channels-last memory, and the
            attention probabilities (B, heads, N, N_kv) of every layer, or () where not asked for.
        """
        self._check(pixel_values)
        if not torch.compiler.is_compiling():
            select_backend(pixel_values.device)  # an unknown or absent one is an error
        reason = plain_reason(self, pixel_values)
        folded = not output_attentions and reason is None and self.refresh_in_graph()
        if reason not in (None, ASKED_FOR):
            self.drop_folds()
        feature_map = pixel_values
        maps: list[torch.Tensor] = []
        attentions: list[torch.Tensor] = []
        for stage in range(self.config.num_encoder_blocks):
            embed: Any = self.patch_embeddings[stage]
            layers: Any = self.block[stage]
            tokens, height, width = (
                embed.folded_forward(feature_map) if folded else embed(feature_map)
            )
            self._check_grid(stage, height, width, pixel_values)
            norm = self.layer_norm[stage]
            for layer in layers:
                if folded:
                    # The stage's last layer takes the norm with it: one pass over the tokens less.
                    last_norm = norm if layer is layers[-1] else None
                    tokens = layer.folded_forward(tokens, height, width, last_norm)
                elif self.gradient_checkpointing is not None and self.training:
                    tokens, attention = checkpoint(
                        layer, tokens, height, width, **self.gradient_checkpointing
                    )
                    attentions.append(attention)
                else:
                    tokens, attention = layer(tokens, height, width)
                    attentions.append(attention)
                if not output_attentions:
                    attentions.clear()
            if not folded or len(layers) == 0:
                tokens = norm(tokens)
            feature_map = tokens_to_map(tokens, height, width)
            maps.append(feature_map)
        return tuple(maps), tuple(attentions)

    def folded_stages(self) -> tuple[FoldedStage, ...]:
        """The folded arguments of all ops, stage by stage, as `fastseg.export` writes them."""
        stages: Any = zip(self.patch_embeddings, self.block, self.layer_norm, strict=True)
        return tuple(
            FoldedStage(
                embed.folded(),
                tuple(
                    FoldedLayer(
                        layer.folded()["attention"],
                        {"activation": layer.mlp.hidden_act, **layer.folded()["mix_ffn"]},
                    )
                    for layer in layers
                ),
                {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps},
            )
            for embed, layers, norm in stages
        )

    def _check(self, pixel_values: torch.Tensor) -> None:
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            got = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise TypeError(f"pixel_values: expected a floating-point tensor, got {got}")
        expected = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != expected or 0 in pixel_values.shape:
            raise ValueError(
                f"pixel_values: expected shape (batch, {expected}, height, width), none of them 0, "
                f"got {tuple(pixel_values.shape)}"
            )

    def _check_grid(self, stage: int, height: int, width: int, pixel_values: torch.Tensor) -> None:
        if min(height, width) < self.config.sr_ratios[stage]:
            raise ValueError(
                f"pixel_values: expected an input that gives stage {stage + 1} a grid of at least "
                f"its spatial reduction, {self.config.sr_ratios[stage]}, on both sides; got "
                f"{tuple(pixel_values.shape[2:])} pixels, a grid of {height}x{width}"
            )

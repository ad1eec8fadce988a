"""The Mix Transformer encoder: four stages of overlapping patches, layers and a LayerNorm."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from fastseg.folding.swap import Accelerated, with_plan
from fastseg.kernels.blocks.tokens import tokens_to_map

from ..checkpointing import Checkpointing
from .config import SegformerConfig
from .hosts.own import ENCODER
from .layers import SegformerLayer, SegformerOverlapPatchEmbeddings, grid_side, scale_pixels


class SegformerEncoder(Accelerated, nn.Module):
    """Pixels (B, C, H, W) to one map for each stage, finest first."""

    _fastseg_host = ENCODER
    _fastseg_training = True

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing: Checkpointing | None = None
        channels = [config.num_channels, *config.hidden_sizes]
        self.patch_embeddings = nn.ModuleList(
            SegformerOverlapPatchEmbeddings(
                patch_size=config.patch_sizes[stage],
                stride=config.strides[stage],
                num_channels=channels[stage],
                hidden_size=channels[stage + 1],
                norm_eps=config.patch_norm_eps,
                same_padding=config.same_padding,
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

    @with_plan
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool = False,
        pixel_scale: torch.Tensor | None = None,
        pixel_offset: torch.Tensor | None = None,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Encode pixels of any floating dtype and any size, or bytes with a scale.

        Returns:
            the maps (B, C_i, H_i, W_i), each a view of tokens in channels-last memory, and the
            attention probabilities (B, heads, N, N_kv) of every layer, or () where not asked for.
        """
        self.check(pixel_values, pixel_scale)
        proj: Any = self.patch_embeddings[0].proj
        feature_map = scale_pixels(pixel_values, pixel_scale, pixel_offset, proj)
        maps: list[torch.Tensor] = []
        attentions: list[torch.Tensor] = []
        number = itertools.count()
        stages: Any = zip(self.patch_embeddings, self.block, self.layer_norm, strict=True)
        for embed, layers, norm in stages:
            tokens, height, width = embed(feature_map)
            for layer in layers:
                if self.gradient_checkpointing is not None and self.training:
                    tokens, attention = self.gradient_checkpointing.run(
                        next(number), layer, tokens, height, width
                    )
                else:
                    tokens, attention = layer(tokens, height, width)
                if output_attentions:
                    attentions.append(attention)
            feature_map = tokens_to_map(norm(tokens), height, width)
            maps.append(feature_map)
        return tuple(maps), tuple(attentions)

    def grids(self, height: int, width: int) -> list[tuple[int, int]]:
        """Tokens along both sides in each stage, for an image of `height` x `width`."""
        grids = []
        for patch_size, stride in zip(self.config.patch_sizes, self.config.strides, strict=True):
            height = grid_side(height, patch_size, stride)
            width = grid_side(width, patch_size, stride)
            grids.append((height, width))
        return grids

    def check(self, pixel_values: torch.Tensor, pixel_scale: torch.Tensor | None) -> None:
        """Raise unless these are pixels of a size that every stage has a grid for."""
        is_tensor = isinstance(pixel_values, torch.Tensor)
        are_bytes = is_tensor and pixel_values.dtype == torch.uint8 and pixel_scale is not None
        if not is_tensor or not (pixel_values.is_floating_point() or are_bytes):
            got = getattr(pixel_values, "dtype", type(pixel_values).__name__)
            raise TypeError(f"pixel_values: expected a floating-point tensor, got {got}")
        expected = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != expected or 0 in pixel_values.shape:
            raise ValueError(
                f"pixel_values: expected shape (batch, {expected}, height, width), none of them 0, "
                f"got {tuple(pixel_values.shape)}"
            )
        height, width = pixel_values.shape[2:]
        multiple = self.config.side_multiple
        if multiple and (height != width or height % multiple):
            raise ValueError(
                f"pixel_values: expected squares with sides that are multiples of {multiple}, the "
                f"only ones that KerasCV's network takes, got {height}x{width} pixels"
            )
        grids = self.grids(height, width)
        for stage, (height, width) in enumerate(grids):
            if min(height, width) < self.config.sr_ratios[stage]:
                raise ValueError(
                    f"pixel_values: expected an input that gives stage {stage + 1} a grid of at "
                    f"least its spatial reduction, {self.config.sr_ratios[stage]}, on both sides; "
                    f"got {tuple(pixel_values.shape[2:])} pixels, a grid of {height}x{width}"
                )

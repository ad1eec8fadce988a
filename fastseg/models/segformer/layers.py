"""The parts of a SegFormer stage, in plain differentiable PyTorch.

Every module computes on tokens (B, N, C) of an H x W grid, N = H * W in row-major order. Modules
and parameters carry transformers' names. Dropout and stochastic depth are where transformers has
them, so a seeded training step draws the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.kernels.blocks.activations import ACTIVATIONS
from fastseg.kernels.blocks.tokens import mix_channels, unmix_channels

from ..drop_path import DropPath
from .config import SegformerConfig


def scale_pixels(
    pixel_values: torch.Tensor,
    pixel_scale: torch.Tensor | None,
    pixel_offset: torch.Tensor | None,
    proj: Any,
) -> torch.Tensor:
    """`pixel_values * pixel_scale + pixel_offset` by channel, in the dtype of `proj.weight`."""
    if pixel_scale is None and pixel_offset is None:
        return pixel_values
    scale = 1.0 if pixel_scale is None else pixel_scale[:, None, None]
    offset = 0.0 if pixel_offset is None else pixel_offset[:, None, None]
    return (pixel_values * scale + offset).to(proj.weight.dtype)


class SegformerDropPath(DropPath):
    """Stochastic depth, under transformers' name."""


def grid_side(side: int, patch_size: int, stride: int) -> int:
    """Tokens along a side of a map that has `side` positions there."""
    return (side + 2 * (patch_size // 2) - patch_size) // stride + 1


class SameConv2d(nn.Conv2d):
    """Convolution with the padding "same" of Keras: what is odd of it goes below and to the right.

    Sides are multiples of the stride.
    """

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        total = self.kernel_size[0] - self.stride[0]
        before = total // 2
        padded = F.pad(feature_map, (before, total - before, before, total - before))
        return super().forward(padded)


class SegformerOverlapPatchEmbeddings(nn.Module):
    """Strided convolution, then LayerNorm.

    Its padding is `patch_size // 2`, or that of `SameConv2d`.
    """

    def __init__(
        self,
        patch_size: int,
        stride: int,
        num_channels: int,
        hidden_size: int,
        norm_eps: float = 1e-5,
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        convolution = SameConv2d if same_padding else nn.Conv2d
        self.proj = convolution(
            num_channels,
            hidden_size,
            kernel_size=patch_size,
            stride=stride,
            padding=0 if same_padding else patch_size // 2,
        )
        self.layer_norm = nn.LayerNorm(hidden_size, eps=norm_eps)

    def forward(self, feature_map: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """(B, C_in, H_in, W_in) -> tokens (B, H*W, C), H, W."""
        embeddings = self.proj(feature_map)
        height, width = embeddings.shape[2:]
        return self.layer_norm(embeddings.flatten(2).transpose(1, 2)), height, width


class SegformerEfficientSelfAttention(nn.Module):
    """Self-attention whose keys and values come from a grid reduced `sr_ratio` times a side.

    With `mixes_channels` that grid is the memory of the tokens as (B, C, N), read as (B, N, C).
    """

    def __init__(
        self, config: SegformerConfig, hidden_size: int, num_attention_heads: int, sr_ratio: int
    ) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self.mixes_channels = config.mixes_channels and sr_ratio > 1
        self.sr = None
        if sr_ratio > 1:
            self.sr = nn.Conv2d(hidden_size, hidden_size, kernel_size=sr_ratio, stride=sr_ratio)
            self.layer_norm = nn.LayerNorm(hidden_size, eps=config.reduction_norm_eps)

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, heads, N, C / heads)."""
        return tokens.unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N, C) -> context (B, N, C) and probabilities (B, heads, N, N_kv)."""
        query = self._split_heads(self.query(hidden_states))
        reduced = hidden_states
        if self.sr is not None:
            batch, _, channels = hidden_states.shape
            tokens = mix_channels(hidden_states) if self.mixes_channels else hidden_states
            grid = tokens.transpose(1, 2).reshape(batch, channels, height, width)
            reduced = self.sr(grid).flatten(2).transpose(1, 2)
            reduced = self.layer_norm(unmix_channels(reduced) if self.mixes_channels else reduced)
        key = self._split_heads(self.key(reduced))
        value = self._split_heads(self.value(reduced))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        # Half-precision exponentials lose the small probabilities.
        softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
        probabilities = scores.softmax(dim=-1, dtype=softmax_dtype).to(scores.dtype)
        probabilities = self.dropout(probabilities)
        context = (probabilities @ value).transpose(1, 2).flatten(2)
        return context, probabilities


class SegformerSelfOutput(nn.Module):
    """The output projection of the attention."""

    def __init__(self, config: SegformerConfig, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(hidden_states))


class SegformerAttention(nn.Module):
    """Efficient self-attention and its output projection."""

    def __init__(
        self, config: SegformerConfig, hidden_size: int, num_attention_heads: int, sr_ratio: int
    ) -> None:
        super().__init__()
        self.self = SegformerEfficientSelfAttention(
            config, hidden_size, num_attention_heads, sr_ratio
        )
        self.output = SegformerSelfOutput(config, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        context, probabilities = self.self(hidden_states, height, width)
        return self.output(context), probabilities


class SegformerDWConv(nn.Module):
    """Depthwise 3x3 convolution on tokens: the only source of position in SegFormer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        batch, _, channels = hidden_states.shape
        grid = hidden_states.transpose(1, 2).view(batch, channels, height, width)
        return self.dwconv(grid).flatten(2).transpose(1, 2)


class SegformerMixFFN(nn.Module):
    """Linear, depthwise 3x3 convolution, activation, linear."""

    def __init__(self, config: SegformerConfig, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.dwconv = SegformerDWConv(mlp_hidden_size)
        self.hidden_act = config.hidden_act
        self.dense2 = nn.Linear(mlp_hidden_size, hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, height: int, width: int) -> torch.Tensor:
        hidden_states = self.dwconv(self.dense1(hidden_states), height, width)
        hidden_states = self.dropout(ACTIVATIONS[self.hidden_act](hidden_states))
        return self.dropout(self.dense2(hidden_states))


class SegformerLayer(nn.Module):
    """One Transformer layer: attention and Mix-FFN, each after a LayerNorm, each residual."""

    def __init__(
        self,
        config: SegformerConfig,
        hidden_size: int,
        num_attention_heads: int,
        drop_path: float,
        sr_ratio: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(hidden_size, eps=config.block_norm_eps)
        self.attention = SegformerAttention(config, hidden_size, num_attention_heads, sr_ratio)
        self.drop_path = SegformerDropPath(drop_path)
        self.layer_norm_2 = nn.LayerNorm(hidden_size, eps=config.block_norm_eps)
        self.mlp = SegformerMixFFN(config, hidden_size, int(hidden_size * mlp_ratio))

    def forward(
        self, hidden_states: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N, C) -> tokens and attention probabilities (B, heads, N, N_kv)."""
        attended, probabilities = self.attention(self.layer_norm_1(hidden_states), height, width)
        hidden_states = self.drop_path(attended) + hidden_states
        mixed = self.mlp(self.layer_norm_2(hidden_states), height, width)
        return self.drop_path(mixed) + hidden_states, probabilities

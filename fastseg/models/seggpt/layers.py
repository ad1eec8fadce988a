"""The parts of a SegGPT, in plain differentiable PyTorch, with transformers' names.

Tokens are (B, H, W, C), H x W the grid of patches of the stacked picture: the prompt above the
image. Images and masks are two streams, one behind the other in the batch, until they merge.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.kernels.blocks.activations import ACTIVATIONS

from ..drop_path import DropPath
from .config import SegGptConfig
from .encoder_plan import mean_of_queries

EMBEDDING_TYPES = ("instance", "semantic")


class SegGptDropPath(DropPath):
    """Stochastic depth, under transformers' name."""


class SegGptPatchEmbeddings(nn.Module):
    """Patches (B, C, h, w) to tokens by a strided convolution, which images and masks share."""

    def __init__(self, config: SegGptConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=patch, stride=patch
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.projection(pixel_values)
        return embeddings.permute(0, 2, 3, 1)


def positions_of(stored: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Position embeddings (1, 1 + S S, C), without the first, for a grid: (1, H, W, C)."""
    side = round((stored.shape[1] - 1) ** 0.5)
    square = stored[:, 1:].reshape(1, side, side, -1)
    if grid == (side, side):
        return square
    square = square.permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def type_token(embeddings: Any, embedding_type: str | None) -> torch.Tensor:
    """The token of a kind of mask, "instance" where None.

    Raises:
        ValueError: there is no such kind.
    """
    kind = EMBEDDING_TYPES[0] if embedding_type is None else embedding_type
    if kind not in EMBEDDING_TYPES:
        raise ValueError(
            f"embedding_type: expected one of {', '.join(EMBEDDING_TYPES)}, got {embedding_type!r}"
        )
    token: torch.Tensor = getattr(embeddings, f"type_token_{kind}")
    return token


class SegGptEmbeddings(nn.Module):
    """Both pictures to tokens: patches, positions, which stream, which kind of mask."""

    def __init__(self, config: SegGptConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.hidden_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.segment_token_input = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.segment_token_prompt = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.type_token_semantic = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.type_token_instance = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.patch_embeddings = SegGptPatchEmbeddings(config)
        side = config.pretrain_image_size // config.patch_size
        # The first is a class token's, which is not used.
        self.position_embeddings = nn.Parameter(torch.zeros(1, side * side + 1, channels))

    def forward(
        self,
        pixel_values: torch.Tensor,
        mask_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        embedding_type: str | None = None,
    ) -> torch.Tensor:
        """Stacked images and masks (B, C, height, width) -> both streams (2 B, H, W, C).

        Args:
            bool_masked_pos: (B or 1, H W), patches of the mask that the mask token stands for.
        """
        images = self.patch_embeddings(pixel_values)
        masks = self.patch_embeddings(mask_values)
        hidden: Any = bool_masked_pos.unsqueeze(-1).type_as(masks)
        hidden = hidden.reshape(-1, *masks.shape[1:3], 1)
        masks = masks * (1 - hidden) + self.mask_token * hidden
        token = type_token(self, embedding_type)
        positions = positions_of(self.position_embeddings, self.config.grid)
        images = images + self.segment_token_input + positions + token
        masks = masks + self.segment_token_prompt + positions + token
        return torch.cat((images, masks), dim=0)


class SegGptAttention(nn.Module):
    """Attention over all tokens, with relative positions by rows and by columns."""

    def __init__(self, config: SegGptConfig) -> None:
        super().__init__()
        channels = config.hidden_size
        width = channels // config.num_attention_heads
        self.num_attention_heads = config.num_attention_heads
        self.scale = width**-0.5
        self.qkv = nn.Linear(channels, 3 * channels, bias=config.qkv_bias)
        self.proj = nn.Linear(channels, channels)
        height, columns = config.grid
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, width))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, width))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, H, W, C) -> output (B, H, W, C) and probabilities (B, heads, H W, H W)."""
        batch, height, width, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).reshape(
            batch, height * width, 3, self.num_attention_heads, -1
        )
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = (query * self.scale) @ key.transpose(-2, -1)
        grid = query.unflatten(2, (height, width))
        by_row = torch.einsum("bnhwc,hkc->bnhwk", grid, _vectors(self.rel_pos_h, height))
        by_column = torch.einsum("bnhwc,wkc->bnhwk", grid, _vectors(self.rel_pos_w, width))
        bias = by_row.unsqueeze(-1) + by_column.unsqueeze(-2)
        scores = scores + bias.flatten(4).flatten(2, 3)
        # Half-precision exponentials lose the small probabilities.
        softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
        probabilities = scores.softmax(dim=-1, dtype=softmax_dtype).to(query.dtype)
        context = (probabilities @ value).transpose(1, 2)
        return self.proj(context.reshape(hidden_states.shape)), probabilities


def _vectors(relative: torch.Tensor, side: int) -> torch.Tensor:
    """(2 S - 1, d) by distance -> (S, S, d) by query and key."""
    places = torch.arange(side, device=relative.device)
    return relative[places[:, None] - places + side - 1]


class SegGptMlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: SegGptConfig) -> None:
        super().__init__()
        self.hidden_act = config.hidden_act
        self.lin1 = nn.Linear(config.hidden_size, config.mlp_dim)
        self.lin2 = nn.Linear(config.mlp_dim, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.lin2(ACTIVATIONS[self.hidden_act](self.lin1(hidden_states)))
        return output


class SegGptLayer(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual."""

    def __init__(self, config: SegGptConfig, drop_path: float) -> None:
        super().__init__()
        self.attention = SegGptAttention(config)
        self.mlp = SegGptMlp(config)
        self.drop_path = SegGptDropPath(drop_path)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        ensemble_cond: int,
        feature_ensemble: bool = False,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Tokens (B, H, W, C) -> (tokens,), and with `output_attentions` the probabilities.

        Args:
            ensemble_cond: the streams in the batch; the ensemble needs twice as many items.
            feature_ensemble: give all prompts' lower halves the mean of what attention gives.
        """
        output, probabilities = self.attention(self.layernorm_before(hidden_states))
        if feature_ensemble and len(output) // 2 >= ensemble_cond:
            output = mean_of_queries(output, ensemble_cond)
        hidden_states = self.drop_path(output) + hidden_states
        branch = self.mlp(self.layernorm_after(hidden_states))
        hidden_states = hidden_states + self.drop_path(branch)
        return (hidden_states, probabilities) if output_attentions else (hidden_states,)


class SegGptLayerNorm(nn.LayerNorm):
    """LayerNorm of the channels of maps (B, C, H, W)."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SegGptDecoderHead(nn.Module):
    """Channels of pixels (B, C, H, W) to colours (B, 3, H, W)."""

    def __init__(self, config: SegGptConfig) -> None:
        super().__init__()
        channels = config.decoder_hidden_size
        self.hidden_act = config.hidden_act
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.layernorm = SegGptLayerNorm(channels, eps=config.layer_norm_eps)
        self.head = nn.Conv2d(channels, 3, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.layernorm(self.conv(hidden_states))
        colours: torch.Tensor = self.head(ACTIVATIONS[self.hidden_act](hidden_states))
        return colours

"""Tokens (B, H*W, C) and feature maps (B, C, H, W): one memory, channels-last, in two shapes."""

import torch


def tokens_to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, H*W, C) as a (B, C, H, W) view: channels-last memory, no copy."""
    batch, _, channels = tokens.shape
    return tokens.view(batch, height, width, channels).permute(0, 3, 1, 2)


def map_to_tokens(feature_map: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) as tokens (B, H*W, C): no copy where the map is in channels-last memory."""
    batch, channels, height, width = feature_map.shape
    return feature_map.permute(0, 2, 3, 1).reshape(batch, height * width, channels)


def mix_channels(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, C) whose memory is that of (B, C, N): each one of pieces of channels.

    KerasCV's SegFormer does so before its spatial reduction.
    """
    return tokens.transpose(1, 2).reshape(tokens.shape)


def unmix_channels(tokens: torch.Tensor) -> torch.Tensor:
    """The memory of tokens (B, N, C) read as (B, C, N), in (B, N, C): undoes `mix_channels`."""
    batch, count, channels = tokens.shape
    return tokens.reshape(batch, channels, count).transpose(1, 2)

"""The all-MLP decode head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.folding.swap import Accelerated, with_plan
from fastseg.kernels.blocks.tokens import map_to_tokens
from fastseg.training.head import head_logits

from .config import SegformerConfig
from .head_training import training_reason
from .hosts.heads import transformers_modules
from .hosts.own import HEAD


class SegformerMLP(nn.Module):
    """Linear projection of one stage's tokens to the decoder's width."""

    def __init__(self, config: SegformerConfig, input_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(input_dim, config.decoder_hidden_size)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, D, H, W)."""
        projected = self.proj(map_to_tokens(feature_map))
        return projected.transpose(1, 2).unflatten(2, feature_map.shape[2:])


class SegformerDecodeHead(Accelerated, nn.Module):
    """Stage maps, finest first, to logits (B, num_labels, H/4, W/4)."""

    _fastseg_host = HEAD

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.linear_c = nn.ModuleList(
            SegformerMLP(config, input_dim=hidden_size) for hidden_size in config.hidden_sizes
        )
        self.linear_fuse = nn.Conv2d(
            width * config.num_encoder_blocks, width, kernel_size=1, bias=False
        )
        self.batch_norm = nn.BatchNorm2d(width, eps=config.batch_norm_eps)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(config.classifier_dropout_prob)
        self.classifier = nn.Conv2d(width, config.num_labels, kernel_size=1)

    @with_plan
    def forward(self, encoder_hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (B, C_i, H_i, W_i) -> logits (B, num_labels, H_1, W_1).

        Raises:
            ValueError: not one map for each stage, or maps that are not 4-D. With
                `reshape_last_stage=False` a model passes maps all the same; tokens alone do not
                tell their height and width.
        """
        maps = self.check(encoder_hidden_states)
        if training_reason(HEAD, self, *maps) is None:
            return head_logits(transformers_modules(self), maps)
        size = maps[0].shape[2:]
        projected = [
            F.interpolate(linear(feature_map), size=size, mode="bilinear", align_corners=False)
            for linear, feature_map in zip(self.linear_c, maps, strict=True)
        ]
        fused = self.linear_fuse(torch.cat(projected[::-1], dim=1))
        return self.classifier(self.dropout(self.activation(self.batch_norm(fused))))

    def check(self, encoder_hidden_states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The maps in a list; raise unless there is one for each stage."""
        shapes = [tuple(feature_map.shape) for feature_map in encoder_hidden_states]
        if len(shapes) != len(self.linear_c) or any(len(shape) != 4 for shape in shapes):
            raise ValueError(
                f"encoder_hidden_states: expected {len(self.linear_c)} maps (B, C, H, W), "
                f"got shapes {shapes}"
            )
        return list(encoder_hidden_states)

"""Outputs of SegGPT's models."""

from __future__ import annotations

import torch

from ..outputs import ModelOutput


class SegGptEncoderOutput(ModelOutput):
    """Output of SegGptModel; H x W is the grid of patches of the stacked picture.

    last_hidden_state: (B, H, W, C).
    hidden_states: before each layer and behind the last, of batch 2 B up to the merge.
    attentions: of each layer (2 B, heads, H W, H W), behind the merge of batch B.
    intermediate_hidden_states: a list of (B, H, W, C), what the decoder takes.
    """

    fields = ("last_hidden_state", "hidden_states", "attentions", "intermediate_hidden_states")
    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    intermediate_hidden_states: list[torch.Tensor]


class SegGptImageSegmentationOutput(ModelOutput):
    """Output of SegGptForImageSegmentation.

    pred_masks: (B, 3, height, width), the painted mask of the prompt above that of the image, in
        normalised colours.
    """

    fields = ("loss", "pred_masks", "hidden_states", "attentions")
    loss: torch.Tensor | None
    pred_masks: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None

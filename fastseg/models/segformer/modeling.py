"""The SegFormer family: SegformerModel and the heads on it, with transformers' names.

Module and parameter names are those of `config.json` + `model.safetensors` files on disk, so a
checkpoint loads without renaming. In eval mode without gradients the encoder and the decode head
run on folded weights (`with_plan`); else on the plain, differentiable code that is here.
Paper: Xie et al., SegFormer, arXiv:2105.15203.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.exporting.folded import FoldedModel
from fastseg.exporting.stages import FoldedStages
from fastseg.kernels.blocks.tokens import tokens_to_map
from fastseg.training.loss import FastLoss, segmentation_loss

from ..base import PreTrainedModel
from ..outputs import (
    BaseModelOutput,
    FieldTuple,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from .config import SegformerConfig
from .decode_head import SegformerDecodeHead
from .encoder import SegformerEncoder
from .names import SEGFORMER_NAMES


class SegformerPreTrainedModel(PreTrainedModel):
    """Base of the three models."""

    config_class = SegformerConfig
    checkpoint_names = SEGFORMER_NAMES
    base_model_prefix = "segformer"
    takes_bytes = True
    config: SegformerConfig

    def folded_model(self) -> FoldedModel:
        """The folded arguments of all ops: see PreTrainedModel."""
        return replace(
            cast(FoldedStages, super().folded_model()),
            upsamples_probabilities=self.config.upsamples_probabilities,
            side_multiple=self.config.side_multiple,
        )


class SegformerModel(SegformerPreTrainedModel):
    """The hierarchical Mix Transformer encoder (MiT).

    Raises:
        TypeError, ValueError: `pixel_values` is not a floating-point tensor of shape
            (B, num_channels, H, W), or is too small for a stage's spatial reduction.
    """

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        self.encoder = SegformerEncoder(config)
        self.apply(self._init_weights)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_scale: torch.Tensor | None = None,
        pixel_offset: torch.Tensor | None = None,
    ) -> BaseModelOutput | FieldTuple:
        """Encode `pixel_values` (B, num_channels, H, W), any floating dtype, any size.

        Args:
            pixel_scale, pixel_offset: (num_channels,) float32 (float64 for weights in float64):
                the pixels are first multiplied and added to by channel. With a scale they may be
                uint8: an image processor's work, inside the first kernel.

        Returns:
            BaseModelOutput; maps are (B, C_i, H_i, W_i) in channels-last memory. With
            `return_dict=False` the tuple of its fields that are not None.
        """
        config = self.config
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        maps, attentions = self.encoder(
            pixel_values,
            output_attentions=output_attentions,
            pixel_scale=pixel_scale,
            pixel_offset=pixel_offset,
        )
        if not config.reshape_last_stage:
            maps = (*maps[:-1], maps[-1].flatten(2).transpose(1, 2))
        output = BaseModelOutput(
            last_hidden_state=maps[-1],
            hidden_states=maps if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
        return output if self._return_dict(return_dict) else output.to_tuple()


class SegformerForSemanticSegmentation(FastLoss, SegformerPreTrainedModel):
    """MiT encoder and all-MLP decode head: logits at a quarter of the input's size."""

    segments = True

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        self.segformer = SegformerModel(config)
        self.decode_head = SegformerDecodeHead(config)
        self.decode_head.apply(self._init_weights)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_scale: torch.Tensor | None = None,
        pixel_offset: torch.Tensor | None = None,
    ) -> SemanticSegmenterOutput | FieldTuple:
        """Segment `pixel_values` (B, num_channels, H, W).

        Args:
            labels: integer (B, h, w) class numbers; logits are resized to (h, w) bilinearly and
                give the loss, without pixels of `semantic_loss_ignore_index`: cross-entropy, or
                binary cross-entropy for `num_labels == 1`. The resized logits are never in memory
                (`fastseg.kernels.upsample_cross_entropy`), but inside `fastseg.plain_path`.
            pixel_scale, pixel_offset: as of SegformerModel.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        encoded = self.segformer(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=True,
            return_dict=True,
            pixel_scale=pixel_scale,
            pixel_offset=pixel_offset,
        )
        logits = self.decode_head(self._stage_maps(encoded.hidden_states, pixel_values))
        output = SemanticSegmenterOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=encoded.hidden_states if output_hidden_states else None,
            attentions=encoded.attentions,
            probabilities=self._probabilities(logits),
        )
        return output if self._return_dict(return_dict) else output.to_tuple()

    def _probabilities(self, logits: torch.Tensor) -> torch.Tensor | None:
        """What is to be upsampled in the place of the logits, if anything; one class has none."""
        if not self.config.upsamples_probabilities or logits.shape[1] == 1:
            return None
        dtype = torch.promote_types(logits.dtype, torch.float32)
        # Along memory, for on a CPU logits are channels-last: a ninth of the time.
        return logits.permute(0, 2, 3, 1).softmax(-1, dtype=dtype).permute(0, 3, 1, 2)

    def _stage_maps(
        self, hidden_states: tuple[torch.Tensor, ...], pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Maps of all stages, the last one too where `reshape_last_stage` leaves it as tokens."""
        last = hidden_states[-1]
        if last.ndim == 4:
            return hidden_states
        height, width = self._encoder.grids(*pixel_values.shape[2:])[-1]
        return (*hidden_states[:-1], tokens_to_map(last, height, width))

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if labels.ndim != 3 or labels.shape[0] != logits.shape[0]:
            raise ValueError(
                f"labels: expected shape ({logits.shape[0]}, height, width), "
                f"got {tuple(labels.shape)}"
            )
        return segmentation_loss(logits, labels, self.config.semantic_loss_ignore_index)


class SegformerForImageClassification(SegformerPreTrainedModel):
    """MiT encoder, mean over the last stage's tokens, and a linear classifier."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        self.segformer = SegformerModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.classifier.apply(self._init_weights)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_scale: torch.Tensor | None = None,
        pixel_offset: torch.Tensor | None = None,
    ) -> ImageClassifierOutput | FieldTuple:
        """Classify `pixel_values` (B, num_channels, H, W).

        Args:
            labels: (B,) class numbers, (B,) or (B, num_labels) floats for regression, or
                (B, num_labels) floats from 0 to 1 for multi-label classification; the loss is
                chosen by `config.problem_type`, or by `num_labels` and the dtype where it is None.
            pixel_scale, pixel_offset: as of SegformerModel.
        """
        encoded = self.segformer(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            pixel_scale=pixel_scale,
            pixel_offset=pixel_offset,
        )
        last = encoded.last_hidden_state
        tokens = last.flatten(2).transpose(1, 2) if self.config.reshape_last_stage else last
        logits = self.classifier(tokens.mean(dim=1))
        loss = None if labels is None else self._loss(logits, labels)
        output = ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if self._return_dict(return_dict) else output.to_tuple()

    def _without_head(self) -> dict[str, Any]:
        return {"classifier": self.classifier, "id2label": dict(self.config.id2label)}

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        num_labels = self.config.num_labels
        problem_type = self.config.problem_type
        if problem_type is None:
            if num_labels == 1:
                problem_type = "regression"
            elif labels.dtype in (torch.long, torch.int):
                problem_type = "single_label_classification"
            else:
                problem_type = "multi_label_classification"
        labels = labels.to(logits.device)
        if problem_type == "regression":
            if num_labels == 1:
                return F.mse_loss(logits.squeeze(), labels.squeeze())
            return F.mse_loss(logits, labels)
        if problem_type == "single_label_classification":
            return F.cross_entropy(logits.view(-1, num_labels), labels.view(-1))
        return F.binary_cross_entropy_with_logits(logits, labels)

"""The SegGPT family: SegGptModel and SegGptForImageSegmentation, with transformers' names.

Module and parameter names are those of `config.json` + `model.safetensors` files on disk, so a
checkpoint loads without renaming. In eval mode without gradients the encoder and the decoder run
by their plans (`with_plan`); else by the plain, differentiable code that is here.
Paper: Wang et al., SegGPT: Segmenting Everything In Context, arXiv:2304.03284.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..base import PreTrainedModel
from ..outputs import FieldTuple
from .config import SegGptConfig
from .encoder import SegGptDecoder, SegGptEncoder
from .layers import SegGptAttention, SegGptEmbeddings
from .names import SEGGPT_NAMES
from .outputs import SegGptEncoderOutput, SegGptImageSegmentationOutput
from .processor import SegGptImageProcessor


class SegGptPreTrainedModel(PreTrainedModel):
    """Base of the two models."""

    config_class = SegGptConfig
    checkpoint_names = SEGGPT_NAMES
    base_model_prefix = "model"
    image_processor_class = SegGptImageProcessor
    config: SegGptConfig

    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights and tokens from N(0, initializer_range), cut off at 2; zero biases."""
        std = self.config.initializer_range
        drawn: list[torch.Tensor] = []
        if isinstance(module, nn.Linear | nn.Conv2d):
            drawn = [module.weight]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, SegGptAttention):
            drawn = [module.rel_pos_h, module.rel_pos_w]
        elif isinstance(module, SegGptEmbeddings):
            drawn = list(module.parameters(recurse=False))
        for tensor in drawn:
            nn.init.trunc_normal_(tensor, std=std)


class SegGptModel(SegGptPreTrainedModel):
    """Embeddings and encoder: features of the stacked picture."""

    def __init__(self, config: SegGptConfig) -> None:
        super().__init__(config)
        self.embeddings = SegGptEmbeddings(config)
        self.encoder = SegGptEncoder(config)
        self.apply(self._init_weights)

    def forward(
        self,
        pixel_values: torch.Tensor,
        prompt_pixel_values: torch.Tensor,
        prompt_masks: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        feature_ensemble: bool | None = None,
        embedding_type: str | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SegGptEncoderOutput | FieldTuple:
        """Encode images beside their prompts, each (B, num_channels, height / 2, width).

        Args:
            pixel_values, prompt_pixel_values: images, in any floating dtype.
            prompt_masks: the prompts' masks, painted in colours and normalised as images are.
            bool_masked_pos: (B or 1, patches), True for patches of the stacked mask that are to be
                painted; the lower half where None.
            feature_ensemble: give all prompts in the batch, which are of one image, the mean of
                what attention gives to the image. As in transformers: see docs/seggpt.md.
            embedding_type: "instance" (the default) or "semantic".
            labels: the image's own mask, beneath the prompt's, for training.

        Returns:
            SegGptEncoderOutput; with `return_dict=False` the tuple of its fields that are not None.

        Raises:
            ValueError: sizes, the dtype or an argument is none of these.
        """
        config = self.config
        masks = prompt_masks if labels is None else labels
        for name, one in (
            ("pixel_values", pixel_values),
            ("prompt_pixel_values", prompt_pixel_values),
            ("prompt_masks", prompt_masks),
            ("labels", masks),
        ):
            self._check(name, one)
        if bool_masked_pos is None:
            bool_masked_pos = self.lower_half(pixel_values.device)
        # Images and masks in the weights' dtype: transformers casts the images alone.
        embeddings = self.embeddings(
            torch.cat((prompt_pixel_values, pixel_values), dim=2).to(self.dtype),
            torch.cat((prompt_masks, masks), dim=2).to(self.dtype),
            bool_masked_pos,
            embedding_type,
        )
        output: SegGptEncoderOutput | FieldTuple = self.encoder(
            embeddings,
            feature_ensemble=bool(feature_ensemble),
            output_attentions=(
                config.output_attentions if output_attentions is None else output_attentions
            ),
            output_hidden_states=(
                config.output_hidden_states
                if output_hidden_states is None
                else output_hidden_states
            ),
            return_dict=self._return_dict(return_dict),
        )
        return output

    def _without_head(self) -> dict[str, Any]:
        raise ValueError("model: expected a SegGptForImageSegmentation, got a SegGptModel")

    def lower_half(self, device: torch.device) -> torch.Tensor:
        """(1, patches): True for those of the image, which stands below its prompt."""
        height, width = self.config.grid
        return (torch.arange(height * width, device=device) >= height * width // 2)[None]

    def _check(self, name: str, pixels: torch.Tensor) -> None:
        config = self.config
        expected = config.num_channels, config.image_size[0] // 2, config.image_size[1]
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(
                f"{name}: expected shape (batch, {', '.join(map(str, expected))}), "
                f"got {tuple(pixels.shape)}"
            )


class SegGptForImageSegmentation(SegGptPreTrainedModel):
    """SegGptModel and the decoder: paints the mask of an image in the colours of a prompt's."""

    default_embedding_type = "instance"

    def __init__(self, config: SegGptConfig) -> None:
        super().__init__(config)
        self.model = SegGptModel(config)
        self.decoder = SegGptDecoder(config)
        self.decoder.apply(self._init_weights)

    def forward(
        self,
        pixel_values: torch.Tensor,
        prompt_pixel_values: torch.Tensor,
        prompt_masks: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        feature_ensemble: bool | None = None,
        embedding_type: str | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SegGptImageSegmentationOutput | FieldTuple:
        """Paint the masks of images. Arguments and errors are those of SegGptModel.

        With `labels` the loss is smooth L1 over the pixels of `bool_masked_pos`. As in transformers
        it grows with the batch where the masked patches are given once for all of it, or not at
        all: give them for each image.
        """
        if bool_masked_pos is None:
            bool_masked_pos = self.model.lower_half(pixel_values.device)
        encoded = self.model(
            pixel_values,
            prompt_pixel_values,
            prompt_masks,
            bool_masked_pos=bool_masked_pos,
            feature_ensemble=feature_ensemble,
            embedding_type=embedding_type or self.default_embedding_type,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pred_masks = self.decoder(torch.cat(encoded.intermediate_hidden_states, dim=-1))
        loss = None
        if labels is not None:
            loss = self._loss(pred_masks, torch.cat((prompt_masks, labels), 2), bool_masked_pos)
        output = SegGptImageSegmentationOutput(
            loss=loss,
            pred_masks=pred_masks,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if self._return_dict(return_dict) else output.to_tuple()

    def _loss(
        self, pred_masks: torch.Tensor, masks: torch.Tensor, bool_masked_pos: torch.Tensor
    ) -> torch.Tensor:
        patch = self.config.patch_size
        is_masked = bool_masked_pos.unflatten(1, self.config.grid)
        is_masked = is_masked.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        errors = F.smooth_l1_loss(pred_masks, masks, reduction="none", beta=self.config.beta)
        # Once for each channel; the count is not of the batch where the patches are not.
        return (errors * is_masked[:, None]).sum() / (3 * is_masked.sum())

"""Painting the mask of an image by one or several prompts, and what is kept of these.

Only what a label map needs is computed: the image's half of the stacked picture once for all
prompts, the mask stream once for all images, and of the last layer and the decoder the image's
half and the row of patches above it, which the decoder's convolution mixes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastseg.folding.conditions import part_problem
from fastseg.folding.find import find
from fastseg.folding.freshness import ModelWatch
from fastseg.folding.swap import Accelerated

from .encoder_plan import EncoderPlan, Halves, LayerPlan
from .layers import positions_of, type_token

RULES = ("painter", "transformers")


@dataclass
class SegGptPrompt:
    """An image and its mask, prepared for a model by `fastseg.keep_prompt`.

    What the model makes of them is kept, 9.6 MB in float32 for the published sizes, and made anew
    where the model has changed since: other weights, dtype, device.

    Attributes:
        num_labels: classes beside the background; None where the mask is taken as it is painted.
        embedding_type: "instance" or "semantic".
    """

    model: Any
    pixel_values: torch.Tensor  # (1, 3, H, W), on the CPU
    masks: torch.Tensor
    num_labels: int | None
    embedding_type: str | None
    _kept: Any = field(default=None, repr=False)  # (ModelWatch, Streams)

    def streams(self) -> Streams:
        """What is kept, made anew where the model has changed."""
        if self._kept is None or not self._kept[0].is_same():
            streams = streams_of(self.model, [self], RULES[0])
            self._kept = ModelWatch(self.model.model, derived=True), streams
        kept: Streams = self._kept[1]
        return kept


@dataclass(frozen=True)
class Streams:
    """What does not depend on the image.

    prompts: the upper half (N, H/2, W, C) of the image stream, before the first layer.
    below: what is added to the image's patches, (1, H/2, W, C).
    masks: the mask stream, behind the layer of the merge, or before it by transformers' rule.
    """

    prompts: torch.Tensor
    below: torch.Tensor
    masks: Halves


def is_seggpt(model: Any) -> bool:
    """Return whether it is a SegGptForImageSegmentation, of fastseg or of transformers."""
    paths = (
        "model.embeddings.segment_token_input",
        "model.encoder.layers",
        "decoder.decoder_embed",
    )
    return isinstance(model, nn.Module) and all(find(model, path) is not None for path in paths)


def check_around(model: Any) -> None:
    """Check what is called around the encoder's layers and the decoder, and is left out.

    Raises:
        ValueError: it has hooks or other forwards.
    """
    of_embeddings = ("model.embeddings", "model.embeddings.patch_embeddings")
    for name in ("", "model", "model.encoder", *of_embeddings):
        if problem := part_problem(model.get_submodule(name)):
            raise ValueError(
                f"model: expected one whose parts can be run one by one, but {name or 'it'} "
                f"{problem}"
            )


def grid_of(model: Any) -> tuple[int, int]:
    """Rows and columns of patches in the stacked picture."""
    height, width = model.config.image_size
    return height // model.config.patch_size, width // model.config.patch_size


def streams_of(model: Any, prompts: Sequence[SegGptPrompt], rule: str) -> Streams:
    """Run all that is of the prompts alone."""
    embeddings = model.model.embeddings
    like = embeddings.patch_embeddings.projection.weight
    project = embeddings.patch_embeddings.projection
    token = type_token(embeddings, prompts[0].embedding_type)
    added = positions_of(embeddings.position_embeddings, grid_of(model)) + token
    above, below = added.chunk(2, dim=1)

    def patches(pictures: list[torch.Tensor]) -> torch.Tensor:
        pixels = torch.cat(pictures).to(device=like.device, dtype=like.dtype)
        return torch.cat([project(one) for one in pixels.split(1)]).permute(0, 2, 3, 1)

    images = patches([one.pixel_values for one in prompts])
    masks = patches([one.masks for one in prompts])
    stream = Halves(
        masks + embeddings.segment_token_prompt + above,
        embeddings.mask_token + embeddings.segment_token_prompt + below,
    )
    merge = model.config.merge_index
    is_joint = rule == "transformers" and len(prompts) > 1
    for layer in _layers(model)[: merge + (not is_joint)]:
        (stream,) = layer.run_halves([stream])
    return Streams(
        images + embeddings.segment_token_input + above,
        embeddings.segment_token_input + below,
        stream,
    )


def paint(model: Any, pixel_values: torch.Tensor, streams: Streams, rule: str) -> torch.Tensor:
    """Paint the mask (1, 3, H, W) of one image (1, 3, H, W), in normalised colours."""
    embeddings, encoder, config = model.model.embeddings, model.model.encoder, model.config
    project = embeddings.patch_embeddings.projection
    like = project.weight
    pixels = pixel_values.to(device=like.device, dtype=like.dtype)
    stream = Halves(streams.prompts, project(pixels).permute(0, 2, 3, 1) + streams.below)
    is_joint = rule == "transformers" and len(streams.prompts) > 1
    taken = config.intermediate_hidden_state_indices
    features = []
    for index, layer in enumerate(_layers(model)[: max(taken) + 1]):
        masks = streams.masks
        is_last = index == max(taken)
        if index == config.merge_index and is_joint:
            stream, masks = layer.run_halves([stream, masks], joint=True)
        else:
            (stream,) = layer.run_halves([stream], last=is_last and index > config.merge_index)
        if index == config.merge_index:
            stream = Halves(*((a + b) * 0.5 for a, b in zip(stream, masks, strict=True)))
        if index in taken:
            # The row above the image is the first prompt's, as Painter takes it.
            lower = torch.cat([stream.prompts[:1, -1:], stream.query], dim=1)
            features.append(encoder.layernorm(lower))
    painted: torch.Tensor = model.decoder(torch.cat(features, dim=-1))
    return painted[:, :, config.patch_size :]


def _layers(model: Any) -> list[LayerPlan]:
    """The encoder's layers: by its plan where that may run, else each by its own code."""
    encoder: Any = model.model.encoder
    check_around(model)
    like = encoder.layernorm.weight.new_empty(0, *grid_of(model), 1)
    if isinstance(encoder, Accelerated) and encoder.fastseg_reason() is None:
        plan: Any = encoder.fastseg_state().settled
        if plan.takes(like):
            layers: list[LayerPlan] = plan.layers
            return layers
    reasons = {id(layer): "the encoder runs its own code" for layer in encoder.layers}
    return EncoderPlan(encoder, "", reasons).layers

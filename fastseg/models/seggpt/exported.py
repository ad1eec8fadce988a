"""A SegGPT as exporters see it: a torch program and an ONNX graph of the whole model.

Both take an image and one prompt, as the model's forward does, and give `pred_masks`. What does not
depend on these is made once, and is constant in the file: the tables of relative positions, and the
sums of all that is added to the patches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.exporting.folded import FoldedModel
from fastseg.exporting.onnx_graph import OnnxGraph, Size, Values
from fastseg.folding.swap import Accelerated
from fastseg.kernels.blocks.activations import ACTIVATIONS

from .attention import attend
from .encoder_plan import EncoderPlan, LayerPlan
from .layers import positions_of, type_token
from .onnx import write
from .prompts import check_around, grid_of, is_seggpt


@dataclass(frozen=True)
class FoldedSegGpt(FoldedModel):
    """A SegGptForImageSegmentation, of fastseg or accelerated, whose parts are folded.

    Args:
        model: its modules are read where they are, and not called.
        encoder, decoder: their plans.
    """

    model: Any
    encoder: EncoderPlan
    decoder: Any  # a DecoderPlan, which makes this

    inputs = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    output = "pred_masks"

    @classmethod
    def of(cls, model: Any, decoder: Any) -> FoldedSegGpt:
        """The whole model.

        Raises:
            ValueError: it is none, or modules around its parts do more than they should.
        """
        if not is_seggpt(model):
            raise ValueError(
                "model: expected a SegGptForImageSegmentation, got a model with one inside, "
                f"{type(model).__name__}"
            )
        check_around(model)
        encoder = model.model.encoder
        if not isinstance(encoder, Accelerated):
            raise ValueError("model: expected one accelerated whole, but model.encoder is not")
        plan: Any = encoder.fastseg_state().plan()
        return cls(model, plan, decoder)

    @property
    def like(self) -> torch.Tensor:
        weight: torch.Tensor = self.projection.weight
        return weight

    @property
    def projection(self) -> nn.Conv2d:
        """Pixels to patches."""
        projection: nn.Conv2d = self.model.model.embeddings.patch_embeddings.projection
        return projection

    @property
    def num_channels(self) -> int:
        return self.projection.in_channels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in the stacked picture."""
        return grid_of(self.model)

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.model.config.image_size
        return height // 2, width

    @property
    def embedding_type(self) -> str:
        """The kind of mask that the model takes where none is named."""
        return getattr(self.model, "default_embedding_type", "instance")

    @property
    def properties(self) -> dict[str, str]:
        return {"embedding_type": self.embedding_type}

    def added(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to the patches (1, H, W, C) of images and of masks, below them zeros."""
        embeddings = copy.deepcopy(self.model.model.embeddings).double()
        both = positions_of(embeddings.position_embeddings, self.grid)
        both = both + type_token(embeddings, self.embedding_type)
        images = both + embeddings.segment_token_input
        masks = both + embeddings.segment_token_prompt
        masks[:, self.grid[0] // 2 :] += embeddings.mask_token
        return images.to(self.like.dtype), masks.to(self.like.dtype)

    def program(self, labels: bool | tuple[int, int], label_dtype: torch.dtype) -> nn.Module:
        return _Program(self)

    def write(
        self,
        graph: OnnxGraph,
        shape: Sequence[Size],
        labels: bool | tuple[int, int],
        label_dtype: torch.dtype,
    ) -> Values:
        return write(graph, self, shape[0])


class _Program(nn.Module):
    """The whole model: copies of its modules, and tables as buffers."""

    def __init__(self, folded: FoldedSegGpt) -> None:
        super().__init__()
        config = folded.model.config
        self.projection = _copy(folded.projection)
        added_to_images, added_to_masks = folded.added()
        self.images = nn.Buffer(added_to_images.cpu())
        self.masks = nn.Buffer(added_to_masks.cpu())
        self.merge_index = config.merge_index
        self.taken = tuple(config.intermediate_hidden_state_indices)
        self.layers = nn.ModuleList(map(_Layer, folded.encoder.layers[: max(self.taken) + 1]))
        self.norm = _copy(folded.model.model.encoder.layernorm)
        self.decoder = _copy(folded.model.decoder)

    def forward(
        self,
        pixel_values: torch.Tensor,
        prompt_pixel_values: torch.Tensor,
        prompt_masks: torch.Tensor,
    ) -> torch.Tensor:
        """Images and prompts (B, 3, H / 2, W) -> painted masks (B, 3, H, W)."""
        # One symbol for all, or tracing is slow.
        torch._check(prompt_masks.shape[0] == pixel_values.shape[0])
        torch._check(prompt_pixel_values.shape[0] == pixel_values.shape[0])
        images = self._patches(torch.cat([prompt_pixel_values, pixel_values], dim=2))
        masks = F.pad(self._patches(prompt_masks), (0, 0, 0, 0, 0, images.shape[1] // 2))
        tokens = torch.cat([images + self.images, masks + self.masks])
        features = []
        for index, layer in enumerate(self.layers):
            tokens = layer(tokens)
            if index == self.merge_index:
                tokens = tokens.unflatten(0, (2, -1)).mean(0)
            if index in self.taken:
                features.append(self.norm(tokens))
        plan: Any = self.decoder.fastseg_state().plan()  # which folds no tensors
        pixels: torch.Tensor = plan.run(torch.cat(features, dim=-1))
        return pixels.contiguous()

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        patches: torch.Tensor = self.projection(pixels).permute(0, 2, 3, 1)
        return patches


class _Layer(nn.Module):
    def __init__(self, plan: LayerPlan) -> None:
        super().__init__()
        layer, folded = plan.layer, plan.attention.folded()
        self.before, self.after = _copy(layer.layernorm_before), _copy(layer.layernorm_after)
        self.qkv, self.proj = _copy(layer.attention.qkv), _copy(layer.attention.proj)
        self.lin1, self.lin2 = _copy(layer.mlp.lin1), _copy(layer.mlp.lin2)
        self.rows, self.columns = (nn.Buffer(folded[n].cpu().clone()) for n in ("rows", "columns"))
        self.heads, self.scale = folded["heads"], folded["scale"]
        self.activation = plan.mlp.folded()["activation"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.before(x.flatten(1, 2)))
        query, key, value = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        context = attend(query, key, value, self.rows, self.columns, self.scale)
        x = x + self.proj(context.flatten(2)).view(x.shape)
        hidden = ACTIVATIONS[self.activation](self.lin1(self.after(x)))
        output: torch.Tensor = x + self.lin2(hidden)
        return output


def _copy(module: nn.Module) -> Any:
    return copy.deepcopy(module).cpu().requires_grad_(False)

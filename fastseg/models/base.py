"""What the models of all families share: loading, saving, folding, gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fastseg.checkpoints.load import load_pretrained, save_pretrained
from fastseg.checkpoints.translation import CheckpointNames
from fastseg.cuda_graphs.default import Graphed
from fastseg.exporting.folded import FoldedModel, fold_accelerated
from fastseg.folding.swap import refold
from fastseg.images.processor import SegformerImageProcessor


class PreTrainedModel(Graphed, nn.Module):
    """Base of all models, with the names of transformers' class.

    Attributes:
        config_class: of `config`; its `model_type` is that of config.json.
        checkpoint_names: names that checkpoints of the family may have.
        base_model_prefix: the name of the encoder in models with a head.
        image_processor_class: of the images that it takes.
        segments: whether its logits are those of pixels.
        takes_bytes: whether its forward takes uint8 pixels with a `pixel_scale` and `pixel_offset`.
        name_or_path: where the weights were loaded from.
        preprocessor_file: the image processor found there.
    """

    config_class: ClassVar[Any]
    checkpoint_names: ClassVar[CheckpointNames]
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "pixel_values"
    image_processor_class: ClassVar[type[Any]] = SegformerImageProcessor
    segments: ClassVar[bool] = False
    takes_bytes: ClassVar[bool] = False
    name_or_path = ""
    preprocessor_file: Path | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            expected, got = self.config_class.__name__, type(config).__name__
            raise TypeError(f"config: expected a {expected}, got {got}")
        self.config = config

    def _init_weights(self, module: nn.Module) -> None:
        """Draw a Linear's or Conv2d's weights from N(0, initializer_range); zero its bias."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """A model of this class from a directory or hub id; see `fastseg.from_pretrained`."""
        return load_pretrained(pretrained_model_name_or_path, model_class=cls, **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Write `config.json` and `model.safetensors`, which transformers loads too."""
        save_pretrained(self, save_directory, **kwargs)

    def folded_model(self) -> FoldedModel:
        """The folded arguments of all ops, as `fastseg.export` writes them.

        Raises:
            ValueError: it has parts that folding would leave out: hooks, replaced layers.
        """
        folded = fold_accelerated(self, self._without_head())
        assert folded is not None
        return folded

    def _without_head(self) -> dict[str, Any]:
        """Fields of `FoldedModel` beside the stages, where there is no decode head."""
        return {}

    def refold(self) -> None:
        """Forget the folded weights; see `fastseg.refold`."""
        refold(self)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of weights, without BatchNorm's statistics."""
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if parameter.requires_grad or not only_trainable
        )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations.

        The arguments are those of `torch.utils.checkpoint.checkpoint`.

        Raises:
            ValueError: the encoder of this model cannot.
        """
        if not hasattr(self._encoder, "gradient_checkpointing"):
            raise ValueError(f"{type(self).__name__}: its encoder has no gradient checkpointing")
        self._encoder.gradient_checkpointing = {
            "use_reentrant": False,
            **(gradient_checkpointing_kwargs or {}),
        }

    def gradient_checkpointing_disable(self) -> None:
        if self.is_gradient_checkpointing:
            self._encoder.gradient_checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        return getattr(self._encoder, "gradient_checkpointing", None) is not None

    @property
    def _encoder(self) -> Any:
        """What gradient checkpointing is of: the encoder, of a head's model too."""
        return getattr(self, self.base_model_prefix, self).encoder

    def _return_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict

"""What the models of all families share: loading, saving, folding, activation checkpointing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, overload

import torch
from torch import nn

from fastseg.checkpoints.layouts import state_dict_for
from fastseg.checkpoints.load import load_pretrained, save_pretrained
from fastseg.checkpoints.push import PushesToHub
from fastseg.checkpoints.report import LoadReport
from fastseg.checkpoints.translation import CheckpointNames
from fastseg.cuda_graphs.default import Graphed
from fastseg.exporting.folded import FoldedModel
from fastseg.exporting.stages import fold_accelerated
from fastseg.folding.swap import refold
from fastseg.images.processor import SegformerImageProcessor

from .checkpointing import Checkpointing
from .config import PreTrainedConfig

Source = str | os.PathLike[str]


class PreTrainedModel(Graphed, PushesToHub, nn.Module):
    """Base of all models, with the names of transformers' class.

    Attributes:
        config_class: of `config`; its `model_type` is that of config.json.
        checkpoint_names: names that checkpoints of the family may have.
        base_model_prefix: the name of the encoder in models with a head.
        image_processor_class: of the images that it takes.
        input_modalities, main_input_name, supports_gradient_checkpointing: as transformers' tools
            look for them.
        segments: whether its logits are those of pixels.
        takes_bytes: whether its forward takes uint8 pixels with a `pixel_scale` and `pixel_offset`.
        name_or_path: where the weights were loaded from.
        preprocessor_file: the image processor found there.
    """

    config_class: ClassVar[Any]
    checkpoint_names: ClassVar[CheckpointNames]
    base_model_prefix: ClassVar[str] = ""
    main_input_name: ClassVar[str] = "pixel_values"
    input_modalities: ClassVar[tuple[str, ...]] = ("image",)
    supports_gradient_checkpointing: ClassVar[bool] = True
    image_processor_class: ClassVar[type[Any]] = SegformerImageProcessor
    segments: ClassVar[bool] = False
    takes_bytes: ClassVar[bool] = False
    name_or_path = ""
    preprocessor_file: Path | None = None

    config: Any  # of `config_class`; a family's base class says which that is
    load_report: LoadReport

    def __init__(self, config: PreTrainedConfig) -> None:
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

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Source | None,
        *,
        output_loading_info: Literal[False] = ...,
        **kwargs: object,
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Source | None,
        *,
        output_loading_info: Literal[True],
        **kwargs: object,
    ) -> tuple[Self, dict[str, list[object]]]: ...

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Source | None, **kwargs: object
    ) -> Self | tuple[Self, dict[str, list[object]]]:
        """A model of this class from a directory, a file or a hub id.

        Arguments and errors are those of `fastseg.from_pretrained`. Weights in half precision
        become float32 on a CPU and stay as stored elsewhere; `dtype=` says otherwise.
        """
        given: dict[str, Any] = kwargs
        loaded: Self | tuple[Self, dict[str, list[object]]] = load_pretrained(
            pretrained_model_name_or_path, model_class=cls, **given
        )
        return loaded

    def save_pretrained(self, save_directory: Source, **kwargs: object) -> None:
        """Write `config.json` and `model.safetensors`, which transformers loads too."""
        given: dict[str, Any] = kwargs
        save_pretrained(self, save_directory, **given)

    def state_dict_for(self, library: str) -> dict[str, torch.Tensor]:
        """The weights by the names of another library, for `load_state_dict` of its own model.

        Where it computes with another epsilon or another form of GELU, a CheckpointWarning says so.

        Args:
            library: "nvlabs", "mmseg" or "smp" (segmentation_models_pytorch).

        Raises:
            ValueError: there is no such library, or it has no such network.
        """
        return state_dict_for(self, library)

    @classmethod
    def can_generate(cls) -> bool:
        """Return False: it gives no text. transformers' pipelines ask."""
        return False

    def folded_model(self) -> FoldedModel:
        """What `fastseg.export` writes: the folded arguments of all ops.

        Raises:
            ValueError: it has parts that folding would leave out: hooks, replaced layers.
        """
        folded = fold_accelerated(self, self._without_head())
        assert folded is not None
        return folded

    def _without_head(self) -> dict[str, Any]:
        """Fields of `FoldedStages` beside the stages, where there is no decode head."""
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

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights, without BatchNorm's statistics.

        `exclude_embeddings` is of tables of words, which these models do not have.
        """
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if parameter.requires_grad or not only_trainable
        )

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, object] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers in the backward pass instead of keeping their activations.

        Args:
            activation_checkpointing_kwargs: those of `torch.utils.checkpoint.checkpoint`.
            every_n_layers: recompute each n-th layer only.
            offload: keep what is needed for that in the host's memory.

        Raises:
            ValueError: the encoder of this model cannot, or `every_n_layers` is less than 1.
        """
        if not hasattr(self._encoder, "gradient_checkpointing"):
            raise ValueError(f"{type(self).__name__}: its encoder has no activation checkpointing")
        arguments = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self._encoder.gradient_checkpointing = Checkpointing(arguments, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        if self.is_activation_checkpointing:
            self._encoder.gradient_checkpointing = None

    @property
    def is_activation_checkpointing(self) -> bool:
        return getattr(self._encoder, "gradient_checkpointing", None) is not None

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, object] | None = None, **kwargs: object
    ) -> None:
        """Call `activation_checkpointing_enable`: its name in transformers so far."""
        given: dict[str, Any] = kwargs
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **given)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing

    @property
    def _encoder(self) -> Any:
        """What activation checkpointing is of: the encoder, of a head's model too."""
        return getattr(self, self.base_model_prefix, self).encoder

    def _return_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict

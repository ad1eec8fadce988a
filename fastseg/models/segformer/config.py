"""The configuration of a SegFormer: every field of transformers' class, with the same names.

It reads and writes the same `config.json` as transformers 4.x and 5.x. Keys that fastseg has no use
for are kept as attributes and written back.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence

from fastseg.checkpoints.values import (
    ClassNames,
    class_names,
    flag,
    names_of,
    number,
    per_stage,
    whole,
)
from fastseg.kernels.blocks.activations import ACTIVATIONS

from ..config import PreTrainedConfig

_PER_STAGE = (
    "depths",
    "sr_ratios",
    "hidden_sizes",
    "patch_sizes",
    "strides",
    "num_attention_heads",
    "mlp_ratios",
)
_PROBABILITIES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout_prob",
    "drop_path_rate",
)
_NORM_EPSILONS = (
    *("patch_norm_eps", "block_norm_eps", "reduction_norm_eps", "stage_norm_eps"),
    "batch_norm_eps",
)
_PROBLEM_TYPES = (
    None,
    "regression",
    "single_label_classification",
    "multi_label_classification",
)


class SegformerConfig(PreTrainedConfig):
    """Sizes and options of a SegFormer; the defaults are those of MiT-B0 with a 256-wide decoder.

    Per-stage fields are sequences of `num_encoder_blocks` integers.

    Args:
        num_channels: channels of the input image.
        num_encoder_blocks: number of encoder stages.
        depths: Transformer layers in each stage.
        sr_ratios: stride of the spatial reduction of keys and values in each stage; 1 for none.
        hidden_sizes: width of each stage.
        patch_sizes: kernel size of each stage's overlapping patch embedding.
        strides: stride of each stage's patch embedding.
        num_attention_heads: heads in each stage; must divide the width.
        mlp_ratios: hidden width of the Mix-FFN as a multiple of the stage's width.
        hidden_act: a name in `fastseg.kernels.blocks.activations.ACTIVATIONS`: "gelu", "gelu_new",
            "relu", "selu" and others of transformers' names.
        hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout_prob: dropout rates.
        initializer_range: standard deviation of the normal initialisation of weights.
        drop_path_rate: largest stochastic-depth rate; layers rise to it linearly from 0.
        layer_norm_eps: kept for the sake of `config.json`; as in transformers nothing uses it.
        decoder_hidden_size: width of the decode head.
        semantic_loss_ignore_index: label that the segmentation loss leaves out.
        reshape_last_stage: whether the last stage gives (B, C, H, W) rather than (B, N, C).
        num_labels: number of classes; 2 where neither it nor `id2label` is given.
        id2label: class names by number, or in a list; string keys are turned into integers.
        label2id: the inverse; derived from `id2label` where it is absent or does not fit.
        patch_norm_eps, block_norm_eps, reduction_norm_eps, stage_norm_eps: added to the variance in
            the LayerNorms of patch embeddings, before attention and Mix-FFN, after the spatial
            reduction, and at the end of a stage. Not in transformers, which has 1e-5 everywhere
            and ignores them; models from elsewhere have other values.
        batch_norm_eps: the same in the decode head's BatchNorm.
        same_padding, mixes_channels, upsamples_probabilities: of KerasCV's network, which is not in
            transformers: patch embeddings pad unevenly, as Keras' padding "same" does; a spatial
            reduction reads the memory of tokens as if channels came first; the softmax comes before
            the upsampling to the image's size. With one of the first two, images are squares whose
            sides are multiples of `side_multiple`.
        problem_type: None, "regression", "single_label_classification" or
            "multi_label_classification": the loss of the image classifier.
        output_attentions, output_hidden_states, return_dict: defaults of `forward`'s arguments.
        **kwargs: `palette`, an RGB triple for each class, and what transformers writes into
            config.json besides these; kept as attributes.

    Numbers may be NumPy's, or floats and texts of the same value, as in files edited by hand.

    Raises:
        TypeError: a keyword is neither.
        ValueError: a field is of another kind or out of range, or fields contradict each other.
    """

    model_type = "segformer"
    other_model_types = ("segformer_keras_cv",)

    def __init__(
        self,
        num_channels: int = 3,
        num_encoder_blocks: int = 4,
        depths: Sequence[int] = (2, 2, 2, 2),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        hidden_sizes: Sequence[int] = (32, 64, 160, 256),
        patch_sizes: Sequence[int] = (7, 3, 3, 3),
        strides: Sequence[int] = (4, 2, 2, 2),
        num_attention_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[int] = (4, 4, 4, 4),
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        classifier_dropout_prob: float = 0.1,
        initializer_range: float = 0.02,
        drop_path_rate: float = 0.1,
        layer_norm_eps: float = 1e-6,
        decoder_hidden_size: int = 256,
        semantic_loss_ignore_index: int = 255,
        reshape_last_stage: bool = True,
        *,
        num_labels: int | None = None,
        id2label: ClassNames | None = None,
        label2id: Mapping[str, int] | None = None,
        patch_norm_eps: float = 1e-5,
        block_norm_eps: float = 1e-5,
        reduction_norm_eps: float = 1e-5,
        stage_norm_eps: float = 1e-5,
        batch_norm_eps: float = 1e-5,
        same_padding: bool = False,
        mixes_channels: bool = False,
        upsamples_probabilities: bool = False,
        problem_type: str | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **kwargs: object,
    ) -> None:
        self.num_channels = whole("num_channels", num_channels)
        self.num_encoder_blocks = whole("num_encoder_blocks", num_encoder_blocks)
        self.depths = per_stage("depths", depths)
        self.sr_ratios = per_stage("sr_ratios", sr_ratios)
        self.hidden_sizes = per_stage("hidden_sizes", hidden_sizes)
        self.patch_sizes = per_stage("patch_sizes", patch_sizes)
        self.strides = per_stage("strides", strides)
        self.num_attention_heads = per_stage("num_attention_heads", num_attention_heads)
        self.mlp_ratios = per_stage("mlp_ratios", mlp_ratios, number)
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = number("hidden_dropout_prob", hidden_dropout_prob)
        self.attention_probs_dropout_prob = number(
            "attention_probs_dropout_prob", attention_probs_dropout_prob
        )
        self.classifier_dropout_prob = number("classifier_dropout_prob", classifier_dropout_prob)
        self.initializer_range = number("initializer_range", initializer_range)
        self.drop_path_rate = number("drop_path_rate", drop_path_rate)
        self.layer_norm_eps = number("layer_norm_eps", layer_norm_eps)
        self.decoder_hidden_size = whole("decoder_hidden_size", decoder_hidden_size)
        self.semantic_loss_ignore_index = whole(
            "semantic_loss_ignore_index", semantic_loss_ignore_index
        )
        self.reshape_last_stage = flag("reshape_last_stage", reshape_last_stage)
        self.patch_norm_eps = number("patch_norm_eps", patch_norm_eps)
        self.block_norm_eps = number("block_norm_eps", block_norm_eps)
        self.reduction_norm_eps = number("reduction_norm_eps", reduction_norm_eps)
        self.stage_norm_eps = number("stage_norm_eps", stage_norm_eps)
        self.batch_norm_eps = number("batch_norm_eps", batch_norm_eps)
        self.same_padding = flag("same_padding", same_padding)
        self.mixes_channels = flag("mixes_channels", mixes_channels)
        self.upsamples_probabilities = flag("upsamples_probabilities", upsamples_probabilities)
        self.problem_type = problem_type
        self.output_attentions = flag("output_attentions", output_attentions)
        self.output_hidden_states = flag("output_hidden_states", output_hidden_states)
        self.return_dict = flag("return_dict", return_dict)
        if id2label is None:
            self.num_labels = 2 if num_labels is None else num_labels
        else:
            self.id2label = class_names(id2label)
            if num_labels is not None and whole("num_labels", num_labels) != len(self.id2label):
                raise ValueError(
                    "num_labels and id2label: expected the same number of classes, got "
                    f"{num_labels} and {len(self.id2label)}"
                )
            self.label2id = {name: label for label, name in self.id2label.items()}
            if not isinstance(label2id, Mapping | None):
                raise ValueError(f"label2id: expected numbers by name, got {label2id!r}")
            if label2id is not None and {*label2id.values()} == {*self.id2label}:
                self.label2id = dict(label2id)
        blocks = kwargs.get("num_hidden_layers")
        if blocks is not None and blocks != self.num_encoder_blocks:
            raise ValueError(
                "num_hidden_layers: expected num_encoder_blocks, of which it is another name, "
                f"{self.num_encoder_blocks}; got {blocks}"
            )
        self._keep(kwargs)
        self._validate()

    @property
    def num_labels(self) -> int:
        """Number of classes. Setting another number renames all classes to LABEL_0, LABEL_1, ..."""
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        count = whole("num_labels", num_labels)
        if count < 1:
            raise ValueError(f"num_labels: expected an integer of at least 1, got {num_labels!r}")
        if len(getattr(self, "id2label", ())) != count:
            self.id2label = names_of(count, {})
            self.label2id = {name: label for label, name in self.id2label.items()}

    @property
    def num_hidden_layers(self) -> int:
        """transformers' alias of `num_encoder_blocks`."""
        return self.num_encoder_blocks

    @property
    def is_keras_cv(self) -> bool:
        """Whether it is KerasCV's network, or a part of it: one that transformers does not have."""
        return self.same_padding or self.mixes_channels or self.upsamples_probabilities

    @property
    def side_multiple(self) -> int:
        """What the sides of images are multiples of, which then are squares; 0 for any images."""
        if not (self.same_padding or self.mixes_channels):
            return 0
        scales = itertools.accumulate(self.strides, operator.mul)
        return math.lcm(*map(operator.mul, scales, self.sr_ratios))

    def to_dict(self) -> dict[str, object]:
        """All fields, as written into `config.json`, with a `model_type` that transformers refuses
        where it does not have the network.
        """
        fields = super().to_dict()
        return {**fields, "model_type": self.other_model_types[0]} if self.is_keras_cv else fields

    def _validate(self) -> None:
        for name in ("num_channels", "num_encoder_blocks", "decoder_hidden_size"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        for name in _PER_STAGE:
            values = getattr(self, name)
            if len(values) != self.num_encoder_blocks:
                raise ValueError(
                    f"{name}: expected one value for each of the {self.num_encoder_blocks} encoder "
                    f"blocks, got {values}"
                )
            lowest = 0 if name == "depths" else 1
            if any(value < lowest for value in values):
                raise ValueError(f"{name}: expected values of at least {lowest}, got {values}")
        for width, heads in zip(self.hidden_sizes, self.num_attention_heads, strict=True):
            if width % heads:
                raise ValueError(
                    "num_attention_heads: expected a divisor of the stage's width, got "
                    f"{heads} heads for a width of {width}"
                )
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}: expected a probability from 0 to 1, got {getattr(self, name)}"
                )
        for name in _NORM_EPSILONS:
            epsilon = getattr(self, name)
            if not 0 < epsilon < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {epsilon!r}")
        sizes = list(zip(self.patch_sizes, self.strides, strict=True))
        if self.same_padding and any(size % 2 == 0 or size < stride for size, stride in sizes):
            raise ValueError(
                "same_padding: expected odd patch_sizes that are no smaller than the strides, got "
                f"{self.patch_sizes} and {self.strides}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act: expected one of {', '.join(sorted(ACTIVATIONS))}, "
                f"got {self.hidden_act!r}"
            )

        if self.problem_type not in _PROBLEM_TYPES:
            raise ValueError(
                f"problem_type: expected one of {_PROBLEM_TYPES}, got {self.problem_type!r}"
            )

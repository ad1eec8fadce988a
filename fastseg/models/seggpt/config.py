"""The configuration of a SegGPT: every field of transformers' class, with the same names.

It reads and writes the same `config.json` as transformers 4.x and 5.x.
"""

from __future__ import annotations

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

_AT_LEAST_ONE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "num_channels"),
    *("mlp_dim", "pretrain_image_size", "decoder_hidden_size"),
)


class SegGptConfig(PreTrainedConfig):
    """Sizes and options of a SegGPT; the defaults are those of the published model, ViT-L.

    Args:
        hidden_size: channels of a token.
        num_hidden_layers: layers of the encoder.
        num_attention_heads: heads; must divide `hidden_size`.
        hidden_act: a name in `fastseg.kernels.blocks.activations.ACTIVATIONS`.
        hidden_dropout_prob: kept for the sake of `config.json`; as in transformers nothing uses it.
        initializer_range: standard deviation of the initialisation of weights.
        layer_norm_eps: added to the variance in all LayerNorms.
        image_size: (height, width) of the stacked picture, the prompt above the image; one number
            is both. An even number of rows of patches, and whole patches.
        patch_size: side of a patch.
        num_channels: of images and masks.
        qkv_bias: whether queries, keys and values have biases.
        mlp_dim: channels between the linear layers; 4 times `hidden_size` where None.
        drop_path_rate: largest rate of stochastic depth; layers rise to it linearly from 0.
        pretrain_image_size: side of the images whose grid the position embeddings have.
        decoder_hidden_size: channels of the decoder's pixels.
        use_relative_position_embeddings: True; there is no model without, in transformers neither.
        merge_index: the layer behind which the image's and the mask's stream become one.
        intermediate_hidden_state_indices: layers whose outputs the decoder takes; none is before
            `merge_index`.
        beta: of the smooth L1 loss.
        num_labels, id2label, label2id: as in any config.json; a SegGPT has no classes of its own.
        output_attentions, output_hidden_states, return_dict: defaults of `forward`'s arguments.
        **kwargs: what transformers writes into config.json besides these; kept as attributes.

    Raises:
        TypeError: a keyword is neither.
        ValueError: a field is of another kind or out of range, or fields contradict each other.
    """

    model_type = "seggpt"

    def __init__(
        self,
        hidden_size: int = 1024,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-6,
        image_size: int | Sequence[int] = (896, 448),
        patch_size: int = 16,
        num_channels: int = 3,
        qkv_bias: bool = True,
        mlp_dim: int | None = None,
        drop_path_rate: float = 0.1,
        pretrain_image_size: int = 224,
        decoder_hidden_size: int = 64,
        use_relative_position_embeddings: bool = True,
        merge_index: int = 2,
        intermediate_hidden_state_indices: Sequence[int] = (5, 11, 17, 23),
        beta: float = 0.01,
        *,
        num_labels: int | None = None,
        id2label: ClassNames | None = None,
        label2id: Mapping[str, int] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **kwargs: object,
    ) -> None:
        self.hidden_size = whole("hidden_size", hidden_size)
        self.num_hidden_layers = whole("num_hidden_layers", num_hidden_layers)
        self.num_attention_heads = whole("num_attention_heads", num_attention_heads)
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = number("hidden_dropout_prob", hidden_dropout_prob)
        self.initializer_range = number("initializer_range", initializer_range)
        self.layer_norm_eps = number("layer_norm_eps", layer_norm_eps)
        if isinstance(image_size, Sequence) and not isinstance(image_size, str):
            self.image_size = [whole("image_size", side) for side in image_size]
        else:
            self.image_size = [whole("image_size", image_size)] * 2
        self.patch_size = whole("patch_size", patch_size)
        self.num_channels = whole("num_channels", num_channels)
        self.qkv_bias = flag("qkv_bias", qkv_bias)
        self.mlp_dim = 4 * self.hidden_size if mlp_dim is None else whole("mlp_dim", mlp_dim)
        self.drop_path_rate = number("drop_path_rate", drop_path_rate)
        self.pretrain_image_size = whole("pretrain_image_size", pretrain_image_size)
        self.decoder_hidden_size = whole("decoder_hidden_size", decoder_hidden_size)
        self.use_relative_position_embeddings = flag(
            "use_relative_position_embeddings", use_relative_position_embeddings
        )
        self.merge_index = whole("merge_index", merge_index)
        self.intermediate_hidden_state_indices = per_stage(
            "intermediate_hidden_state_indices", intermediate_hidden_state_indices
        )
        self.beta = number("beta", beta)
        self.output_attentions = flag("output_attentions", output_attentions)
        self.output_hidden_states = flag("output_hidden_states", output_hidden_states)
        self.return_dict = flag("return_dict", return_dict)
        count = 2 if num_labels is None else whole("num_labels", num_labels)
        self.id2label = names_of(count, {}) if id2label is None else class_names(id2label)
        if num_labels is not None and count != len(self.id2label):
            raise ValueError(
                "num_labels and id2label: expected the same number of classes, got "
                f"{num_labels} and {len(self.id2label)}"
            )
        self.label2id = {name: label for label, name in self.id2label.items()}
        if label2id is not None and {*label2id.values()} == {*self.id2label}:
            self.label2id = dict(label2id)
        self._keep(kwargs)
        self._validate()

    @property
    def num_labels(self) -> int:
        """Number of names in `id2label`."""
        return len(self.id2label)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in the stacked picture."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    def _validate(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size, {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        if not self.use_relative_position_embeddings:
            raise ValueError("use_relative_position_embeddings: expected true, got false")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act: expected one of {', '.join(sorted(ACTIVATIONS))}, "
                f"got {self.hidden_act!r}"
            )
        if not 0 <= self.drop_path_rate <= 1:
            raise ValueError(
                f"drop_path_rate: expected a number from 0 to 1, got {self.drop_path_rate}"
            )
        patch = self.patch_size
        if (
            len(self.image_size) != 2
            or min(self.image_size) < 1
            or self.image_size[0] % (2 * patch)
            or self.image_size[1] % patch
        ):
            raise ValueError(
                f"image_size: expected (height, width) of two pictures one above the other, a "
                f"multiple of {2 * patch} and one of {patch}; got {self.image_size}"
            )
        if self.pretrain_image_size < patch:
            raise ValueError(
                f"pretrain_image_size: expected at least a patch, {patch}, "
                f"got {self.pretrain_image_size}"
            )
        taken = self.intermediate_hidden_state_indices
        if not taken or min(taken) < 0 or max(taken) >= self.num_hidden_layers:
            raise ValueError(
                "intermediate_hidden_state_indices: expected numbers of the "
                f"{self.num_hidden_layers} layers, from 0, got {taken}"
            )
        if not 0 <= self.merge_index <= min(taken):
            raise ValueError(
                "merge_index: expected none above the smallest of "
                f"intermediate_hidden_state_indices, {min(taken)}, got {self.merge_index}"
            )

"""Outputs of the models: fields by name, by index and as a tuple, as in transformers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch.utils import _pytree as pytree

# The fields of an output that are not None.
FieldTuple = tuple[torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor], ...]


class ModelOutput(OrderedDict[str, Any]):
    """A dict of the fields that are not None, in order, which are attributes and indices too.

    `output.loss`, `output["loss"]`, `output[0]`, `"loss" in output`; a known field that is None is
    None as an attribute and absent otherwise. Iteration gives names, as in transformers.

    Subclasses are pytrees whose children are named by their fields: `torch.export` and `tree_map`
    look into them.
    """

    fields: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda values, names: cls(zip(names, values, strict=True)),
            # In saved programs: it stays, wherever this file goes.
            serialized_type_name=f"fastseg.outputs.{cls.__name__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )

    def __init__(self, *pairs: Any, **fields: Any) -> None:
        super().__init__()
        for name, value in dict(*pairs, **fields).items():
            if name not in self.fields:
                raise TypeError(f"{name}: expected one of {', '.join(self.fields)}")
            if value is not None:
                self[name] = value

    def __getattr__(self, name: str) -> Any:
        if name in type(self).fields:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> FieldTuple:
        """The values of the fields that are not None."""
        return tuple(self.values())


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _flatten_with_keys(
    output: ModelOutput,
) -> tuple[list[tuple[pytree.KeyEntry, Any]], list[str]]:
    return [(pytree.MappingKey(name), value) for name, value in output.items()], list(output)


class BaseModelOutput(ModelOutput):
    """Output of SegformerModel.

    last_hidden_state: (B, C, H/32, W/32), or (B, N, C) with `reshape_last_stage=False`.
    hidden_states: one map (B, C_i, H_i, W_i) for each stage.
    attentions: one (B, heads, N, N_kv) for each layer.
    """

    fields = ("last_hidden_state", "hidden_states", "attentions")
    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None


class SemanticSegmenterOutput(ModelOutput):
    """Output of SegformerForSemanticSegmentation. logits: (B, num_labels, H/4, W/4).

    probabilities: their softmax, in float32 at least, where the network upsamples that and not
        the logits.
    """

    fields = ("loss", "logits", "hidden_states", "attentions", "probabilities")
    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    probabilities: torch.Tensor | None


class ImageClassifierOutput(ModelOutput):
    """Output of SegformerForImageClassification. logits: (B, num_labels)."""

    fields = ("loss", "logits", "hidden_states", "attentions")
    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None

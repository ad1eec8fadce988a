"""SegFormers as NVlabs, mmseg and segmentation_models_pytorch store them: tables read backwards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastseg.checkpoints.layouts import Layout
from fastseg.checkpoints.translation import Table, original_name

from . import pytorch
from .tree import BASE, ENCODER

_PART = re.compile(re.escape(ENCODER) + r"(patch_embeddings|block|layer_norm)\.(\d+)\.(.+)")
_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
_STAGES = {"patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2]}

# smp builds its encoders by these names alone: depths and widths of each.
_SMP_WIDTHS = [64, 128, 320, 512]
_SMP_ENCODERS = {
    "mit_b0": ([2, 2, 2, 2], [32, 64, 160, 256]),
    "mit_b1": ([2, 2, 2, 2], _SMP_WIDTHS),
    "mit_b2": ([3, 4, 6, 3], _SMP_WIDTHS),
    "mit_b3": ([3, 4, 18, 3], _SMP_WIDTHS),
    "mit_b4": ([3, 8, 27, 3], _SMP_WIDTHS),
    "mit_b5": ([3, 6, 40, 3], _SMP_WIDTHS),
}
_SMP_FIELDS = {
    **_STAGES,
    "num_attention_heads": [1, 2, 5, 8],
    "sr_ratios": [8, 4, 2, 1],
    "mlp_ratios": [4, 4, 4, 4],
}


@dataclass(frozen=True)
class _Encoder:
    """Names of an encoder's parts, with {stage}, {number} from 1 and {block}, and in its parts."""

    embedding: str
    block: str
    norm: str
    in_embedding: Table
    in_block: Table

    def original(self, name: str) -> tuple[str, int] | None:
        """The name in a file of fastseg's `name`, and the place among the parts of that tensor."""
        if (match := _PART.fullmatch(name)) is None:
            return None
        part, stage, rest = match.groups()
        numbers = {"stage": stage, "number": int(stage) + 1}
        if part == "layer_norm":
            return self.norm.format(**numbers) + rest, 0
        if part == "patch_embeddings":
            prefix, found = self.embedding, original_name(self.in_embedding, rest)
        else:
            numbers["block"], _, rest = rest.partition(".")
            prefix, found = self.block, original_name(self.in_block, rest)
        return None if found is None else (prefix.format(**numbers) + found[0], found[1])


_NVLABS = _Encoder(
    "patch_embed{number}.",
    "block{number}.{block}.",
    "norm{number}.",
    pytorch.NVLABS_EMBEDDING,
    pytorch.NVLABS_BLOCK,
)
_MMSEG = _Encoder(
    "layers.{stage}.0.",
    "layers.{stage}.1.{block}.",
    "layers.{stage}.2.",
    pytorch.MMSEG_EMBEDDING,
    pytorch.MMSEG_BLOCK,
)
_SMP_HEAD: Table = {
    **{
        f"decoder.mlp_stage.{3 - stage}.linear.": [f"decode_head.linear_c.{stage}.proj."]
        for stage in range(4)
    },
    **pytorch.SMP_HEAD,
}


def _renamed(
    tensors: Mapping[str, torch.Tensor], encoder: _Encoder, prefix: str, head: Table
) -> dict[str, torch.Tensor]:
    """Tensors by the names of a library, those of the encoder behind `prefix`.

    Raises:
        ValueError: a tensor is none of a SegFormer's.
    """
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        # A SegformerModel alone has the encoder without a prefix.
        full = BASE + name if name.startswith("encoder.") else name
        if (found := encoder.original(full)) is not None:
            found = prefix + found[0], found[1]
        else:
            found = original_name(head, name)
        if found is None:
            raise ValueError(f"{name}: expected a tensor of a SegFormer")
        parts.setdefault(found[0], {})[found[1]] = tensor
    return {
        name: next(iter(pieces.values()))
        if len(pieces) == 1
        else torch.cat([pieces[place] for place in sorted(pieces)])
        for name, pieces in parts.items()
    }


def _nvlabs_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    classifier = tensors.get("decode_head.classifier.weight")
    if classifier is None:
        return _renamed(tensors, _NVLABS, "", {"head.": ["classifier."]})
    # The authors' network has this layer and never calls it; without it the file would not fit.
    unused = {"weight": torch.zeros_like(classifier), "bias": classifier.new_zeros(len(classifier))}
    return {
        **_renamed(tensors, _NVLABS, "backbone.", pytorch.NVLABS_HEAD),
        **{f"decode_head.conv_seg.{name}": tensor for name, tensor in unused.items()},
    }


def _nvlabs_content(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As mmcv 0.x stores a whole model, with what the authors' tools ask for; else the tensors."""
    if not hasattr(model, "decode_head"):
        return tensors
    names = tuple(name for _, name in sorted(model.config.id2label.items()))
    palette = getattr(model.config, "palette", None)
    return {"meta": {"CLASSES": names, "PALETTE": palette}, "state_dict": tensors}


def _mmseg_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def original(name: str, tensor: torch.Tensor) -> torch.Tensor:
        is_linear = ".ffn.layers." in name and tensor.ndim == 2
        return tensor[:, :, None, None] if is_linear else tensor  # 1x1 convolutions

    renamed = _renamed(tensors, _MMSEG, "", {})
    return {name: original(name, tensor) for name, tensor in renamed.items()}


def _smp_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "encoder." if "decode_head.classifier.weight" in tensors else ""
    return _renamed(tensors, _NVLABS, prefix, _SMP_HEAD)


def _smp_config(model: Any) -> dict[str, Any] | None:
    """Arguments of smp's class, as its `save_pretrained` writes them; None for an encoder."""
    if not hasattr(model, "decode_head"):
        return None
    config = model.config
    return {
        "_model_class": "Segformer",
        "encoder_name": _smp_encoder(config),
        "encoder_depth": 5,
        "encoder_weights": None,
        "decoder_segmentation_channels": config.decoder_hidden_size,
        "in_channels": config.num_channels,
        "classes": config.num_labels,
        "activation": None,
        "upsampling": 4,
        "aux_params": None,
    }


def _smp_encoder(config: Any) -> str | None:
    sizes = (config.depths, config.hidden_sizes)
    return next((name for name, known in _SMP_ENCODERS.items() if known == sizes), None)


def _unlike(config: Any, fields: Mapping[str, Any]) -> str | None:
    """What of a configuration is not as a library builds it."""
    if config.is_keras_cv:
        return "it is KerasCV's network, which pads otherwise and mixes tokens with channels"
    if config.hidden_act not in _GELUS:
        return f"expected hidden_act='gelu', got {config.hidden_act!r}"
    for name, value in fields.items():
        if getattr(config, name) != value:
            return f"expected {name}={value}, got {getattr(config, name)}"
    return None


def _nvlabs_refusal(model: Any) -> str | None:
    return _unlike(model.config, _STAGES)


_ENCODER_ALONE = "convert its encoder alone, `model.segformer` or `fastseg convert --encoder`"


def _mmseg_refusal(model: Any) -> str | None:
    if hasattr(model, "decode_head"):
        return f"{pytorch.MMSEG_HEAD_IS}; {_ENCODER_ALONE}"
    if hasattr(model, "classifier"):
        return f"it has the encoder without a classifier of images; {_ENCODER_ALONE}"
    config = model.config
    if len(set(config.mlp_ratios)) > 1:
        return f"expected one mlp_ratio for all stages, got mlp_ratios={config.mlp_ratios}"
    units = {
        width / heads
        for width, heads in zip(config.hidden_sizes, config.num_attention_heads, strict=True)
    }
    if len(units) > 1:
        return (
            "expected as many channels for each attention head in all stages, got "
            f"hidden_sizes={config.hidden_sizes} and num_attention_heads="
            f"{config.num_attention_heads}"
        )
    return _unlike(config, {})


def _smp_refusal(model: Any) -> str | None:
    if hasattr(model, "classifier"):
        return f"it has the encoder without a classifier of images; {_ENCODER_ALONE}"
    if _smp_encoder(model.config) is None:
        return (
            f"expected depths and hidden_sizes of {', '.join(_SMP_ENCODERS)}, got "
            f"{model.config.depths} and {model.config.hidden_sizes}"
        )
    return _unlike(model.config, _SMP_FIELDS)


_NVLABS_COMPUTES = {
    "hidden_act": "gelu",
    "patch_norm_eps": 1e-5,
    "reduction_norm_eps": 1e-5,
    "batch_norm_eps": 1e-5,
    **pytorch.NVLABS_FIELDS,
}
LAYOUTS = {
    "nvlabs": Layout(
        title="NVlabs",
        fields=_NVLABS_COMPUTES,
        refusal=_nvlabs_refusal,
        tensors=_nvlabs_tensors,
        content=_nvlabs_content,
        keeps_names=True,
    ),
    "mmseg": Layout(
        title="mmseg",
        fields={"hidden_act": "gelu", **pytorch.MMSEG_FIELDS},
        refusal=_mmseg_refusal,
        tensors=_mmseg_tensors,
    ),
    "smp": Layout(
        title="segmentation_models_pytorch",
        fields=_NVLABS_COMPUTES,
        refusal=_smp_refusal,
        tensors=_smp_tensors,
        config=_smp_config,
    ),
}

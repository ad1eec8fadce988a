"""The models that `fastseg.accelerate` is tested on: a table of hosts and their builders.

FASTSEG_TEST_HOSTS names the families that this process tests, separated by commas; a family that
cannot be imported is an error, never a test left out. Two of them need a process of their own,
with a folder first on PYTHONPATH: `make test` runs all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fastseg

from . import mmseg, nvlabs, nvlabs_copies

DEFAULT_FAMILIES = "transformers5,nvlabs,mmseg,fastseg"
FAMILIES = tuple(os.environ.get("FASTSEG_TEST_HOSTS", DEFAULT_FAMILIES).split(","))

HEADS = (1, 2, 5, 8)  # of the four stages; widths are these times a unit, 32 or 64 in real models
# Classes of layers.
BLOCKS = ("SegformerLayer", "Block", "TransformerEncoderLayer", "GLPNLayer", "PvtV2BlockLayer")
OPS = ("patch_embed", "sr_attention", "mix_ffn", "decode_head")


@dataclass(frozen=True)
class Host:
    """A kind of model, and the names in it that tests reach for ("" where it has none)."""

    name: str
    make: Callable[..., nn.Module]
    encoder: str  # the encoder inside the model
    stage: str  # a module whose output is a feature map, or the encoder
    query: str  # a linear layer of an attention; of queries, keys and values in mmseg
    value: str
    ffn: str  # the first layer of a Mix-FFN
    fuse: str = ""
    classifier: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of every forward
    multiple: int = 1  # sides of images have to be multiples of it
    layers: int = 5

    def build(self, **config: Any) -> nn.Module:
        """A new model in eval mode with random weights; `config` are arguments of `make`."""
        model = self.make(**config).eval()
        randomize(model)
        return model

    def call(self, model: Callable[..., Any], pixels: torch.Tensor) -> list[torch.Tensor]:
        """All tensors that a forward answers with."""
        return tree_leaves(model(pixels, **self.arguments))

    def sizes(self) -> list[tuple[int, int]]:
        """Square, odd and wide."""
        return [(64, 64), (64, 160)] if self.multiple > 1 else [(64, 64), (75, 69), (40, 133)]

    def calls(self) -> dict[str, int]:
        """How often each op runs in one fast forward."""
        encoder = {"patch_embed": 4, "sr_attention": self.layers, "mix_ffn": self.layers}
        return {**encoder, "decode_head": 1} if self.classifier else encoder


def randomize(model: nn.Module) -> None:
    """Draw weights that keep activations of order one, with every bias and statistic in play."""
    with torch.no_grad():
        for module in model.modules():
            is_norm = isinstance(module, nn.LayerNorm | nn.BatchNorm2d | nn.SyncBatchNorm)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.normal_(mean=float(is_norm and name == "weight"), std=0.3)
            for name, buffer in module.named_buffers(recurse=False):
                if name == "running_mean":
                    buffer.normal_()
                elif name == "running_var":
                    buffer.uniform_(0.5, 1.5)


def segformer_config(
    unit: int = 8, depths: tuple[int, ...] = (2, 1, 1, 1), **config: Any
) -> dict[str, Any]:
    """Arguments of SegformerConfig, transformers' and fastseg's."""
    return {
        "depths": list(depths),
        "hidden_sizes": [unit * heads for heads in HEADS],
        "num_attention_heads": list(HEADS),
        "decoder_hidden_size": 24,
        "num_labels": 5,
        **config,
    }


def _transformers(class_name: str) -> Callable[..., nn.Module]:
    def make(**config: Any) -> nn.Module:
        import transformers

        known = transformers.SegformerConfig(**segformer_config(**config))
        return getattr(transformers, class_name)(known)

    return make


def _fastseg(class_name: str) -> Callable[..., nn.Module]:
    def make(**config: Any) -> nn.Module:
        return getattr(fastseg, class_name)(fastseg.SegformerConfig(**segformer_config(**config)))

    return make


def _transformers_hosts(tree: Mapping[str, str], major: int) -> list[Host]:
    import transformers

    if int(transformers.__version__.split(".")[0]) != major:
        raise ImportError(
            f"FASTSEG_TEST_HOSTS: transformers{major} is asked for, got {transformers.__version__}"
        )
    hidden_states = {"output_hidden_states": True}
    inner = {role: f"segformer.{name}" for role, name in tree.items()}
    return [
        Host(
            "transformers",
            _transformers("SegformerForSemanticSegmentation"),
            encoder="segformer",
            **inner,
            fuse="decode_head.linear_fuse",
            classifier="decode_head.classifier",
            arguments=hidden_states,
        ),
        Host("transformers-base", _transformers("SegformerModel"), encoder="", **tree),
        Host(
            "transformers-image-classification",
            _transformers("SegformerForImageClassification"),
            encoder="segformer",
            **inner,
            arguments=hidden_states,
        ),
        Host(
            "transformers-glpn",
            _relative("GLPN", "GLPNModel"),
            encoder="encoder",
            **_TREE4,
            arguments=hidden_states,
        ),
        Host(
            "transformers-pvt_v2",
            _relative("PvtV2", "PvtV2Model"),
            encoder="encoder",
            stage="encoder",
            query="encoder.layers.1.blocks.0.attention.query",
            value="encoder.layers.1.blocks.0.attention.value",
            ffn="encoder.layers.1.blocks.0.mlp.dense1",
            arguments=hidden_states,
        ),
    ]


def _relative(family: str, class_name: str) -> Callable[..., nn.Module]:
    """Models whose encoders are a SegFormer's."""

    def make(unit: int = 8, depths: tuple[int, ...] = (2, 1, 1, 1)) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{family}Config")(
            depths=list(depths),
            hidden_sizes=[unit * heads for heads in HEADS],
            num_attention_heads=list(HEADS),
        )
        return getattr(transformers, class_name)(config)

    return make


_TREE5 = {
    "stage": "stages.1",
    "query": "stages.1.blocks.0.attention.q_proj",
    "value": "stages.1.blocks.0.attention.v_proj",
    "ffn": "stages.1.blocks.0.mlp.fc1",
}
_TREE4 = {
    "stage": "encoder",
    "query": "encoder.block.1.0.attention.self.query",
    "value": "encoder.block.1.0.attention.self.value",
    "ffn": "encoder.block.1.0.mlp.dense1",
}


def _nvlabs(unit: int = 8, depths: tuple[int, ...] = (2, 1, 1, 1), **head: Any) -> nn.Module:
    backbone = _nvlabs_encoder(unit, depths)
    widths = [unit * heads for heads in HEADS]
    return nvlabs.EncoderDecoder(backbone, nvlabs.SegFormerHead(widths, **head))


def _nvlabs_encoder(
    unit: int = 8, depths: tuple[int, ...] = (2, 1, 1, 1), **config: Any
) -> nn.Module:
    widths = [unit * heads for heads in HEADS]
    return nvlabs.MixVisionTransformer(widths, HEADS, depths=depths, **config)


def _daformer(unit: int = 8, depths: tuple[int, ...] = (2, 1, 1, 1)) -> nn.Module:
    head = nvlabs_copies.DAFormerHead([unit * heads for heads in HEADS])
    return nvlabs.EncoderDecoder(_nvlabs_encoder(unit, depths), head)


def _nvlabs_hosts() -> list[Host]:
    tree = {"query": "block2.0.attn.q", "value": "block2.0.attn.kv", "ffn": "block2.0.mlp.fc1"}
    return [
        Host(
            "nvlabs",
            _nvlabs,
            encoder="backbone",
            stage="backbone",
            **{role: f"backbone.{name}" for role, name in tree.items()},
            fuse="decode_head.linear_fuse.conv",
            classifier="decode_head.linear_pred",
        ),
        Host("nvlabs-encoder", _nvlabs_encoder, encoder="", stage="", **tree),
        Host("nvlabs-sithu31296", nvlabs_copies.MiT, encoder="", stage="", **tree),
        Host("nvlabs-bubbliiiing", nvlabs_copies.ListMiT, encoder="", stage="", **tree),
        Host(
            "nvlabs-daformer",
            _daformer,
            encoder="backbone",
            stage="backbone",
            **{role: f"backbone.{name}" for role, name in tree.items()},
            fuse="decode_head.linear_fuse.conv",
            classifier="decode_head.linear_pred",
        ),
    ]


def _mmseg(unit: int = 8, depths: tuple[int, ...] = (2, 1, 1, 1), **head: Any) -> nn.Module:
    backbone = _mmseg_encoder(unit, depths)
    widths = [unit * heads for heads in HEADS]
    return mmseg.EncoderDecoder(backbone, mmseg.SegformerHead(widths, **head))


def _mmseg_encoder(
    unit: int = 8, depths: tuple[int, ...] = (2, 1, 1, 1), **config: Any
) -> nn.Module:
    return mmseg.MixVisionTransformer(unit, depths, HEADS, **config)


def _mmseg_hosts() -> list[Host]:
    tree = {
        "query": "layers.1.1.0.attn.attn",
        "value": "layers.1.1.0.attn.attn",
        "ffn": "layers.1.1.0.ffn.layers.0",
    }
    return [
        Host(
            "mmseg",
            _mmseg,
            encoder="backbone",
            stage="backbone",
            **{role: f"backbone.{name}" for role, name in tree.items()},
            fuse="decode_head.fusion_conv.conv",
            classifier="decode_head.conv_seg",
        ),
        Host("mmseg-encoder", _mmseg_encoder, encoder="", stage="", **tree),
    ]


def _smp(class_name: str) -> Callable[..., nn.Module]:
    def make(depths: tuple[int, ...] = (2, 2, 2, 2), **config: Any) -> nn.Module:
        import segmentation_models_pytorch as smp

        model = getattr(smp, class_name)("mit_b0", encoder_weights=None, classes=5, **config)
        for number, depth in enumerate(depths, start=1):
            del model.encoder.get_submodule(f"block{number}")[depth:]
        return model

    return make


def _smp_hosts() -> list[Host]:
    import segmentation_models_pytorch as smp

    del smp  # an absent one is to be noticed here
    tree = {
        "encoder": "encoder",
        "stage": "encoder",
        "query": "encoder.block2.0.attn.q",
        "value": "encoder.block2.0.attn.kv",
        "ffn": "encoder.block2.0.mlp.fc1",
    }
    return [
        Host(
            "smp",
            _smp("Segformer"),
            **tree,
            fuse="decoder.fuse_stage.0",
            classifier="segmentation_head.0",
            multiple=32,
            layers=8,
        ),
        Host("smp-unet", _smp("Unet"), **tree, multiple=32, layers=8),
    ]


def _fastseg_hosts() -> list[Host]:
    tree = {
        "stage": "segformer.encoder",
        "query": "segformer.encoder.block.1.0.attention.self.query",
        "value": "segformer.encoder.block.1.0.attention.self.value",
        "ffn": "segformer.encoder.block.1.0.mlp.dense1",
    }
    return [
        Host(
            "fastseg",
            _fastseg("SegformerForSemanticSegmentation"),
            encoder="segformer",
            **tree,
            fuse="decode_head.linear_fuse",
            classifier="decode_head.classifier",
            arguments={"output_hidden_states": True},
        )
    ]


_BUILDERS: dict[str, Callable[[], list[Host]]] = {
    "transformers5": lambda: _transformers_hosts(_TREE5, 5),
    "transformers4": lambda: _transformers_hosts(_TREE4, 4),
    "nvlabs": _nvlabs_hosts,
    "mmseg": _mmseg_hosts,
    "smp": _smp_hosts,
    "fastseg": _fastseg_hosts,
}


def _selected() -> dict[str, Host]:
    unknown = [family for family in FAMILIES if family not in _BUILDERS]
    if unknown:
        raise ValueError(
            f"FASTSEG_TEST_HOSTS: expected some of {list(_BUILDERS)}, got {list(FAMILIES)}"
        )
    return {host.name: host for family in FAMILIES for host in _BUILDERS[family]()}


HOSTS = _selected()
# Those whose encoder and head are not another one's too, for tests that are many or slow.
WHOLE = {name: host for name, host in HOSTS.items() if "-" not in name}

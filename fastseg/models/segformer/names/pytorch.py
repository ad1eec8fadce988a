"""Tensor names of PyTorch checkpoints: transformers, NVlabs, mmseg, segmentation_models_pytorch.

transformers has two module trees for SegFormer. fastseg's modules carry the older one, which every
`save_pretrained` writes; a raw `torch.save(model.state_dict())` of transformers 5.9 and later has
the newer one. The other three share the authors' encoder, open-mmlab's mmseg with names of its own.
An encoder and a head are recognised each by itself, so files of converters that rename only the
encoder load too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastseg.checkpoints.training import is_averaged, remark
from fastseg.checkpoints.translation import Table, Translation, translate_name

from ..hosts.names import MMSEG, MMSEG_EMBED, NVLABS, NVLABS_EMBED, TRANSFORMERS_NEW
from .tree import BASE, ENCODER, block_table, embedding_table

# In names wherever a module was wrapped: torch.compile, FSDP, activation checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The first convolution, and what stands before the names of its model: module. of
# DistributedDataParallel, model. of Lightning, whatever a training program calls it.
_FIRST = re.compile(
    r"((?:[^.]+\.)*?)"
    r"(?:(?:segformer\.)?(?:encoder\.)?patch_embeddings\.0\.proj"
    r"|(?:segformer\.)?stages\.0\.patch_embeddings\.proj"
    r"|(?:backbone\.|encoder\.)?patch_embed1\.proj"
    r"|(?:backbone\.)?layers\.0\.0\.projection)\.weight"
)

_NEW_STAGE = re.compile(r"stages\.(\d+)\.(?:blocks\.(\d+)|(patch_embeddings|layer_norm))\.(.+)")
_NEW_BLOCK = block_table(TRANSFORMERS_NEW)
_NEW_LINEAR = "decode_head.linear_projections."

_NVLABS_STAGE = re.compile(r"(?:backbone\.|encoder\.)?(patch_embed|block|norm)([1-9])\.(.+)")
NVLABS_EMBEDDING, NVLABS_BLOCK = embedding_table(NVLABS_EMBED), block_table(NVLABS)
NVLABS_HEAD: Table = {
    **{
        f"decode_head.linear_c{stage}.proj.": [f"decode_head.linear_c.{stage - 1}.proj."]
        for stage in range(1, 10)
    },
    "decode_head.linear_fuse.conv.": ["decode_head.linear_fuse."],
    "decode_head.linear_fuse.bn.": ["decode_head.batch_norm."],
    "decode_head.linear_pred.": ["decode_head.classifier."],
    # Every head of mmseg inherits this layer; the authors' never calls it.
    "decode_head.conv_seg.": [],
}

_MMSEG_STAGE = re.compile(
    r"(?:backbone\.)?layers\.(\d+)\.(?:(0|2)\.|1\.(\d+)\.(?=norm|attn|ffn))(.+)"
)
MMSEG_EMBEDDING, MMSEG_BLOCK = embedding_table(MMSEG_EMBED), block_table(MMSEG)
_MMSEG_HEAD = ("decode_head.convs.", "decode_head.fusion_conv.")

_SMP_STAGE = re.compile(r"decoder\.mlp_stage\.(\d+)\.linear\.(.+)")
SMP_HEAD: Table = {
    "decoder.fuse_stage.0.": ["decode_head.linear_fuse."],
    "decoder.fuse_stage.1.": ["decode_head.batch_norm."],
    "segmentation_head.0.": ["decode_head.classifier."],
}

NVLABS_FIELDS = {"block_norm_eps": 1e-6, "stage_norm_eps": 1e-6}
MMSEG_FIELDS = {**NVLABS_FIELDS, "patch_norm_eps": 1e-6, "reduction_norm_eps": 1e-6}

_MMSEG_RELU = "a ReLU stands between each stage's projection and its upsampling"
MMSEG_HEAD_IS = f"its decode head is another network ({_MMSEG_RELU})"
_OTHER_HEAD = (
    "the decode head is {}, another network than SegFormer's of the paper{}. Load the encoder "
    "with SegformerModel.from_pretrained, or build the model with its own library and speed it up "
    "with fastseg.accelerate(model)"
)


def translate(tensors: Mapping[str, torch.Tensor], average: bool = False) -> Translation:
    """Bring the names of a PyTorch file to fastseg's; unknown names stay as they are.

    Where the model is one module among others, such as a loss, these are left out. Of several
    models one is taken: the model itself, or with `average` an average of its weights or a teacher.
    """
    tensors = {_WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    prefix, *others = _prefixes(tensors, average)
    owners = {name: _owner(name, (prefix, *others)) for name in tensors}
    bare = {name: name.removeprefix(prefix) for name in tensors if owners[name] == prefix}
    translation = Translation(
        fields=_fields(bare.values()),
        foreign_head=_foreign_head(bare),
        left_out=[name for name in tensors if owners[name] is None],
        averaged=is_averaged(prefix),
    )
    if others:
        translation.notes.append(remark(prefix, others, "it"))
    projections = sum(
        bool(_SMP_STAGE.fullmatch(name)) and name.endswith("weight") for name in bare.values()
    )
    for name, short in bare.items():
        if translation.foreign_head and short.startswith(
            ("decode_head.", "decoder.", "segmentation_head.")
        ):
            targets = ["decode_head." + short.removeprefix("decode_head.")]
        else:
            targets = _targets(short, projections)
        tensor = tensors[name]
        if any(".mlp.dense" in target for target in targets) and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)  # mmseg has 1x1 convolutions for linear layers
        translation.add(name, tensor, targets)
    return translation


def _prefixes(names: Iterable[str], average: bool) -> list[str]:
    """What stands before the names of each model in a file, the one to take first."""
    found = [match[1] for name in names if (match := _FIRST.fullmatch(name))]
    return sorted(found, key=lambda prefix: is_averaged(prefix) != average) or [""]


def _owner(name: str, prefixes: Sequence[str]) -> str | None:
    """The prefix of the model that a tensor is of; None for one of no model."""
    return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)


def _fields(names: Iterable[str]) -> dict[str, Any]:
    """Fields of which the encoder's library has other defaults than transformers."""
    names = list(names)
    if any(_NVLABS_STAGE.fullmatch(name) for name in names):
        return dict(NVLABS_FIELDS)
    if any(_MMSEG_STAGE.fullmatch(name) for name in names):
        return dict(MMSEG_FIELDS)
    return {}


def _foreign_head(bare: Mapping[str, str]) -> str | None:
    names = list(bare.values())
    if any(name.startswith(_MMSEG_HEAD) for name in names):
        return _OTHER_HEAD.format("mmseg's SegformerHead", f": {_MMSEG_RELU}")
    if any(name.startswith("decoder.") for name in names) and not any(
        _SMP_STAGE.fullmatch(name) for name in names
    ):
        return _OTHER_HEAD.format("of segmentation_models_pytorch, not its Segformer", "")
    return None


def _targets(name: str, projections: int) -> list[str]:
    """The model's names for `name`; that name itself where nothing knows it."""
    if name.startswith(_NEW_LINEAR):
        return ["decode_head.linear_c." + name.removeprefix(_NEW_LINEAR)]
    # `head` is the classifier that encoders were trained with on ImageNet. Inside a segmentation
    # model it is a leftover.
    if name.startswith("head."):
        return ["classifier." + name.removeprefix("head.")]
    if name.startswith("backbone.head."):
        return []
    if match := _SMP_STAGE.fullmatch(name):  # coarsest first
        stage = projections - 1 - int(match[1])
        return [f"decode_head.linear_c.{stage}.proj.{match[2]}"]
    for head in (NVLABS_HEAD, SMP_HEAD):
        if (targets := translate_name(head, name)) is not None:
            return targets
    inner = _encoder_names(name)
    return [name] if inner is None else [ENCODER + target for target in inner]


def _encoder_names(name: str) -> list[str] | None:
    """Names inside the encoder, such as `block.0.1.mlp.dense1.bias`; None for what is not in it."""
    short = name.removeprefix(BASE)
    if match := _NEW_STAGE.fullmatch(short):
        stage, block, part, rest = match.groups()
        if part is not None:
            return [f"{part}.{stage}.{rest}"]
        return _inside(f"block.{stage}.{block}", _NEW_BLOCK, rest)
    if match := _NVLABS_STAGE.fullmatch(short):
        part, number, rest = match.groups()
        stage = str(int(number) - 1)
        if part == "norm":
            return [f"layer_norm.{stage}.{rest}"]
        if part == "patch_embed":
            return _inside(f"patch_embeddings.{stage}", NVLABS_EMBEDDING, rest)
        block, _, rest = rest.partition(".")
        return _inside(f"block.{stage}.{block}", NVLABS_BLOCK, rest)
    if match := _MMSEG_STAGE.fullmatch(short):
        stage, part, block, rest = match.groups()
        if part == "2":
            return [f"layer_norm.{stage}.{rest}"]
        if part == "0":
            return _inside(f"patch_embeddings.{stage}", MMSEG_EMBEDDING, rest)
        return _inside(f"block.{stage}.{block}", MMSEG_BLOCK, rest)
    if short.startswith("encoder."):
        return [short.removeprefix("encoder.")]
    return None


def _inside(place: str, table: Table, rest: str) -> list[str]:
    targets = translate_name(table, rest)
    targets = [rest] if targets is None else targets
    return [f"{place}.{target}" for target in targets]

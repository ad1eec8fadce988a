"""KerasHub's and KerasCV's SegFormer and MiT: `.weights.h5` and `.keras` files, preset folders.

The two are different networks with the same names. In a file, layers are numbered in the order of
the graph, all stages together: the encoder's blocks run through, and the decoder's projections
begin with the deepest stage. Kernels have the output channels last. GELU is in its tanh form.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastseg.checkpoints.files import TASK_PREFIX
from fastseg.checkpoints.hdf5 import keras_cv_backbone, keras_cv_size
from fastseg.checkpoints.report import CheckpointError
from fastseg.checkpoints.translation import Table, Translation, translate_name

from .tree import ENCODER

FIELDS = {"hidden_act": "gelu_pytorch_tanh", "block_norm_eps": 1e-6}
# What is the same in all models of KerasCV.
KERAS_CV_FIELDS: dict[str, Any] = {
    **FIELDS,
    "num_attention_heads": [1, 2, 5, 8],
    "patch_norm_eps": 1e-3,
    "reduction_norm_eps": 1e-3,
    "stage_norm_eps": 1e-3,
    "batch_norm_eps": 1e-3,
    "same_padding": True,
    "mixes_channels": True,
    "upsamples_probabilities": True,
}
_KERAS_CV_CLASSES = ("MiTBackbone", "SegFormer", "ImageClassifier")

_EMBEDDING = re.compile(r"(?:.+/)?overlapping_patching_and_embedding(?:_(\d+))?/(.+)")
_BLOCK = re.compile(r"(?:.+/)?hierarchical_transformer_encoder(?:_(\d+))?/(.+)")
_STAGE_NORM = re.compile(r"(?:.+/)?layers/layer_normalization(?:_(\d+))?/(vars/.+)")
_DENSE = re.compile(r"(?:.+/)?layers/dense(?:_(\d+))?/(vars/.+)")
_CLASSIFIER = re.compile(rf"(?:{TASK_PREFIX})?layers/conv2d/(vars/.+)")
_FUSE = re.compile(r"(?:.+/)?sequential/layers/(conv2d|batch_normalization)/(vars/.+)")
# Not of the model: the optimizer, and the seeds of dropout and stochastic depth.
_STATE = re.compile(rf"(?:{TASK_PREFIX})?optimizer/.*|.*/seed(?:_generator)?/vars/.*")

_IN_EMBEDDING: Table = {"proj/": ["proj."], "norm/": ["layer_norm."]}
_IN_BLOCK: Table = {
    "norm1/": ["layer_norm_1."],
    "norm2/": ["layer_norm_2."],
    "attn/q/": ["attention.self.query."],
    "attn/k/": ["attention.self.key."],
    "attn/v/": ["attention.self.value."],
    "attn/sr/": ["attention.self.sr."],
    "attn/norm/": ["attention.self.layer_norm."],
    "attn/proj/": ["attention.output.dense."],
    "mlp/fc1/": ["mlp.dense1."],
    "mlp/dwconv/": ["mlp.dwconv.dwconv."],
    "mlp/fc2/": ["mlp.dense2."],
}
_VARIABLES = ("weight", "bias", "running_mean", "running_var")


def is_keras(names: Iterable[str]) -> bool:
    """Return whether these are paths of variables in Keras 3's files."""
    names = list(names)
    return bool(names) and all("/vars/" in name for name in names)


def read_groups(
    names: Iterable[str], groups: Iterable[str], source: str | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of the configuration that tell whose network an HDF5 file is of.

    Groups are layers, of which some have no variables: attention has a dropout in KerasHub and none
    in KerasCV, where encoders within a segmentation model are called "functional".

    Args:
        names: of its tensors.
        groups: paths of all groups in it.
        source: "keras_cv" where the caller says so, or None.
        fields: what a config.json, or the caller's configuration, has told.

    Raises:
        CheckpointError: it is of another network, or may be of either.
    """
    names, groups = list(names), list(groups)
    if "model_weights" in groups:
        raise CheckpointError(
            "expected weights, got a whole model in Keras' older HDF5 format, where numbers of "
            "layers are not those of the model: save its weights as .weights.h5, or it as .keras"
        )
    said = source == "keras_cv" or bool(fields.get("mixes_channels"))
    if not is_keras(names):
        if said:
            raise CheckpointError("expected KerasCV's SegFormer or MiT, got names of others")
        return {}
    if any(group.endswith("/attn/dropout") for group in groups):
        if said:
            raise CheckpointError("expected KerasCV's SegFormer or MiT, got KerasHub's")
        return {}
    if any(group.endswith("/padding") for group in groups):
        raise CheckpointError(
            "expected a SegFormer or MiT of KerasHub or KerasCV, got KerasHub 0.17's MiT, a third "
            "network: it pads as the one and mixes tokens with channels as the other. Save the "
            "weights again with a present KerasHub, if they are those of its network"
        )
    if said or any(name.startswith("layers/functional/") for name in names):
        if fields.get("mixes_channels") is False:
            raise CheckpointError("expected weights of KerasHub, as config says, got KerasCV's")
        return dict(KERAS_CV_FIELDS)
    raise CheckpointError(
        "expected weights of KerasHub's SegFormer or MiT, got some that may be of KerasCV's, which "
        "is another network with the same names: load the preset's folder or the .keras file, "
        'whose config.json tells which, or say source="keras_cv"; of an early KerasHub save them '
        "again with a present one"
    )


def read_preset(config: Mapping[str, Any], task: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields of the configuration from a preset's config.json and task.json.

    Raises:
        CheckpointError: the preset is of another architecture.
    """
    if keras_cv_backbone(task or config) is not None:
        return _read_keras_cv(task or config)
    backbone = config.get("config") or {}
    encoder = backbone.get("image_encoder", config)
    sizes = encoder.get("config") or {}
    made_by = str(encoder.get("registered_name"))
    if made_by != "keras_hub>MiTBackbone":
        raise CheckpointError(
            "config.json: expected a preset of KerasHub's SegFormer or MiT, or of KerasCV's, got "
            f"one of {config.get('registered_name') or config.get('class_name')}"
        )
    if task is not None and (task.get("config") or {}).get("pooling", "avg") != "avg":
        raise CheckpointError("task.json: expected average pooling, got another one")
    fields = {
        "depths": sizes.get("layerwise_depths"),
        "num_attention_heads": sizes.get("layerwise_num_heads"),
        "strides": sizes.get("layerwise_strides"),
        "drop_path_rate": sizes.get("max_drop_path_rate"),
    }
    return {name: value for name, value in fields.items() if value is not None}


def _read_keras_cv(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields from a config.json of KerasCV; of pixels the size, as the network depends on it."""
    backbone = keras_cv_backbone(config) or {}
    for one, expected in ((config, _KERAS_CV_CLASSES), (backbone, _KERAS_CV_CLASSES[:1])):
        made_by = str(one.get("registered_name"))
        if made_by.rpartition(">")[2] not in expected:
            raise CheckpointError(
                "config.json: expected a preset of KerasHub's SegFormer or MiT, or of KerasCV's, "
                f"got one of {made_by}"
            )
    if (config.get("config") or {}).get("pooling", "avg") != "avg":
        raise CheckpointError("config.json: expected average pooling, got another one")
    fields = {
        "depths": (backbone.get("config") or {}).get("depths"),
        "image_size": keras_cv_size(backbone),
    }
    return {
        **KERAS_CV_FIELDS,
        **{name: value for name, value in fields.items() if value is not None},
    }


def read_converter(converter: Mapping[str, Any]) -> dict[str, Any]:
    """Options of SegformerImageProcessor from a preset's image_converter.json.

    KerasHub computes `scale * pixels + offset` on bytes. Its cropping to the aspect ratio is left
    out.
    """
    options = converter.get("config") or {}
    scale, offset = options.get("scale"), options.get("offset")
    processor: dict[str, Any] = {"do_rescale": False, "do_normalize": False}
    if size := options.get("image_size"):
        processor["size"] = tuple(size)
    if scale is None and offset is None:
        return processor
    scales = scale if isinstance(scale, list) else [1.0 if scale is None else scale] * 3
    offsets = offset if isinstance(offset, list) else [offset or 0.0] * 3
    stds = [1 / (255 * value) for value in scales]
    means = [-shift * std for shift, std in zip(offsets, stds, strict=True)]
    return {
        **processor,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": means,
        "image_std": stds,
    }


def translate(
    tensors: Mapping[str, torch.Tensor], depths: Sequence[int] | None = None
) -> Translation:
    """Bring names and axis order to PyTorch's; unknown names stay as they are.

    Args:
        depths: blocks in each stage. Without it a block belongs to the stage of its width.

    Raises:
        CheckpointError: neighbouring stages have the same width, and `depths` is not given.
    """
    translation = Translation(fields=dict(FIELDS))
    tensors = {name: tensor for name, tensor in tensors.items() if not _STATE.fullmatch(name)}
    widths = _numbered(tensors, _EMBEDDING, "norm/vars/0")
    places = _places(widths, _numbered(tensors, _BLOCK, "norm1/vars/0"), depths)
    segments = any(_FUSE.fullmatch(name) for name in tensors)
    stages = _projections(widths, _numbered(tensors, _DENSE, "vars/0")) if segments else {}
    for name, tensor in tensors.items():
        target = _target(name, places, stages)
        translation.add(name, _to_pytorch(name, tensor), [name if target is None else target])
    return translation


def _to_pytorch(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 4:
        # A depthwise kernel is (height, width, channels, 1) here.
        return tensor.permute(2, 3, 0, 1) if "/dwconv/" in name else tensor.permute(3, 2, 0, 1)
    return tensor.t() if tensor.ndim == 2 else tensor


def _numbered(
    tensors: Mapping[str, torch.Tensor], layer: re.Pattern[str], variable: str
) -> list[int]:
    """The first dimension of each such layer's variable, in the layers' order."""
    sizes = {}
    for name, tensor in tensors.items():
        match = layer.fullmatch(name)
        if match and match[2] == variable and not name.startswith(TASK_PREFIX):
            sizes[int(match[1] or 0)] = tensor.shape[0]
    return [sizes[number] for number in sorted(sizes)]


def _places(
    widths: Sequence[int], blocks: Sequence[int], depths: Sequence[int] | None
) -> list[str]:
    """`stage.block` of every block in their running order."""
    if depths is None:
        if any(left == right for left, right in itertools.pairwise(widths)):
            raise CheckpointError(
                "depths: expected the number of blocks in each stage, which a Keras file does not "
                f"tell where neighbouring stages have the same width: {list(widths)}"
            )
        depths = [blocks.count(width) for width in widths]
    return [f"{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]


def _projections(widths: Sequence[int], inputs: Sequence[int]) -> dict[int, int]:
    """Map a Dense layer's number to the stage that it projects."""
    if len(set(widths)) == len(widths) and sorted(inputs) == sorted(widths):
        return {number: widths.index(width) for number, width in enumerate(inputs)}
    return {number: len(inputs) - 1 - number for number in range(len(inputs))}


def _target(name: str, places: Sequence[str], stages: Mapping[int, int]) -> str | None:
    """The model's name of a variable; None for what no SegFormer has."""
    if match := _EMBEDDING.fullmatch(name):
        inner = translate_name(_IN_EMBEDDING, match[2])
        return _named(f"{ENCODER}patch_embeddings.{match[1] or 0}.", inner)
    if match := _BLOCK.fullmatch(name):
        number = int(match[1] or 0)
        inner = translate_name(_IN_BLOCK, match[2])
        return _named(f"{ENCODER}block.{places[number]}.", inner) if number < len(places) else None
    if match := _STAGE_NORM.fullmatch(name):
        return _named(f"{ENCODER}layer_norm.{match[1] or 0}.", [match[2]])
    if match := _FUSE.fullmatch(name):
        layer = "linear_fuse" if match[1] == "conv2d" else "batch_norm"
        return _named(f"decode_head.{layer}.", [match[2]])
    if match := _CLASSIFIER.fullmatch(name):
        return _named("decode_head.classifier.", [match[1]])
    if match := _DENSE.fullmatch(name):
        number = int(match[1] or 0)
        if name.startswith(TASK_PREFIX) or not stages:
            return _named("classifier.", [match[2]])
        return _named(f"decode_head.linear_c.{stages[number]}.proj.", [match[2]])
    return None


def _named(prefix: str, inner: Sequence[str] | None) -> str | None:
    """`prefix` and a name that ends with a variable's number, which becomes its PyTorch name."""
    if inner is None:
        return None
    layer, _, number = inner[0].rpartition("vars/")
    if number not in ("0", "1", "2", "3"):
        return None
    return prefix + layer + _VARIABLES[int(number)]

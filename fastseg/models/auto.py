"""`from_pretrained` and `from_preset`: a model of whichever family and class it is of."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

from fastseg.checkpoints.load import load_pretrained
from fastseg.kernels.core.precision import FAST

from .base import PreTrainedModel, Source
from .families import FAMILIES
from .runtime import RuntimeModel, load_runtime

PRESETS = tuple(name for family in FAMILIES.values() for name in family.presets)


Loaded = PreTrainedModel | RuntimeModel | tuple[PreTrainedModel, dict[str, list[object]]]


@overload
def from_pretrained(
    path: Source | None,
    *,
    runtime: None = ...,
    output_loading_info: Literal[False] = ...,
    **kwargs: object,
) -> PreTrainedModel: ...


@overload
def from_pretrained(
    path: Source | None,
    *,
    runtime: None = ...,
    output_loading_info: Literal[True],
    **kwargs: object,
) -> tuple[PreTrainedModel, dict[str, list[object]]]: ...


@overload
def from_pretrained(
    path: Source,
    *,
    runtime: str,
    output_loading_info: Literal[False] = ...,
    **kwargs: object,
) -> RuntimeModel: ...


@overload
def from_pretrained(
    path: Source,
    *,
    runtime: str | None,
    output_loading_info: Literal[False] = ...,
    **kwargs: object,
) -> PreTrainedModel | RuntimeModel: ...


def from_pretrained(path: Source | None, *, runtime: str | None = None, **kwargs: object) -> Loaded:
    """The model in a directory, in a file or under a Hugging Face hub id, in eval mode.

    Weights in half precision become float32 on a CPU, where an image processor's pixels fit no
    others, and stay as they are stored elsewhere; `dtype=` says otherwise. "fast" is bfloat16 where
    the CPU has AMX or AVX512-BF16, and on GPUs that have it, and float32 elsewhere.

    With `runtime` "openvino" or "onnxruntime" that library computes the forward, on the CPU, from
    the folded graph: a `RuntimeModel`, which is called as the model is, and which
    `fastseg.segment` takes. `path` may be an ONNX file that `fastseg.export` wrote, too. `dtype`
    is then what the runtime is to compute in; where None that is its own choice, which for OpenVINO
    is bfloat16 where the CPU has it. The graph is written once, beside the checkpoint, or into the
    user's folder for caches where it cannot be.

    Its family comes from `model_type` in config.json, its class from `architectures` there, else
    both from the names of the tensors. Arguments and errors are those of
    `fastseg.checkpoints.load.load_pretrained`.
    """
    classes = [model for family in FAMILIES.values() for model in family.models]
    given: dict[str, Any] = kwargs
    if runtime is not None:
        if given.get("dtype") == FAST:  # which a runtime chooses by itself
            given["dtype"] = None
        load = functools.partial(load_pretrained, model_class=classes)
        return load_runtime(path, runtime, load, **given)
    loaded: Loaded = load_pretrained(path, classes, **given)
    return loaded


def from_preset(
    name: str,
    num_classes: int | None = None,
    projection_filters: int | None = None,
    **kwargs: object,
) -> PreTrainedModel:
    """A model with newly drawn weights, in training mode as any new module.

    segformer_* gives SegformerForSemanticSegmentation; mit_* gives SegformerForImageClassification,
    or SegformerModel, the encoder alone, with `num_classes=0`.

    Args:
        name: one of `PRESETS`.
        num_classes: number of classes; 1000 for mit_*, 150 (ADE20K) for segformer_* where None.
        projection_filters: width of the decode head; that of the paper where None (256 for B0 and
            B1, 768 for B2 to B5).
        **kwargs: other fields of the family's configuration.

    Raises:
        TypeError: a keyword is no such field, or one is given twice.
        ValueError: no such preset, or a field is wrong.
    """
    for family in FAMILIES.values():
        if name in family.presets and family.from_preset is not None:
            return family.from_preset(name, num_classes, projection_filters, **kwargs)
    known = ", ".join(preset for family in FAMILIES.values() for preset in family.presets)
    raise ValueError(f"name: expected one of {known}, got {name!r}")

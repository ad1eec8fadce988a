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
"""The published sizes that `from_preset` makes: `mit_b0` to `mit_b5`, `segformer_b0` to `_b5`."""


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

    Reads model.safetensors and pytorch_model.bin, whole or in shards, tf_model.h5, presets of
    KerasHub and KerasCV, and single files (safetensors, HDF5, `.keras`, PyTorch's pickles, of which
    no code is run), also those of training programs. Whose tensors they are is told by their names:
    those of transformers 4 or 5, in PyTorch or TensorFlow, NVlabs, mmseg (the encoder),
    segmentation_models_pytorch, KerasHub or KerasCV. Where there is no config.json of transformers,
    sizes come from the tensors. 8-bit weights of bitsandbytes become floats. A head that the file
    does not have at all is newly initialised; the head of another class in the file is left out.
    Both are told by a CheckpointWarning and in `model.load_report`, as is which of two sets of
    weights was taken.

    With `runtime` "openvino" or "onnxruntime" that library computes the forward, on the CPU, from
    the folded graph: a `RuntimeModel`, which is called as the model is, and which
    `fastseg.segment` takes. `path` may be an ONNX file that `fastseg.export` wrote, too. `dtype`
    is then what the runtime is to compute in; where None that is its own choice, which for OpenVINO
    is bfloat16 where the CPU has it. The graph is written once, beside the checkpoint, or into the
    user's folder for caches where it cannot be.

    Its family comes from `model_type` in config.json, its class from `architectures` there, else
    both from the names of the tensors.

    Args:
        path: a directory, a file or a Hugging Face hub id. Beside a file with the name that it has
            in a checkpoint's directory, such as model.safetensors, config.json counts too. None
            where `state_dict` is given.
        runtime: "openvino" or "onnxruntime"; None for PyTorch.
        config: the configuration, instead of that in config.json; the model gets a copy.
        state_dict: the weights, instead of those in the files, or what a training program stored
            with them inside. Without `config` and `path` sizes come from the tensors.
        num_labels, id2label: other classes than the checkpoint's; a classifier of another size in
            the file, or none in a head that has the rest, is then newly initialised.
        ignore_mismatched_sizes: newly initialise every tensor of another shape in the file.
        strict: False leaves out what the model has no use for, such as counters that a profiler has
            put among the weights (`total_ops`), a loss's weights or a teacher, and newly
            initialises what the file does not have; `load_report` lists both.
        weights: "model" for the model's own weights, "ema" for an average of them (EMA, SWA) or a
            teacher's in the file of a training program.
        source: "keras_cv" for the `.weights.h5` of an encoder of KerasCV, whose names KerasHub's
            has as well; None for all else.
        output_loading_info: return (model, info) with what `load_report` has under transformers'
            keys: missing_keys, unexpected_keys, mismatched_keys, error_msgs.
        dtype: of the model. None is the one in config.json, else the file's own, but float32 on a
            CPU where that is float16 or bfloat16: an image processor's pixels are float32. "auto"
            is the stored one everywhere. "fast" is bfloat16 where the device has products in it
            (a CPU with AMX or AVX512-BF16, a GPU of compute capability 8.0 or more), else float32.
        device: of the model; None for PyTorch's default device.
        device_map: the same under transformers' name: "cpu", "cuda:0", 0 or {"": "cuda:0"}.
        subfolder: of the directory or hub id, where all files are.
        variant: of the files of weights: "fp16" for model.fp16.safetensors.
        revision, cache_dir, token, local_files_only: for hub ids, as in huggingface_hub.
        **kwargs: what is here from `config` on, and other fields of the configuration, such as
            `drop_path_rate=0.2`; or what tensors do not tell, such as `num_attention_heads` of
            unusual widths.

    Returns:
        a model of the family's class; with `runtime` a RuntimeModel; with `output_loading_info` a
        pair of the model and that.

    Raises:
        CheckpointError: a file is missing in the directory, corrupt, unsafe or of another model;
            or tensors are missing, unexpected or of another shape: one error lists them all.
        FileNotFoundError: there is no such file or folder, and no such hub id or file in it.
        ImportError: huggingface_hub, for a hub id, or h5py, for HDF5, is not installed.
        TypeError, ValueError: an argument is wrong.
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

    `segformer_*` gives SegformerForSemanticSegmentation; `mit_*` SegformerForImageClassification,
    or SegformerModel, the encoder alone, with `num_classes=0`.

    Args:
        name: one of `PRESETS`.
        num_classes: number of classes; 1000 for `mit_*`, 150 (ADE20K) for `segformer_*` where None.
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

"""Weights that transformers' TensorFlow classes saved: tf_model.h5, or safetensors of format "tf".

Names are transformers' PyTorch names with slashes, a block `block.0.1` as one segment, and the
variables' TensorFlow names. Kernels have the output channels last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from .translation import Translation

_VARIABLES = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def is_tensorflow(names: Iterable[str]) -> bool:
    """Return whether these are names of TensorFlow's variables, such as `…/proj/kernel:0`."""
    names = list(names)
    return bool(names) and all("/" in name and name.endswith(":0") for name in names)


def translate(tensors: Mapping[str, torch.Tensor]) -> Translation:
    """Bring names and axis order to PyTorch's; unknown names stay as they are."""
    translation = Translation()
    for name, tensor in tensors.items():
        *path, variable = name.removesuffix(":0").split("/")
        if variable == "kernel":
            # A depthwise one is (height, width, 1, channels) in these files: no other order.
            tensor = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.t()
        # In h5 files `<layer>/<model>` stands before the path, which begins with the layer again.
        if len(path) > 2 and path[2] == path[0]:
            path = path[2:]
        known = variable in _VARIABLES
        translation.add(name, tensor, [".".join([*path, _VARIABLES[variable]]) if known else name])
    return translation

"""The one device that a model is loaded onto, from `device` or from transformers' `device_map`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def chosen_device(device: Any, device_map: Any) -> torch.device:
    """The device that is asked for; PyTorch's default one where both arguments are None.

    Args:
        device_map: a device, the number of a GPU, or a dictionary from "" to either.

    Raises:
        ValueError: it is no device, is more than one, or both arguments are given.
    """
    if device_map is None:
        return torch.get_default_device() if device is None else _device("device", device, device)
    if device is not None:
        raise ValueError(f"device_map: expected None beside device={device!r}, got {device_map!r}")
    one = device_map
    if isinstance(device_map, Mapping):
        one = device_map[""] if device_map.keys() == {""} else None
    return _device("device_map", one, device_map)


def _device(argument: str, value: Any, given: Any) -> torch.device:
    try:
        if type(value) is int and value >= 0:
            return torch.device("cuda", value)
        if isinstance(value, str | torch.device):
            return torch.device(value)
    except RuntimeError:
        pass  # a text that names no device
    expected = 'a device such as "cpu" or "cuda:0"'
    if argument == "device_map":
        expected = (
            'one device for the whole model, as "cpu", "cuda:0", 0 or {"": "cuda:0"} (fastseg '
            "spreads no model over several, and moves nothing to disk)"
        )
    raise ValueError(f"{argument}: expected {expected}, got {given!r}") from None

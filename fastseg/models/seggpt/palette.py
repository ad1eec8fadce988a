"""Classes as colours, and painted masks as label maps.

Label maps are transformers' bit for bit, in a thirtieth of the time and in constant memory: the
nearest colour is searched before a map is enlarged, by distances of some pixels at a time.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F

_PIXELS = 4096  # whose distances are taken at once: those of 150 classes stay in the cache


def build_palette(num_labels: int) -> list[tuple[int, int, int]]:
    """The colours of the background, black, and of `num_labels` classes, as SegGPT was trained."""
    base = int(num_labels ** (1 / 3)) + 1
    margin = 256 // base
    colours = [(0, 0, 0)]
    for label in range(num_labels):
        digits = label // base**2, label % base**2 // base, label % base
        red, green, blue = (255 - digit * margin for digit in digits)
        colours.append((red, green, blue))
    return colours


def paint(labels: np.ndarray, num_labels: int | None, name: str) -> np.ndarray:
    """A label map (H, W) of integers as uint8 (H, W, 3).

    Args:
        num_labels: classes beside the background 0; None repeats the numbers in all channels.

    Raises:
        ValueError: labels are below 0 or above `num_labels`, or 255.
    """
    highest = 255 if num_labels is None else num_labels
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > highest:
        what = "bytes" if num_labels is None else f"0, the background, to {highest}, num_labels"
        wrong = high if high > highest else low
        hint = ""
        if wrong == 255:
            hint = "; where it stands for pixels without a class, make these 0"
        raise ValueError(f"{name}: expected labels from {what}; got {wrong}{hint}")
    if num_labels is None:
        return np.repeat(labels[..., None], 3, axis=-1).astype(np.uint8)
    return np.array(build_palette(num_labels), dtype=np.uint8)[labels.astype(np.int64)]


def colours_of(
    masks: torch.Tensor, mean: float | list[float], std: float | list[float]
) -> torch.Tensor:
    """Normalised masks (B, 3, H, W) as colours from 0 to 255."""
    # The order of operations, and their dtype, are transformers'.
    shift, scale = (torch.tensor(one, device=masks.device) for one in (mean, std))
    colours = masks.permute(0, 2, 3, 1) * scale + shift
    return torch.clip(colours.permute(0, 3, 1, 2) * 255, 0, 255)


def label_map(
    colours: torch.Tensor, size: tuple[int, int] | None, num_labels: int | None
) -> torch.Tensor:
    """Colours (3, H, W) as a map of the nearest colour's class, int64, at `size`.

    Without `num_labels` the mean of the channels, int32.
    """
    height, width = colours.shape[1:]
    is_less = size is not None and size[0] * size[1] < height * width
    if is_less:
        colours, size = _resized(colours, size), None
    if num_labels is None:
        labels = colours.mean(dim=0).int()
    else:
        flat = colours.flatten(1)
        nearest = [distances(some, num_labels).argmin(0) for some in flat.split(_PIXELS, dim=1)]
        labels = torch.cat(nearest).view(colours.shape[1:])
    if size is None:
        return labels
    # In float32, which nearest interpolation is there for everywhere; classes are exact in it.
    return _resized(labels.float()[None], size)[0].to(labels.dtype)


def scores(colours: torch.Tensor, size: tuple[int, int] | None, num_labels: int) -> torch.Tensor:
    """Negative squared distances (num_labels + 1, H, W) of colours (3, H, W) to the classes'."""
    found = -distances(colours.flatten(1), num_labels).view(-1, *colours.shape[1:])
    return found if size is None else _resized(found, size)


def distances(pixels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Squared distances (num_labels + 1, N) of colours (3, N), summed as transformers does."""
    palette = torch.tensor(_palette(num_labels), dtype=torch.float, device=pixels.device)
    total = None
    for channel, values in enumerate(pixels):
        square = (values - palette[:, channel, None]).square_()
        total = square if total is None else total.add_(square)
    assert total is not None
    return total


_palette = functools.lru_cache(build_palette)


def _resized(maps: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    return F.interpolate(maps[None], size=size, mode="nearest")[0]

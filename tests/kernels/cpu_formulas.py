"""Ops of a model in half precision on a CPU against formulas in float64, over a grid of shapes.

`python -m tests.kernels.cpu_formulas DTYPE` prints the shapes that fail; tests run it where oneDNN
takes fewer instructions than the CPU has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fastseg import kernels

GRIDS = ((1, 1), (2, 1), (16, 1), (1, 16), (5, 3), (9, 8))
EMBEDDINGS = (
    (3, 32, 7, 4),
    (3, 16, 7, 4),
    (8, 16, 3, 2),
    (32, 64, 3, 2),
    (160, 256, 3, 2),
    (320, 512, 3, 2),
)
LAYERS = ((8, 1, 2), (16, 2, 1), (32, 1, 8), (64, 2, 4), (160, 5, 2), (320, 5, 1))
HEADS = (((8, 16, 40, 64), 24, 5), ((32, 64, 160, 256), 256, 19))
# Finest grids of a head and what the coarse ones are of; more than 256 columns are cut into tiles.
HEAD_GRIDS = (((4, 1), 2), ((9, 7), 2), ((16, 24), 2), ((3, 530), 2), ((7, 5), 1))
# Of results, in units of rounding; on one Xeon they are 0.2 to 0.75.
MOST_UNITS = 1


def failures(dtype: torch.dtype) -> list[str]:
    """Ops and shapes whose relative RMS error is above `MOST_UNITS`, or not a number."""
    torch.manual_seed(0)
    failed = []
    with torch.inference_mode():
        for name, run, reference in _cases(dtype):
            # What is free is not a number: an operator that reads memory it has not set shows.
            freed = torch.full((1 << 20,), torch.nan, dtype=dtype)
            del freed
            result, expected = run().double(), reference()
            error = ((result - expected).norm() / expected.norm()).item()
            if not error <= MOST_UNITS * torch.finfo(dtype).eps:
                failed.append(f"{name}: {error:.1e}")
    return failed


def _cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    def draw(*shape: int, fan: int | None = None) -> torch.Tensor:
        return (torch.randn(shape) * (fan or shape[-1]) ** -0.5).to(dtype)

    for inputs, channels, kernel, stride in EMBEDDINGS:
        for height, width in GRIDS:
            size = (height * stride, width * stride)
            pixels = draw(1, inputs, *size, fan=1)
            made = kernels.PatchEmbedWeights(
                draw(channels, inputs, kernel, kernel, fan=inputs * kernel**2),
                draw(channels, fan=4),
                *(draw(channels, fan=1), draw(channels, fan=1)),
                stride=stride,
                padding=kernel // 2,
                eps=1e-6,
            )
            name = f"patch_embed {inputs} to {channels}, {size}"
            yield (
                name,
                lambda p=pixels, w=made: kernels.patch_embed(p, w)[0],
                lambda p=pixels, w=made: _patch_embed(p, w),
            )
    for channels, heads, sr_ratio in LAYERS:
        for grid in GRIDS:
            x = draw(2, grid[0] * grid[1], channels, fan=1)
            ffn = kernels.MixFfnWeights(
                *(draw(4 * channels, channels), draw(4 * channels, fan=4)),
                *(draw(4 * channels, 1, 3, 3, fan=9), draw(4 * channels, fan=4)),
                *(draw(channels, 4 * channels), draw(channels, fan=4)),
                eps=1e-6,
            )
            yield (
                f"mix_ffn {channels}, {grid}",
                lambda x=x, g=grid, w=ffn: kernels.mix_ffn(x, *g, w),
                lambda x=x, g=grid, w=ffn: _mix_ffn(x, *g, w),
            )
            if sr_ratio > min(grid):
                continue
            taps, many = sr_ratio**2, heads > 1
            attention = kernels.SrAttentionWeights(
                draw(2 * channels, channels),
                draw(channels, fan=4),
                heads,
                1e-6,
                sr_ratio,
                query_weight=draw(channels, channels) if many else None,
                query_bias=draw(channels, fan=4) if many else None,
                output_weight=draw(channels, channels) if many else None,
                key_offset_weight=None if many else draw(channels),
                sr_weight=draw(channels, taps * channels) if sr_ratio > 1 else None,
                sr_bias=draw(channels, fan=4) if sr_ratio > 1 else None,
            )
            yield (
                f"sr_attention {channels}, {grid}",
                lambda x=x, g=grid, w=attention: kernels.sr_attention(x, *g, w),
                lambda x=x, g=grid, w=attention: _attention(x, *g, w),
            )
    for widths, depth, classes in HEADS:
        for (height, width), ratio in HEAD_GRIDS:
            maps = [
                draw(2, c, -(-height // ratio**i), -(-width // ratio**i), fan=1)
                for i, c in enumerate(widths)
            ]
            head = kernels.DecodeHeadWeights(
                tuple(draw(depth, c) for c in widths),
                draw(depth, fan=4),
                draw(classes, depth),
                draw(classes, fan=4),
            )
            yield (
                f"decode_head {depth}, {(height, width)} / {ratio}",
                lambda m=maps, w=head: kernels.decode_head(m, w),
                lambda m=maps, w=head: _head(m, w),
            )


def _patch_embed(pixels: torch.Tensor, weights: kernels.PatchEmbedWeights) -> torch.Tensor:
    w = weights.map(torch.Tensor.double)
    grid = F.conv2d(pixels.double(), w.weight, w.bias, stride=w.stride, padding=w.padding)
    tokens = grid.flatten(2).transpose(1, 2)
    return F.layer_norm(tokens, tokens.shape[2:], w.norm_weight, w.norm_bias, w.eps)


def _mix_ffn(
    x: torch.Tensor, height: int, width: int, weights: kernels.MixFfnWeights
) -> torch.Tensor:
    w, x = weights.map(torch.Tensor.double), x.double()
    hidden = F.linear(F.layer_norm(x, x.shape[2:], eps=w.eps), w.fc1_weight, w.fc1_bias)
    grid = hidden.transpose(1, 2).unflatten(2, (height, width))
    grid = F.conv2d(grid, w.dwconv_weight, w.dwconv_bias, padding=1, groups=len(w.fc1_bias))
    return x + F.linear(F.gelu(grid).flatten(2).transpose(1, 2), w.fc2_weight, w.fc2_bias)


def _attention(
    x: torch.Tensor, height: int, width: int, weights: kernels.SrAttentionWeights
) -> torch.Tensor:
    w, x = weights.map(torch.Tensor.double), x.double()
    batch, tokens, channels = x.shape
    z = reduced = F.layer_norm(x, (channels,), eps=w.eps)
    ratio = w.sr_ratio
    if ratio > 1:
        assert w.sr_weight is not None
        grid = z.transpose(1, 2).unflatten(2, (height, width))
        taps = w.sr_weight.unflatten(1, (ratio, ratio, channels)).permute(0, 3, 1, 2)
        reduced = F.conv2d(grid, taps, w.sr_bias, stride=ratio).flatten(2).transpose(1, 2)
        reduced = F.layer_norm(reduced, (channels,), eps=w.sr_eps)
    key, value = F.linear(reduced, w.key_value_weight).chunk(2, dim=2)
    if w.num_heads == 1:
        assert w.key_offset_weight is not None
        scores = z @ key.transpose(1, 2) + (reduced @ w.key_offset_weight)[:, None]
        return x + scores.softmax(2) @ value + w.output_bias
    assert w.query_weight is not None
    assert w.output_weight is not None
    query, key, value = (
        part.unflatten(2, (w.num_heads, -1)).transpose(1, 2)
        for part in (F.linear(z, w.query_weight, w.query_bias), key, value)
    )
    context = (query @ key.transpose(2, 3)).softmax(3) @ value
    context = context.transpose(1, 2).reshape(batch, tokens, channels)
    return x + F.linear(context, w.output_weight, w.output_bias)


def _head(maps: list[torch.Tensor], weights: kernels.DecodeHeadWeights) -> torch.Tensor:
    w = weights.map(torch.Tensor.double)
    assert w.classifier_weight is not None
    size = maps[0].shape[2:]
    total = w.bias[:, None, None]
    for one, matrix in zip(maps, w.weights, strict=True):
        projected = F.conv2d(one.double(), matrix[:, :, None, None])
        total = total + F.interpolate(projected, size=size, mode="bilinear", align_corners=False)
    return F.conv2d(total.relu(), w.classifier_weight[:, :, None, None], w.classifier_bias)


if __name__ == "__main__":
    print("\n".join(failures(getattr(torch, sys.argv[1]))))

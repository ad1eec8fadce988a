"""Candidates of the tuner for each kernel: small products of values that are all right by design.

A candidate may still ask for more registers or shared memory than a GPU has, or not divide a size:
the tuner leaves such ones out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from ..core.configurations import Config, Query


def candidates(query: Query) -> list[Config]:
    """Configurations to try for `query`."""
    return _KERNELS[query.kernel](query.dtype == "half", dict(query.sizes))


def _product(**values: tuple[Any, ...]) -> list[Config]:
    choices = itertools.product(*values.values())
    return [dict(zip(values, choice, strict=True)) for choice in choices]


def _layer_norm(half: bool, sizes: dict[str, int]) -> list[Config]:
    return _product(BLOCK_M=(1, 4, 16, 64), num_warps=(2, 4, 8))


def _linear(half: bool, sizes: dict[str, int]) -> list[Config]:
    if not half:
        return _product(
            BLOCK_M=(32, 64), BLOCK_N=(32, 64), BLOCK_K=(32,), num_warps=(4, 8), num_stages=(2, 3)
        )
    small = _product(
        BLOCK_M=(64,), BLOCK_N=(32, 64, 128), BLOCK_K=(32, 64), num_warps=(4,), num_stages=(3, 4)
    )
    large = _product(
        BLOCK_M=(128,), BLOCK_N=(64, 128), BLOCK_K=(32, 64), num_warps=(4, 8), num_stages=(3,)
    )
    return small + large


def _one_head_attention(half: bool, sizes: dict[str, int]) -> list[Config]:
    if not half:
        return _product(BLOCK_M=(16, 32), BLOCK_N=(32, 64), num_warps=(4, 8), num_stages=(1,))
    return _product(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3))


def _attention_block(half: bool, sizes: dict[str, int]) -> list[Config]:
    if not half:
        return _product(
            BLOCK_M=(16, 32), BLOCK_N=(32,), CHUNK=(32,), num_warps=(4, 8), num_stages=(1,)
        )
    return _product(
        BLOCK_M=(64,), BLOCK_N=(32, 64), CHUNK=(32, 64), num_warps=(4, 8), num_stages=(2, 3)
    )


def _attention_per_head(half: bool, sizes: dict[str, int]) -> list[Config]:
    if not half:
        return _product(
            BLOCK_M=(16, 32), BLOCK_N=(32,), BLOCK_K=(32,), num_warps=(4, 8), num_stages=(1,)
        )
    return _product(
        BLOCK_M=(64,), BLOCK_N=(64, 128), BLOCK_K=(32, 64), num_warps=(4, 8), num_stages=(2, 3)
    )


def _key_value(half: bool, sizes: dict[str, int]) -> list[Config]:
    return _product(
        BLOCK_M=(16, 32), BLOCK_N=(32, 64), CHUNK=(32, 64), num_warps=(4, 8), num_stages=(1,)
    )


def _sr_key_value(half: bool, sizes: dict[str, int]) -> list[Config]:
    return _product(
        SPLITS=(1, 4, 8, 16, 32),
        BLOCK_M=(16, 64) if half else (16,),
        num_warps=(4,),
        num_stages=(2, 3) if half else (1, 2),
    )


def _sr_partials(half: bool, sizes: dict[str, int]) -> list[Config]:
    return _product(
        SPLITS=(1, 2, 4, 8),
        BLOCK_M=(32, 64) if half else (32,),
        BLOCK_N=(32, 64) if half else (32,),
        BLOCK_K=(32, 64) if half else (32,),
        num_warps=(4,),
        num_stages=(3,) if half else (2,),
    )


def _sr_attention(half: bool, sizes: dict[str, int]) -> list[Config]:
    return _product(key_value=("one_launch", "split"), attention=("block", "per_head"))


def _mix_ffn(half: bool, sizes: dict[str, int]) -> list[Config]:
    channels = sizes["channels"]
    tile = dict(BLOCK_Y=(4, 8), BLOCK_X=(4, 8), BLOCK_E=(32, 64), num_warps=(4, 8))
    # One program for a whole row of the output, as one power of two or as several of 32 or 64.
    whole = channels & (channels - 1) == 0 and channels <= 128
    block_n = channels if whole else 64 if channels % 64 == 0 else 32
    chunks = 1 if whole else channels // block_n
    options = [{"form": "split", **config} for config in _product(STRIP=(2, 4), **tile)]
    if half or channels <= 128:
        options += [
            {"form": "tail", "BLOCK_N": block_n, "CHUNKS": chunks, **config}
            for config in _product(STRIP=(2, 4) if whole else (1, 2), **tile)
        ]
    return options


def _patch_embed_pixels(half: bool, sizes: dict[str, int]) -> list[Config]:
    return _product(BLOCK_M=(16, 32, 64, 128), num_warps=(4, 8), num_stages=(2, 3))


def _patch_embed(half: bool, sizes: dict[str, int]) -> list[Config]:
    block = dict(
        BLOCK_M=(64, 128) if half else (32,),
        BLOCK_N=(32, 64, 128) if half else (32,),
        BLOCK_K=(32, 64) if half else (32,),
        num_warps=(4, 8),
        num_stages=(3,) if half else (2,),
    )
    split = {**block, "BLOCK_M": block["BLOCK_M"][:1], "num_warps": (4,)}
    options = [{"form": "split", **config} for config in _product(SPLIT=(2, 4, 8), **split)]
    if sizes["out_channels"] <= 320:
        options += [{"form": "whole_row", **config} for config in _product(**block)]
    return options


def _patch_embed_reduce(half: bool, sizes: dict[str, int]) -> list[Config]:
    return _product(BLOCK_M=(1, 2, 4, 8, 16), num_warps=(2, 4, 8))


def _decode_head(half: bool, sizes: dict[str, int]) -> list[Config]:
    if not half:
        return _product(
            TILE_HEIGHT=(4, 8),
            TILE_WIDTH=(8,),
            BLOCK_D=(16,),
            MAX_CLASSES=(64, 128),
            num_warps=(4, 8),
            num_stages=(2,),
        )
    return _product(
        TILE_HEIGHT=(8,),
        TILE_WIDTH=(8, 16),
        BLOCK_D=(32, 64),
        MAX_CLASSES=(64, 128),
        num_warps=(4, 8),
        num_stages=(2, 3),
    )


def _upsample_argmax(half: bool, sizes: dict[str, int]) -> list[Config]:
    return _product(
        form=("cells", "agree"),
        BLOCK=(64, 128, 256),
        BLOCK_ROWS=(1,),
        LANE_OUTPUTS=(8, 16),
        PREFETCH=(1, 3),
        num_warps=(2, 4),
    )


def _upsample_argmax_gather(half: bool, sizes: dict[str, int]) -> list[Config]:
    return _product(BLOCK=(64, 128, 256), UNROLL=(1, 4, 8), num_warps=(2, 4))


_KERNELS: dict[str, Callable[[bool, dict[str, int]], list[Config]]] = {
    "attention_block": _attention_block,
    "attention_per_head": _attention_per_head,
    "decode_head": _decode_head,
    "decode_head_project": _linear,
    "key_value": _key_value,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "mix_ffn": _mix_ffn,
    "one_head_attention": _one_head_attention,
    "patch_embed": _patch_embed,
    "patch_embed_pixels": _patch_embed_pixels,
    "patch_embed_reduce": _patch_embed_reduce,
    "sr_attention": _sr_attention,
    "sr_key_value": _sr_key_value,
    "sr_partials": _sr_partials,
    "upsample_argmax": _upsample_argmax,
    "upsample_argmax_gather": _upsample_argmax_gather,
}

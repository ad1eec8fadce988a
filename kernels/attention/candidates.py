"""What the tuner tries for the kernels of attention."""

from __future__ import annotations

from ..core.configurations import Candidates, Config, product


def _one_head_attention(half: bool, sizes: dict[str, int]) -> list[Config]:
    if not half:
        return product(BLOCK_M=(16, 32), BLOCK_N=(32, 64), num_warps=(4, 8), num_stages=(1,))
    return product(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3))


def _attention_block(half: bool, sizes: dict[str, int]) -> list[Config]:
    if not half:
        return product(
            BLOCK_M=(16, 32), BLOCK_N=(32,), CHUNK=(32,), num_warps=(4, 8), num_stages=(1,)
        )
    return product(
        BLOCK_M=(64,), BLOCK_N=(32, 64), CHUNK=(32, 64), num_warps=(4, 8), num_stages=(2, 3)
    )


def _attention_per_head(half: bool, sizes: dict[str, int]) -> list[Config]:
    if not half:
        return product(
            BLOCK_M=(16, 32), BLOCK_N=(32,), BLOCK_K=(32,), num_warps=(4, 8), num_stages=(1,)
        )
    return product(
        BLOCK_M=(64,), BLOCK_N=(64, 128), BLOCK_K=(32, 64), num_warps=(4, 8), num_stages=(2, 3)
    )


def _key_value(half: bool, sizes: dict[str, int]) -> list[Config]:
    return product(
        BLOCK_M=(16, 32), BLOCK_N=(32, 64), CHUNK=(32, 64), num_warps=(4, 8), num_stages=(1,)
    )


def _sr_key_value(half: bool, sizes: dict[str, int]) -> list[Config]:
    return product(
        SPLITS=(1, 4, 8, 16, 32),
        BLOCK_M=(16, 64) if half else (16,),
        num_warps=(4,),
        num_stages=(2, 3) if half else (1, 2),
    )


def _sr_partials(half: bool, sizes: dict[str, int]) -> list[Config]:
    return product(
        SPLITS=(1, 2, 4, 8),
        BLOCK_M=(32, 64) if half else (32,),
        BLOCK_N=(32, 64) if half else (32,),
        BLOCK_K=(32, 64) if half else (32,),
        num_warps=(4,),
        num_stages=(3,) if half else (2,),
    )


def _sr_attention(half: bool, sizes: dict[str, int]) -> list[Config]:
    return product(key_value=("one_launch", "split"), attention=("block", "per_head"))


CANDIDATES: dict[str, Candidates] = {
    "one_head_attention": _one_head_attention,
    "attention_block": _attention_block,
    "attention_per_head": _attention_per_head,
    "key_value": _key_value,
    "sr_key_value": _sr_key_value,
    "sr_partials": _sr_partials,
    "sr_attention": _sr_attention,
}

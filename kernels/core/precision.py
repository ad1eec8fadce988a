"""The dtype in which a device computes a model fastest, with labels that hardly differ."""

from __future__ import annotations

import torch

FAST = "fast"  # the name of that dtype in options
# What a CPU has products in bfloat16 by, and the function of torch.cpu that tells.
_PRODUCTS = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}


def fast_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """bfloat16 where the device has products in it, else float32; and why.

    On other CPUs torch emulates bfloat16, and is slower than in float32.
    """
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has products in it"
        return torch.float32, "the GPU has no products in bfloat16"
    if device.type == "cpu":
        for name, asked in _PRODUCTS.items():
            if getattr(torch.cpu, asked, bool)():  # not all versions of torch tell
                return torch.bfloat16, f"the CPU has {name}"
        return torch.float32, "the CPU has neither AMX nor AVX512-BF16"
    return torch.float32, f"nothing is known of {device.type}"

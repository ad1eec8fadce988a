"""The ops that a SegFormer forward is made of, on folded weights: Triton kernels and eager twins.

Installed as `fastseg.kernels`; imports torch, and triton where it is installed.
"""

from .backend import backend, fallbacks, requested_backend, select_backend
from .decode_head import decode_head
from .layer_norm import layer_norm
from .mix_ffn import mix_ffn
from .patch_embed import patch_embed
from .sr_attention import sr_attention
from .upsample_argmax import upsample_argmax

__all__ = [
    "backend",
    "decode_head",
    "fallbacks",
    "layer_norm",
    "mix_ffn",
    "patch_embed",
    "requested_backend",
    "select_backend",
    "sr_attention",
    "upsample_argmax",
]

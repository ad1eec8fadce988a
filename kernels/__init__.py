"""The ops that a SegFormer forward is made of, on folded weights: Triton kernels and eager twins.

Installed as `fastseg.kernels`; imports torch, and triton where it is installed.
"""

from .attention.op import SrAttentionWeights, sr_attention
from .core.dispatch import backend, fallbacks, requested_backend, select_backend
from .embed.op import PatchEmbedWeights, patch_embed
from .ffn.op import MixFfnWeights, mix_ffn
from .head.op import DecodeHeadWeights, decode_head
from .labels.op import upsample_argmax
from .labels.scores import upsample_scores
from .loss.op import upsample_cross_entropy
from .norm.op import layer_norm

__all__ = [
    "DecodeHeadWeights",
    "MixFfnWeights",
    "PatchEmbedWeights",
    "SrAttentionWeights",
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
    "upsample_cross_entropy",
    "upsample_scores",
]

"""`report`: which parts of a model run on folded weights and on kernels, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .decode_head import SegformerDecodeHead
from .encoder import SegformerEncoder
from .kernels import fallbacks, select_backend
from .kernels.decode_head import supports as decode_head_supports
from .kernels.mix_ffn import supports as mix_ffn_supports
from .kernels.patch_embed import supports as patch_embed_supports
from .kernels.sr_attention import supports as sr_attention_supports
from .layers import SegformerLayer, SegformerOverlapPatchEmbeddings
from .packing import plain_reason


def report(model: nn.Module) -> str:
    """One line for each encoder and decode head in `model`: how its next forward would run.

    "plain" is the differentiable path of training; "folded" is the fast one, by Triton kernels or
    by the eager twins of the ops, as a whole or for the ops that are named. Lines at the end tell
    of ops that this process has run eagerly although kernels could run on their device.

    Gradient mode counts as it is now: call it inside `torch.no_grad()` to see what happens there.

    Raises:
        ValueError: there is no SegFormer in `model`.
    """
    lines = []
    for name, part in model.named_modules():
        if isinstance(part, SegformerEncoder | SegformerDecodeHead):
            reason = plain_reason(part)
            path = _folded_path(part) if reason is None else f"plain: {reason}"
            lines.append(f"{name or type(part).__name__}: {path}")
    if not lines:
        raise ValueError(
            f"model: expected one with a SegFormer in it, got a {type(model).__name__}"
        )
    lines += [
        f"so far {op} ran eagerly {count} times: {reason}"
        for (op, reason), count in fallbacks().items()
    ]
    return "\n".join(lines)


def _folded_path(part: nn.Module) -> str:
    try:
        backend, why = select_backend(next(part.parameters()).device)
    except (RuntimeError, ValueError) as error:  # what FASTSEG_BACKEND asks for is not there
        return f"folded, but cannot run: {error}"
    if backend == "eager":
        return f"folded, eager: {why}"
    with torch.no_grad():
        declined = dict.fromkeys(_declined(part))
    return "; ".join(["folded, Triton kernels", *declined])


def _declined(part: nn.Module) -> Iterator[str]:
    """What the ops' kernels would not take of the weights in `part`, whatever the input."""
    for module in part.modules():
        if isinstance(module, SegformerOverlapPatchEmbeddings):
            packed = module.packed()
            weight = packed["weight"]
            tensors = (weight, packed["bias"], packed["norm_weight"], packed["norm_bias"])
            reason = patch_embed_supports(weight.new_empty(1, *weight.shape[1:]), *tensors)
            yield from _named("patch_embed", reason)
        elif isinstance(module, SegformerLayer):
            packed = module.packed()
            ffn, attention = packed["mix_ffn"], packed["attention"]
            tokens = ffn["fc2_bias"].new_empty(1, 1, ffn["fc2_bias"].shape[0])
            reason = sr_attention_supports(tokens, attention["num_heads"])
            yield from _named("sr_attention", reason)
            yield from _named("mix_ffn", mix_ffn_supports(tokens, ffn["fc1_weight"]))
        elif isinstance(module, SegformerDecodeHead):
            packed = module.packed()
            maps = [w.new_empty(1, w.shape[1], 1, 1) for w in packed["weights"]]
            reason = decode_head_supports(feature_maps=maps, **packed)
            yield from _named("decode_head", reason)


def _named(op: str, reason: str | None) -> Iterator[str]:
    if reason is not None:
        yield f"{op} runs eagerly, {reason}"

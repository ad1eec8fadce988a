"""`report`: which parts of a model run on folded weights, and why the others do not."""

from __future__ import annotations

from torch import nn

from .decode_head import SegformerDecodeHead
from .encoder import SegformerEncoder
from .packing import plain_reason


def report(model: nn.Module) -> str:
    """One line for each encoder and decode head in `model`: how its next forward would run.

    Gradient mode counts as it is now: call it inside `torch.no_grad()` to see what happens there.

    Raises:
        ValueError: there is no SegFormer in `model`.
    """
    lines = []
    for name, part in model.named_modules():
        if isinstance(part, SegformerEncoder | SegformerDecodeHead):
            reason = plain_reason(part)
            path = "folded" if reason is None else f"plain: {reason}"
            lines.append(f"{name or type(part).__name__}: {path}")
    if not lines:
        raise ValueError(
            f"model: expected one with a SegFormer in it, got a {type(model).__name__}"
        )
    return "\n".join(lines)

"""Other libraries' models that compute a loss: `accelerate(training=True)` takes it over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fastseg.cuda_graphs.default import Graphed
from fastseg.folding.swap import register_host

from .loss import FastLoss, loss_reason, segmentation_loss


class TakesLoss(FastLoss, Graphed):
    """Mixin of models whose loss is taken over; `restore` gives their class back."""


def with_fast_loss(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, a forward (pixels, labels, ...) as transformers': it is not told of the labels.

    Where torch's operators have to compute the loss it is, and nothing else happens.
    """

    @functools.wraps(method)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels", args[1] if len(args) > 1 else None)
        if labels is None or loss_reason(*args[:1], labels) is not None:
            return method(self, *args, **kwargs)
        if "labels" in kwargs:
            kwargs = {**kwargs, "labels": None}
        else:
            args = (args[0], None, *args[2:])
        output = method(self, *args, **kwargs)
        is_tuple = isinstance(output, tuple)
        logits = output[0] if is_tuple else output.logits
        loss = segmentation_loss(logits, labels, self.config.semantic_loss_ignore_index)
        # Anew, as the loss comes first.
        return (loss, *output) if is_tuple else type(output)(loss=loss, **output)

    return forward


class _LossSwap:
    """What `fastseg.accelerate(training=True)` gives models that compute a loss."""

    name = "loss"
    mixin = TakesLoss
    method = "forward"
    wrap = staticmethod(with_fast_loss)


LOSS_SWAP = _LossSwap()
register_host(LOSS_SWAP)

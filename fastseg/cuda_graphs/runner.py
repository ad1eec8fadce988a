"""`graphed`: any model behind a runner that replays its graphs."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastseg.folding.freshness import Runner
from fastseg.folding.warmup import warmup

from .capture import Capturer
from .graphs import ModelGraphs

# Methods of a module that return it: here they return the runner.
_RETURN_SELF = frozenset(
    ("train", "eval", "to", "cuda", "cpu", "half", "float", "double", "bfloat16", "requires_grad_")
)


class GraphedModel(ModelGraphs, Runner):
    """Runner that calls `model` through captured graphs; `graphed` makes it.

    Attributes and methods of the model are found here too: `config`, `device`, `parameters()`,
    `eval()`, `to()`. Threads may call it at once. Copies and pickles capture for themselves.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_graphs: int = 8,
        copy_outputs: bool = True,
        check_weights: bool = True,
        capturer: Capturer | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got a {type(model).__name__}")
        if not isinstance(max_graphs, int) or max_graphs < 1:
            raise ValueError(f"max_graphs: expected an integer of at least 1, got {max_graphs!r}")
        self._options: dict[str, Any] = {
            "max_graphs": max_graphs,
            "copy_outputs": copy_outputs,
            "check_weights": check_weights,
        }
        super().__init__(model, capturer=capturer, **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these arguments: by a graph where it can, else eagerly."""
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        return self.call(self.model, args, kwargs)

    def warmup(self, shapes: Iterable[Sequence[int]]) -> None:
        """Capture graphs for pixels of these shapes before the first request comes.

        As `fastseg.warmup`, without gradients: with autocast call it inside the block.

        Raises:
            ValueError: as `fastseg.warmup`, or there are more shapes than `max_graphs`.
        """
        shapes = list(shapes)
        if len(shapes) > self._max_graphs:
            raise ValueError(
                f"shapes: expected at most max_graphs={self._max_graphs}, got {len(shapes)}"
            )
        warmup(self, shapes)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if "model" not in self.__dict__:  # a copy in the making
            raise AttributeError(name)
        value = getattr(self.model, name)
        if name not in _RETURN_SELF:
            return value

        @functools.wraps(value)
        def method(*args: Any, **kwargs: Any) -> GraphedModel:
            value(*args, **kwargs)
            return self

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "model" and not name.startswith("_"):
            raise AttributeError(f"{name}: set it in the model itself, as runner.model.{name}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"GraphedModel({self.model!r})"

    def __reduce__(self) -> Any:
        return functools.partial(GraphedModel, **self._options), (self.model,)


def graphed(
    model: nn.Module,
    *,
    max_graphs: int = 8,
    copy_outputs: bool = True,
    check_weights: bool = True,
) -> GraphedModel:
    """`model` behind a runner that replays CUDA graphs, one for each shape of its inputs.

    For any model whose forward does the same on the GPU at each call with inputs of one shape: one
    of another library, a part of one. Accelerated models and fastseg's own replay graphs without
    it, where this has options. The second call with a shape captures its graph, or
    `GraphedModel.warmup` does ahead of time. On a CPU, in training mode, with gradients and
    wherever else no graph can be right, the model runs as it is; `GraphedModel.report()` tells how
    often, and why.

    Args:
        model: stays the same object; nothing in it changes.
        max_graphs: so many are kept; the one that was not used for longest goes first.
        copy_outputs: give tensors of the caller's own. Where False, those that the graph writes:
            the next call overwrites them.
        check_weights: look at each call whether the model is what it was when its graphs were
            captured. Where False, a model that is edited needs `GraphedModel.clear()`.

    Returns:
        a callable with the model's attributes and methods.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `max_graphs` is not a positive integer.
    """
    return GraphedModel(
        model, max_graphs=max_graphs, copy_outputs=copy_outputs, check_weights=check_weights
    )

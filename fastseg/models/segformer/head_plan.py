"""Plan of a decode head: the fused map and the classifier."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from fastseg import kernels
from fastseg.exporting.folded import ExportedPlan
from fastseg.folding.find import find, find_pointwise
from fastseg.folding.fold import Known, Part
from fastseg.kernels import DecodeHeadWeights
from fastseg.kernels.core.weights import Weights
from fastseg.training.head import HeadModules

from .encoder_plan import Maps
from .fold import fold_classifier
from .head_training import training_line, with_gradients


@dataclass(frozen=True)
class HeadHost:
    """A kind of decode head.

    Args:
        name: of the library, for reports; pickles have it too, so it stays.
        roots: the modules that the fused map comes from.
        fold: weights of `kernels.decode_head` without a classifier.
        classifier: path of the 1x1 convolution from the fused map to logits.
        maps: (head, *arguments of forward) -> the stages' maps, finest first.
        called: containers that the host calls, and whose hooks would be left out.
        finish: (head, logits, maps) -> what forward returns.
        takes_pixels: it is a whole model, whose forward takes pixels and not maps.
        projections: pairs (weight, bias) that are applied, with a ReLU, to each map before.
        exports: whether `fastseg.export` takes models with this head.
        matches: whether a module is of this kind, by the names of its parts.
        own: it is fastseg's own, which needs no trial.
        modules: the head by the roles of its modules; None where it has no form with gradients.
    """

    name: str
    roots: Callable[[Any], list[nn.Module]]
    fold: Callable[[Any], DecodeHeadWeights]
    classifier: str
    maps: Callable[..., Maps]
    called: Callable[[Any], list[nn.Module]] = lambda head: []
    finish: Callable[[Any, torch.Tensor, Maps], Any] = lambda head, logits, maps: logits
    takes_pixels: bool = False
    projections: Callable[[Any], list[Any]] | None = None
    exports: bool = False
    method: str = "forward"
    matches: Callable[[nn.Module], bool] = lambda module: False
    own: bool = False
    modules: Callable[[Any], HeadModules] | None = None

    def plan(self, head: nn.Module, refused: Mapping[str, str]) -> HeadPlan:
        """Make the plan of `head`; there are no layers in it to refuse."""
        return HeadPlan(head, self)

    def answer(self, head: nn.Module, plan: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what forward returns."""
        return plan.run(self.maps(head, *args, **kwargs))

    @property
    def with_gradients(self) -> Callable[..., Any] | None:
        """(head, *arguments of forward) -> what forward returns, or HOST; None where there is none.

        It runs in the place of the host's own code, for `accelerate(training=True)`.
        """
        return None if self.modules is None else functools.partial(with_gradients, self)

    def training_line(self, head: Any) -> str:
        """How `head` runs with gradients, for people."""
        return training_line(self, head)


class HeadPlan(ExportedPlan):
    """The neck, all up to the classifier, folded; the classifier folded too, or the host's."""

    def __init__(self, head: nn.Module, host: HeadHost) -> None:
        self.head = head
        self.host = host
        self.neck = Part(head, host.roots(head), self._fold_neck, host.own)
        classifier = find(head, host.classifier)
        roots = [] if classifier is None else [classifier]
        self._weights: DecodeHeadWeights | None = None
        self.classifier = Part(head, roots, self._fold_classifier, host.own)
        self.called = Known(head, host.called(head), host.own)

    def _fold_neck(self) -> Any:
        projections = self.host.projections
        return {
            "weights": self.host.fold(self.head),
            "projections": None if projections is None else projections(self.head),
        }

    def _fold_classifier(self) -> Any:
        return fold_classifier(find_pointwise(self.head, self.host.classifier))

    def is_current(self) -> bool:
        classifier = find(self.head, self.host.classifier)
        now = [*self.host.roots(self.head), *([] if classifier is None else [classifier])]
        now += self.host.called(self.head)
        then = [*self.neck.roots, *self.classifier.roots, *self.called.roots]
        return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))

    def settle(self, any_mode: bool = False, fold: bool = True) -> str | None:
        if reason := self.called.problem(any_mode):
            return f"the container of the classifier {reason}"
        self.neck.settle(any_mode, fold)
        self.classifier.settle(any_mode, fold)
        # Made once, for all calls until something changes.
        self._weights = self._all_weights() if fold and self.neck.reason is None else None
        return self.neck.reason

    def parts(self) -> list[Part]:
        return [self.neck, self.classifier]

    def known(self) -> list[Known]:
        return [*self.parts(), self.called]

    def reasons(self) -> Iterator[tuple[str, str]]:
        if self.classifier.reason is not None:
            yield self.host.classifier, self.classifier.reason

    def weights(self) -> Iterator[tuple[str, Weights]]:
        yield "decode_head", self._weights or self._all_weights()

    def _all_weights(self) -> DecodeHeadWeights:
        neck = self.neck.folded()["weights"]
        if self.classifier.reason is not None:
            return cast(DecodeHeadWeights, neck)
        return DecodeHeadWeights(neck.weights, neck.bias, **self.classifier.folded())

    def folded_head(self) -> DecodeHeadWeights | None:
        """The folded head as exporters take it; None where they cannot."""
        return (self._weights or self._all_weights()) if self.host.exports else None

    def run(self, maps: Maps) -> Any:
        """Return what the host's forward returns for the stages' maps, finest first."""
        inputs = maps
        projections = self.neck.folded()["projections"]
        if projections is not None:
            inputs = [
                F.linear(one.permute(0, 2, 3, 1), weight, bias).relu().permute(0, 3, 1, 2)
                for one, (weight, bias) in zip(maps, projections, strict=True)
            ]
        (logits,) = self.launches.call(self._logits, inputs)
        if self.classifier.reason is not None:
            logits = find(self.head, self.host.classifier)(logits)
        return self.host.finish(self.head, logits, maps)

    def _logits(self, maps: Maps) -> Maps:
        return [kernels.decode_head(maps, self._weights or self._all_weights())]

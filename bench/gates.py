"""Parity gates: how wrong a result is, and how wrong it may be before no figure is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F


class RedGate(Exception):
    """A provider's result is too far from the reference to time it."""


@dataclass(frozen=True)
class Gate:
    """The error of a result may be at most `bound`; `measure` says in words what it is."""

    measure: str
    bound: float
    error: Callable[[torch.Tensor], float]

    def check(self, provider: str, result: torch.Tensor) -> float:
        """The error of `result`; a RedGate where it is above the bound, or not a number."""
        error = self.error(result)
        if not error <= self.bound:
            raise RedGate(f"{provider}: {self.measure} {error:.3g}, at most {self.bound:.3g}")
        return error


FLOAT32_BOUND = 2e-6
GPU_FLOAT32_BOUND = 5e-6  # IEEE products, summed in another order
HALF_BOUND = 1.25  # times the error of transformers in the same dtype


def logits_gate(reference: torch.Tensor, bound: float = FLOAT32_BOUND) -> Gate:
    """For logits against those of a float64 run of transformers' model."""
    measure = "relative RMS error of the logits against float64"
    return Gate(measure, bound, partial(relative_error, reference=reference))


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative RMS error; infinite where the shapes differ."""
    if result.shape != reference.shape:
        return math.inf
    difference = (result.to(reference) - reference).square().sum()
    return (difference / reference.square().sum()).sqrt().item()


LABELS_BOUND = 8 * torch.finfo(torch.float32).eps
# Of label maps from whole networks in float32, whose logits are themselves rounded.
NETWORK_LABELS_BOUND = 1e-5


def labels_gate(logits: torch.Tensor, size: tuple[int, int], bound: float = LABELS_BOUND) -> Gate:
    """For label maps of `logits` (B, K, h, w): only near-ties may be decided otherwise.

    The error is how far the chosen class is below the highest one in float64, at the worst pixel,
    in units of the largest logit. Blending four logits in float32 loses some three roundings on
    either of two classes; the bound is eight. It holds where size / (h, w) is a power of two, for
    which the positions of the pixels are exact.
    """
    wide = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    highest = wide.amax(dim=1)
    largest = logits.abs().max().item()

    def error(labels: torch.Tensor) -> float:
        if labels.shape != highest.shape or labels.dtype != torch.int64:
            return math.inf
        chosen = wide.gather(1, labels.unsqueeze(1)).squeeze(1)
        return (highest - chosen).max().item() / largest

    measure = "shortfall of the chosen class in float64, of the largest logit"
    return Gate(measure, bound, error)


def ends(batch: torch.Tensor) -> torch.Tensor:
    """The first and the last image, or the only one."""
    return batch if len(batch) < 3 else batch[[0, -1]]


def of_ends(gate: Gate) -> Gate:
    """A gate for whole batches from one for their `ends`."""
    return Gate(gate.measure, gate.bound, lambda result: gate.error(ends(result)))

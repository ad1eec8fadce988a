"""Training steps: forward, loss, backward and AdamW, of other libraries' models and of fastseg's.

Loss and all gradients are checked first, without dropout, on a crop of the pixels: how far they are
from those of the plain model in float64. Times and memory are of models as they come, with dropout
and stochastic depth. Each host is measured in a process of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import timing
from ..allocated import most_allocated
from ..gates import FLOAT32_BOUND, HALF_BOUND, Gate
from ..machine import pinned_threads, version
from ..options import Options
from ..providers.training import IGNORED, PROVIDERS, Loss
from ..rows import Row
from ..setting import DTYPES, Setting, draw_pixels
from . import hosts
from .run import Checked, Run, tidy, what_of

_CROP = 128  # the side of what is checked: float64 takes long
_BLOCK = 16  # labels are of squares of this side
# Gradients below this share of the largest are of rounding alone, as a key's bias has.
_ZERO = 1e-6


class Batch(NamedTuple):
    """What a step is fed with."""

    pixels: torch.Tensor  # (B, 3, H, W) float32
    labels: torch.Tensor  # (B, H, W)
    dtype: torch.dtype  # of autocast, or float32

    def crop(self) -> Batch:
        pixels, labels = (one[..., :_CROP, :_CROP] for one in (self.pixels, self.labels))
        return Batch(pixels, labels, self.dtype)

    def loss(self, loss: Loss) -> torch.Tensor:
        kind, half = self.pixels.device.type, self.dtype != torch.float32
        with torch.autocast(kind, self.dtype if half else torch.bfloat16, enabled=half):
            return loss(self.pixels, self.labels)


def draw_batch(setting: Setting, classes: int, device: torch.device) -> Batch:
    """Noise, and labels of which a tenth is ignored."""
    generator = torch.Generator().manual_seed(2)
    height, width = setting.size
    grid = setting.batch, -(-height // _BLOCK), -(-width // _BLOCK)
    labels = torch.randint(0, classes, grid, generator=generator)
    labels = labels.repeat_interleave(_BLOCK, 1).repeat_interleave(_BLOCK, 2)[:, :height, :width]
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORED
    pixels = draw_pixels(setting.size, setting.batch)
    return Batch(pixels.to(device), labels.to(device), DTYPES[setting.dtype])


class Step:
    """A training step of a model."""

    def __init__(self, model: nn.Module, loss: Loss, batch: Batch) -> None:
        self._loss, self._batch = loss, batch
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5)

    def __call__(self, keep_gradients: bool = False) -> None:
        self._batch.loss(self._loss).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=not keep_gradients)

    def peak_mb(self) -> float:
        """Of memory above weights, gradients and the optimizer's state."""
        self(keep_gradients=True)
        return most_allocated(lambda: self(keep_gradients=True), self._batch.pixels.device) / 1e6


def measure(run: Run) -> None:
    """Add the rows of "training"."""
    hosts.each_apart(run, measure_host)


def measure_host(options: Options, host: str) -> tuple[list[Row], list[str], bool]:
    """Rows of `host`, notes, and whether anything is wrong; in this process."""
    run = Run(options)
    with pinned_threads(options.threads, options.device):
        for setting in options.settings:
            what = {**what_of("training", setting), "host": host}
            what["mode"] = f"{options.classes} classes"
            label = f"{host}, training, {setting}, {what['mode']}"
            if run.wants(what, label):
                with run.telling(label, "all"):
                    _measure_case(run, what, host, setting, label)
                tidy(options.device)
    return run.measured, run.notes, run.bad


def _measure_case(run: Run, what: Any, host: str, setting: Setting, label: str) -> None:
    options, (build, providers) = run.options, PROVIDERS[host]
    baseline = next(iter(providers))
    batch = draw_batch(setting, options.classes, options.device)

    def model(dropout: bool) -> Any:
        return build(setting.variant, options.classes, dropout).to(options.device)

    gate = gate_of(model(dropout=False), providers[baseline], batch)
    library = version("segmentation-models-pytorch" if host == "smp" else "transformers")

    def check(name: str) -> Checked:
        found = gradients(*providers[name](model(dropout=False)), batch.crop())
        error = gate.check(name, found)
        step = Step(*providers[name](model(dropout=True)), batch)
        return Checked(step, library, gate, error)

    names = [name for name in providers if name in options.providers or name == baseline]
    checked = run.checked(label, names, check)
    if checked:
        steps: dict[str, Any] = {name: one.function for name, one in checked.items()}
        clock: timing.Clock = timing.wall_clock
        if run.on_gpu:
            clock, what = timing.event_clock(options.device), {**what, "method": "CUDA events"}
        samples = timing.interleave(steps, options.repeats, label, clock)
        checked = {
            name: replace(one, peak_mb=steps[name].peak_mb()) for name, one in checked.items()
        }
        run.add(run.rows(what, samples, checked))


# The gate


def gate_of(plain: Any, baseline: Callable[[Any], tuple[nn.Module, Loss]], batch: Batch) -> Gate:
    """For what `gradients` gives: at most 1.25 times the error of the baseline."""
    crop = batch.crop()
    found = gradients(*baseline(plain), crop)
    wide = crop._replace(pixels=crop.pixels.double(), dtype=torch.float32)
    reference = gradients(*baseline(plain.double()), wide)
    sizes = [1, *(one.numel() for one in in_order(plain))]
    exact = reference.split(sizes)
    largest = max(one.norm() for one in exact[1:])

    def error(result: torch.Tensor) -> float:
        if result.shape != reference.shape:
            return math.inf
        squares = [
            ((one - other).norm() / other.norm()).square()
            for one, other in zip(result.split(sizes), exact, strict=True)
            if other.norm() > _ZERO * largest
        ]
        return torch.stack(squares).mean().sqrt().item()

    measure = f"RMS of the relative errors of loss and gradients against float64, {_CROP}x{_CROP}"
    return Gate(measure, HALF_BOUND * max(error(found), FLOAT32_BOUND), error)


def gradients(model: nn.Module, loss: Loss, batch: Batch) -> torch.Tensor:
    """The loss and all gradients in a row, float64, on the CPU."""
    model.zero_grad()
    value = batch.loss(loss)
    value.backward()

    found = [value.detach(), *(one.grad for one in in_order(model) if one.grad is not None)]
    return torch.cat([one.double().flatten().cpu() for one in found])


def in_order(model: nn.Module) -> list[nn.Parameter]:
    """The parameters by their first values: names and order differ between libraries."""
    return sorted(model.parameters(), key=lambda one: one.detach().flatten()[:4].tolist())

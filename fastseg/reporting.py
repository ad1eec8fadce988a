"""`report`: which parts of a model run on folded weights and on kernels, and why others do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastseg.cuda_graphs.default import CAPTURERS, Graphed
from fastseg.folding.dequantize import Dequantized
from fastseg.folding.swap import Accelerated
from fastseg.kernels import fallbacks, select_backend
from fastseg.kernels.core.registry import OPS
from fastseg.kernels.core.weights import Weights
from fastseg.models.runtime import RuntimeModel
from fastseg.training.loss import FastLoss

_BY_GRADIENTS = ": gradients are on and "


def report(model: nn.Module) -> str:
    """One line for each encoder and decode head in `model`: how its next forward would run.

    "plain" is the differentiable path of training, for other libraries' models "the host's own"
    forward; "folded" is the fast one, by Triton kernels or by the eager twins of the ops, as a
    whole or for the ops that are named. Parts of an accelerated model that stay the host's follow,
    each with the reason. Lines at the end tell of CUDA graphs: how many a model holds, their memory
    and what ran without one, by reason; and of ops that this process has run eagerly although
    kernels could run on their device. Of a model in training mode there are lines on its loss, and
    on its encoder and head with gradients.

    Gradient mode counts as it is now: call it inside `torch.no_grad()` to see what happens there.

    Raises:
        TypeError: `model` is not a module.
        ValueError: nothing in it has a fast path.
    """
    if not hasattr(model, "named_modules"):  # a graphed model has its model's
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, RuntimeModel):
        return model.report()
    lines: list[str] = []
    for name, part in model.named_modules():
        label = name or type(part).__name__
        if isinstance(part, Accelerated):
            lines += _lines(label, part)
        elif "_fastseg_refusal" in part.__dict__:
            lines.append(f"{label}: the host's own: {part.__dict__['_fastseg_refusal']}")
        if isinstance(part, Accelerated) and part.training:  # type: ignore[attr-defined]
            lines += [f"{label}, with gradients: {line}" for line in _training_lines(part)]
        if part.training and isinstance(part, FastLoss):
            lines.append(f"{label}, loss: {part._loss_line()}")
    if not lines:
        raise ValueError(
            "model: expected one with a model of fastseg in it, or one that fastseg.accelerate "
            f"has made fast, got a {type(model).__module__}.{type(model).__name__}; call "
            "fastseg.accelerate(model) first"
        )
    if any(_BY_GRADIENTS in line for line in lines):
        lines.append(
            "gradients are on here: call report in torch.inference_mode() for how it runs there"
        )
    stored = [m._fastseg_stored for m in model.modules() if isinstance(m, Dequantized)]
    lines += [
        f"{n} layers compute with floats of their {kind}" for kind, n in Counter(stored).items()
    ]
    lines += _graph_lines(model)
    lines += [
        f"so far {op} ran eagerly {count} times: {reason}"
        for (op, reason), count in fallbacks().items()
    ]
    return "\n".join(lines)


def _training_lines(part: Any) -> Iterator[str]:
    """How an encoder or a head runs with gradients, where there is a choice."""
    host = part._fastseg_host
    lines = getattr(host, "training_lines", None)
    if lines is not None:
        yield from lines(part) if part._fastseg_training else ()
    elif hasattr(host, "training_line") and (host.own or part._fastseg_training):
        yield host.training_line(part)


def _graph_lines(model: Any) -> Iterator[str]:
    """Lines of CUDA graphs, those that there are and those that there cannot be."""
    covered: set[int] = set()
    for name, module in model.named_modules():
        label = name or type(module).__name__
        inner, parameter = map(id, module.modules()), next(module.parameters(), None)
        if isinstance(module, Graphed):
            covered.update(inner)
            held = module.fastseg_graphs()
            if held is not None:
                yield from (f"{label}: {line}" for line in held.report().splitlines())
            elif not module._fastseg_graphs:
                yield f"{label}: no CUDA graphs, as fastseg.accelerate(graphs=False) says"
        elif (
            isinstance(module, Accelerated)
            and id(module) not in covered
            and parameter is not None
            and parameter.device.type in CAPTURERS
        ):
            yield (
                f"{label}: no CUDA graphs by default, as the modules around it are of other "
                "libraries; fastseg.graphed makes them"
            )


def _lines(label: str, part: Accelerated) -> Iterator[str]:
    """Lines of a module with a plan, and of what runs without it inside."""
    host = part._fastseg_host
    whole, other = (label, "plain") if host.own else (f"{label} ({host.name})", "the host's own")
    reason = part.fastseg_reason()
    if reason is not None:
        yield f"{whole}: {other}: {reason}"
        return
    plan = part.fastseg_state().plan()
    runs_by = plan.runs_by()
    path = _folded_path(part, plan.weights()) if runs_by is None else f"folded, {runs_by}"
    yield f"{whole}: {path}"
    for name, why in plan.reasons():
        yield f"{label}.{name}: {other}: {why}"


def _folded_path(part: Any, weights: Iterator[tuple[str, Weights]]) -> str:
    try:
        backend, why = select_backend(next(part.parameters()).device)
    except (RuntimeError, ValueError) as error:  # what FASTSEG_BACKEND asks for is not there
        return f"folded, but cannot run: {error}"
    if backend == "eager":
        return f"folded, eager: {why}"
    with torch.no_grad():
        declined = dict.fromkeys(
            f"{op} runs eagerly, {reason}"
            for op, of_op in weights
            if (reason := OPS[op].declines(of_op)) is not None
        )
    return "; ".join(["folded, Triton kernels", *declined])

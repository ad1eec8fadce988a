"""`accelerate` and `restore`: other libraries' SegFormers, made fast in place."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from fastseg.cuda_graphs.default import MODEL_SWAP, Graphed, models_around
from fastseg.folding.conditions import kind_of
from fastseg.folding.dequantize import Dequantized, dequantize_layers, first_quantized
from fastseg.folding.swap import Accelerated, Host, Swapped, make_edits_count, swapped_class
from fastseg.models.families import FAMILIES, Family
from fastseg.training.loss import FastLoss
from fastseg.training.swap import LOSS_SWAP, TakesLoss

_log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def accelerate(
    model: Model,
    *,
    strict: bool = False,
    graphs: bool = True,
    training: bool = False,
    dequantize: bool = False,
) -> Model:
    """Make the SegFormer or SegGPT in `model` run on folded weights and fused kernels, in place.

    It recognises, by the names of their modules, the encoders and heads of transformers (4.x and
    5.x), NVlabs/SegFormer and its copies, mmseg 1.x, segmentation_models_pytorch and DAFormer, and
    of transformers' SegGPT, inside of any model; fastseg's own need nothing. Each is tried out on a
    copy with random weights first. What computes something else, has been changed (LoRA, quantised
    layers, hooks) or only looks like a part of one stays as it is: `fastseg.report` tells.

    On CUDA the model then replays a CUDA graph for inputs of a kind that it has seen before: one of
    at most 4, captured at the second call. The outputs are the caller's own. That holds for the
    outermost module around them that is of the same library as they are.

    The object, its modules, parameters, `state_dict` and hooks stay the same; only the class of
    those modules becomes a subclass with the same name. Encoders and heads run fast in eval mode
    where no gradient can be asked for. In training, with gradients, with `output_attentions=True`
    and under torch.fx and torch.jit tracing their own forward runs, bit for bit, but for what
    `training` says. Feature maps come
    in channels-last memory, as from `model.to(memory_format=torch.channels_last)`, and so do logits
    on a CPU, but for those of transformers.

    It may be called again, and before weights are loaded. Copies and pickles of the model are
    accelerated too, so to unpickle one takes fastseg; `restore` it first where that is not wanted.

    Args:
        strict: raise an error where a part stays as it is.
        graphs: replay CUDA graphs. Where False, neither these models nor fastseg's own in `model`
            do; `fastseg.graphs(False)` is a block without.
        training: take over the loss that transformers' SegformerForSemanticSegmentation computes of
            `labels`, in training and in evaluation: the same loss and gradients, but for rounding,
            without resized logits (`fastseg.kernels.upsample_cross_entropy`, which a training loop
            of its own calls itself). With gradients heads of transformers, NVlabs and
            segmentation_models_pytorch then project every stage's map at its own size, and
            transformers' encoder runs on tokens; both keep little. A later call without it gives
            the library's code back.
        dequantize: let linear layers that bitsandbytes or torchao has quantised compute with their
            weights as floats, which are then folded: faster than 8-bit products on a CPU, and
            nearer to the model before it was quantised, in the memory of a model of floats. Their
            quantised weights stay beside: `state_dict` has these, and `restore` gives them back.

    Warns:
        UserWarning: `training`, and no model in `model` computes a loss that can be taken over.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no SegFormer in it, or, with `strict`, a part of one cannot be taken.
            The model is then as it was.
    """
    _check(model)
    options = {"strict": strict, "graphs": graphs, "training": training, "dequantize": dequantize}
    for name, option in options.items():
        if not isinstance(option, bool):
            raise TypeError(f"{name}: expected a bool, got {option!r}")
    dequantized = dequantize_layers(model) if dequantize else []
    make_edits_count(model)
    is_found = False
    refusals: list[str] = []
    changed: list[Any] = []
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        if isinstance(module, Accelerated) and module._fastseg_host.own:
            is_found = True
            continue
        was_fast = isinstance(module, Accelerated)
        if was_fast and module._fastseg_kind != kind_of(module, root_class=False):
            _restore(module)  # its modules were exchanged, or it is a copy
        module.__dict__.pop("_fastseg_refusal", None)
        hosts = _find_hosts(module)
        if not hosts:
            continue
        is_found = True
        if not isinstance(module, Accelerated):
            reasons = _take_first(module, hosts)
            if reasons:
                module.__dict__["_fastseg_refusal"] = reasons[0]
                refusals.append(
                    f"{_label(name, module)} stays with {hosts[0][1].name}: {reasons[0]}"
                )
                continue
            if not was_fast:
                changed.append(module)
        if strict:
            refusals += _open_reasons(name, module)
    refusals += _refuse_strangers(model)
    if not is_found:
        restore(model)
        raise ValueError(
            f"model: expected one with a {' or '.join(f.title for f in FAMILIES.values())} in it, "
            f"got a {type(model).__name__} in which nothing has the names of one"
            + "".join(f"; {refusal}" for refusal in refusals)
        )
    takers, reasons = _loss_takers(model) if training else ([], [])
    if strict:
        refusals += reasons
    if strict and refusals:
        for module in (*changed, *dequantized):
            _restore(module)
        raise ValueError("model: not all of it can be accelerated:\n" + "\n".join(refusals))
    _log.info("%s: %d parts made fast", type(model).__name__, len(changed))
    for refusal in refusals:
        _log.info("%s", refusal)
    _set_training(model, training)
    _set_losses(model, takers)
    _set_graphs(model, graphs)
    for reason in reasons:
        warnings.warn(reason, stacklevel=2)
    return model


def _loss_takers(model: nn.Module) -> tuple[list[nn.Module], list[str]]:
    """The models in `model` whose loss is taken over, and reasons where it is not."""
    found, reasons = [], []
    for name, module in model.named_modules():
        for family in FAMILIES.values():
            if family.computes_loss(module):
                problem = family.loss_problem(module)
                if problem is None:
                    found.append(module)
                else:
                    reasons.append(f"training: the loss of {_label(name, module)} stays: {problem}")
    if not found and not reasons and not any(isinstance(one, FastLoss) for one in model.modules()):
        reasons.append(
            f"training: no loss is taken over, as the forward of {type(model).__name__} computes "
            "none that is known; your loop may call fastseg.kernels.upsample_cross_entropy"
        )
    return found, reasons


def _set_training(model: nn.Module, training: bool) -> None:
    """Let encoders and heads whose host has a form with gradients run it, or not."""
    for module in model.modules():
        if isinstance(module, Accelerated):
            module.__dict__.pop("_fastseg_training", None)
            if training and getattr(module._fastseg_host, "with_gradients", None) is not None:
                module._fastseg_training = True


def _set_losses(model: nn.Module, takers: list[nn.Module]) -> None:
    """Take over the loss of `takers`, and of no other model in `model`."""
    for module in model.modules():
        takes = any(module is one for one in takers)
        if takes == isinstance(module, TakesLoss):
            continue
        if isinstance(module, Swapped) and module._fastseg_class is not None:
            _restore(module)
        if takes:
            module.__class__ = swapped_class(type(module), LOSS_SWAP)


def _set_graphs(model: nn.Module, graphs: bool) -> None:
    """Let the models around accelerated parts replay graphs, or not."""
    parts = [one for one in model.modules() if isinstance(one, Accelerated) and one._fastseg_class]
    outermost = models_around(model, parts)
    for around in outermost:
        if not isinstance(around, Graphed):
            with contextlib.suppress(Exception):  # of the class's own machinery: `report` tells
                around.__class__ = swapped_class(type(around), MODEL_SWAP)
    for module in model.modules():
        if isinstance(module, Graphed):
            module.__dict__.pop("_fastseg_graphs", None)
            inside = isinstance(module, TakesLoss) and all(module is not one for one in outermost)
            if not graphs or inside:
                module._fastseg_graphs = False
                module._drop_graphs()


def _find_hosts(module: nn.Module) -> list[tuple[Family, Host]]:
    """The families and kinds that `module` may be of; none where no family knows it."""
    return [(family, host) for family in FAMILIES.values() for host in family.find_hosts(module)]


def _take_first(module: nn.Module, hosts: list[tuple[Family, Host]]) -> list[str]:
    """Accelerate an encoder or a head as the first of `hosts` that it is; else the reasons."""
    reasons = []
    for family, host in hosts:
        reason = _take(module, family, host)
        if reason is None:
            return []
        reasons.append(reason)
    return reasons


def _take(module: nn.Module, family: Family, host: Host) -> str | None:
    """Accelerate one encoder or head; the reason where it has to stay the host's."""
    refused: Mapping[str, str] = {}
    kind = kind_of(module, root_class=False)
    if "forward" in module.__dict__:
        reason: str | None = "it has a forward of its own"
    else:
        reason = first_quantized(module)
    if reason is None:
        reason, refused = family.try_out(module, host)
    if reason is None:
        try:
            module.__class__ = swapped_class(type(module), host)
        except Exception as error:  # of the class's own machinery, which may be anything
            reason = f"its class cannot be derived from: {type(error).__name__}: {error}"
    if reason is not None:
        return reason
    module.__dict__.update(_fastseg_refused=refused, _fastseg_kind=kind)
    accelerated: Any = module
    # Kinds are those that were tried out, and an export before any forward goes by the reasons.
    accelerated.fastseg_state().plan().settle(any_mode=True)
    return None


def _refuse_strangers(model: nn.Module) -> list[str]:
    """Reasons of modules that look like an encoder or a head, and that no host describes.

    Of modules in one another those of the innermost; `report` finds them there.
    """
    known: set[int] = set()
    for module in model.modules():
        if isinstance(module, Accelerated) or "_fastseg_refusal" in module.__dict__:
            known.update(map(id, module.modules()))
    refusals: list[str] = []
    for name, module in reversed(list(model.named_modules())):
        if known.isdisjoint(map(id, module.modules())):
            title = next((one.title for one in FAMILIES.values() if one.resembles(module)), None)
            if title is not None:
                reason = f"it looks like a part of a {title}, but is not of a library known here"
                module.__dict__["_fastseg_refusal"] = reason
                refusals.insert(0, f"{_label(name, module)}: {reason}")
                known.add(id(module))
    return refusals


def restore(model: Model) -> Model:
    """Undo `accelerate` in `model` and all modules in it.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: another library has changed the class of an accelerated module since.
    """
    _check(model)
    for name, module in model.named_modules():
        if isinstance(module, Swapped) and module._fastseg_class is not None:
            if type(module) is not swapped_class(module._fastseg_class, module._fastseg_host):
                raise RuntimeError(
                    f"{name or type(module).__name__}: expected the class that accelerate gave it, "
                    f"got {type(module).__module__}.{type(module).__name__}; undo that first"
                )
            _restore(module)
        module.__dict__.pop("_fastseg_refusal", None)
    return model


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _restore(module: Any) -> None:
    if isinstance(module, Graphed):
        module._drop_graphs()
    if isinstance(module, Dequantized):
        module.give_back()
    module.__class__ = module._fastseg_class
    for name in [name for name in module.__dict__ if name.startswith("_fastseg_")]:
        del module.__dict__[name]


def _open_reasons(name: str, module: Any) -> list[str]:
    """Reasons why parts of an accelerated module stay the host's, whatever its mode now."""
    plan = module.fastseg_state().plan()
    whole = plan.settle(any_mode=True)
    if whole is not None:
        return [f"{_label(name, module)}: {whole}"]
    return [f"{_label(name, module)}, {part}: {reason}" for part, reason in plan.reasons()]


def _label(name: str, module: nn.Module) -> str:
    return name or type(module).__name__

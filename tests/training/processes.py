"""Two processes of gloo that train a model, against one process with torch's operators.

Both take the same loss: the mean over the labelled pixels of the whole batch, of which each process
has a half, with more or fewer of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastseg
from fastseg.models.segformer import encoder_training
from fastseg.training import head

FORMS = (
    (encoder_training, "patch_embedding"),
    (encoder_training, "attention"),
    (encoder_training, "mix_ffn"),
    (head, "_fused_map"),
    (head, "logits_in_stripes"),
)
HALVES = slice(0, 2), slice(2, 4)


class Case(NamedTuple):
    """How a model is trained in two processes."""

    name: str
    build: Callable[[], nn.Module]  # in training mode, float64
    wrap: Callable[[nn.Module], nn.Module]  # accelerates too
    frozen: bool = True  # statistics of BatchNorm, without which halves are no whole
    micro_batches: int = 1


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (4, 64, 96), generator=generator)
    labels[:, :9] = 255
    labels[0, :40] = 255
    labels[3, :, :7] = 255
    return torch.randn(4, 3, 64, 96, dtype=torch.float64, generator=generator), labels


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.build()
    if case.frozen:
        freeze(model)
    return model


def freeze(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


# Ways to wrap a model.


def data_parallel(model: nn.Module) -> nn.Module:
    """Without a search for parameters that get no gradient: all get one."""
    return DistributedDataParallel(fastseg.accelerate(model, training=True))


def data_parallel_first(model: nn.Module) -> nn.Module:
    return fastseg.accelerate(DistributedDataParallel(model), training=True)


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(fastseg.accelerate(model, training=True))


def sharded_first(model: nn.Module) -> nn.Module:
    return fastseg.accelerate(fully_shard(model), training=True)


PARTS = ("SegformerLayer", "SegformerOverlapPatchEmbeddings", "SegformerDecodeHead")


def sharded_parts(model: nn.Module, names: Sequence[str] = PARTS) -> nn.Module:
    fastseg.accelerate(model, training=True)
    for module in list(model.modules()):
        if type(module).__name__ in names:
            fully_shard(module)
    return fully_shard(model)


def sharded_convolutions(model: nn.Module) -> nn.Module:
    """Modules whose forward the fast forms would not call."""
    return sharded_parts(model, ("Conv2d",))


# What the processes do.


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Calls of the forms for training, small as the maps are."""
    counts = dict.fromkeys((name for _, name in FORMS), 0)
    kept = [(where, name, getattr(where, name)) for where, name in FORMS]
    kept += [(head, "_FEWEST", head._FEWEST)]
    kept += [(encoder_training, "_MAKE_AGAIN_FROM", encoder_training._MAKE_AGAIN_FROM)]

    def count(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for where, name in FORMS:
        setattr(where, name, count(name, getattr(where, name)))
    head._FEWEST = encoder_training._MAKE_AGAIN_FROM = 0
    try:
        yield counts
    finally:
        for where, name, value in kept:
            setattr(where, name, value)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(case: Case, rank: int, steps: int = 3) -> dict[str, Any]:
    """Of a run the gradients of the first step, the weights at its end, the report and counts."""
    model = built(case)
    wrapped = case.wrap(model)
    if case.frozen:
        freeze(model)
    pixels, labels = (one[HALVES[rank]] for one in batch())
    total = (labels != 255).sum()
    torch.distributed.all_reduce(total)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    gradients: dict[str, torch.Tensor] = {}
    with counted() as counts:
        for step in range(steps):
            pieces = [one.chunk(case.micro_batches) for one in (pixels, labels)]
            for index, (some, some_labels) in enumerate(zip(*pieces, strict=True)):
                is_last = index + 1 == case.micro_batches
                with contextlib.nullcontext() if is_last else wrapped.no_sync():
                    loss = wrapped(some, labels=some_labels).loss
                    # Processes' gradients are averaged.
                    share = 2 * (some_labels != 255).sum().double() / total
                    (loss * share).backward()
            if step == 0:
                gradients = {name: whole(one.grad) for name, one in model.named_parameters()}
                gradients = {name: one.clone() for name, one in gradients.items()}
                first = dict(counts)
            optimizer.step()
            optimizer.zero_grad()
    weights = {name: whole(one.detach()) for name, one in model.named_parameters()}
    report = fastseg.report(model)
    return {"gradients": gradients, "weights": weights, "report": report, "counts": first}


def expected(case: Case, steps: int = 3) -> dict[str, Any]:
    """The same of one process that has the whole batch, by torch's operators."""
    model = built(case)
    pixels, labels = batch()
    total = (labels != 255).sum().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    gradients: dict[str, torch.Tensor] = {}
    with fastseg.plain_path():
        for step in range(steps):
            if case.frozen:
                model(pixels, labels=labels).loss.backward()
            else:  # each process has statistics of its own
                for half in HALVES:
                    share = (labels[half] != 255).sum() / total
                    (model(pixels[half], labels=labels[half]).loss * share).backward()
            if step == 0:
                gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
    weights = {name: one.detach() for name, one in model.named_parameters()}
    return {"gradients": gradients, "weights": weights}


def check_equal(found: dict[str, Any], exact: dict[str, Any]) -> None:
    """Gradients to 1e-12 of each; some, as of a key's bias, are 0 but for rounding of what is
    larger. AdamW divides gradients by their size, those of rounding too, by 1e-8 at least: of
    weights that is 1e-10.
    """
    _check_close(found["gradients"], exact["gradients"], 1e-12, 1e-14)
    _check_close(found["weights"], exact["weights"], 1e-10, 0)


def _check_close(
    found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], each: float, of_largest: float
) -> None:
    assert found.keys() == exact.keys()
    largest = max(one.norm() for one in exact.values())
    for name, one in exact.items():
        bound = each * one.norm() + of_largest * largest
        assert (found[name] - one).norm() < bound, name


def _work(rank: int, folder: str, function: Callable[..., Any], cases: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for case in cases:
        found = function(case, rank)
        if rank == 0:
            torch.save(found, Path(folder) / f"{case.name}.pt")
    torch.distributed.destroy_process_group()


def in_two(folder: Path, function: Callable[..., Any], cases: Sequence[Any]) -> dict[str, Any]:
    """What the first of two processes finds by `function(case, rank)`, by the names of `cases`."""
    torch.multiprocessing.spawn(_work, (str(folder), function, list(cases)), nprocs=2)
    return {case.name: torch.load(folder / f"{case.name}.pt") for case in cases}

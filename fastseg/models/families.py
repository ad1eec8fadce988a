"""The families: a record of each, for whatever loads, makes fast, lists or describes models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastseg.folding.swap import Host

from .base import PreTrainedModel
from .segformer import modeling
from .segformer.hosts.encoders import find_encoders, resembles_encoder
from .segformer.hosts.heads import find_heads, resembles_head
from .segformer.hosts.losses import computes_loss, loss_problem
from .segformer.presets import PRESETS, from_preset
from .segformer.trial import try_out
from .seggpt import hosts as seggpt_hosts
from .seggpt.modeling import SegGptForImageSegmentation, SegGptModel
from .seggpt.trial import try_out as try_out_seggpt

TryOut = Callable[[nn.Module, Any], tuple[str | None, Mapping[str, str]]]


@dataclass(frozen=True)
class Family:
    """A family of models: its classes, and how models of other libraries are recognised.

    Args:
        title: as people write it.
        models: its classes, of one `config_class` and with the same `checkpoint_names`: the first
            is what a checkpoint is taken for that does not say, the last the encoder alone.
        find_hosts: each `Host` that a module of another library may be of, by the names in it: the
            first whose trial it passes is taken.
        resembles: whether a module looks like a part of the family, so that one of no known host is
            not left out in silence.
        try_out: (module, host) -> the reason why the module computes something else than its names
            say, or None, and reasons of layers in it that do, by their names.
        computes_loss: whether a module of another library has a forward that computes the loss of a
            segmentation.
        loss_problem: why that loss cannot be taken over, or None.
        presets: names that `from_preset` takes.
        from_preset: (name, arguments) -> a new model.
    """

    title: str
    models: Sequence[type[PreTrainedModel]]
    find_hosts: Callable[[nn.Module], Sequence[Host]] = lambda module: ()
    resembles: Callable[[nn.Module], bool] = lambda module: False
    try_out: TryOut = lambda module, host: (None, {})
    computes_loss: Callable[[nn.Module], bool] = lambda module: False
    loss_problem: Callable[[nn.Module], str | None] = lambda module: None
    presets: Sequence[str] = ()
    from_preset: Callable[..., PreTrainedModel] | None = None

    @property
    def model_type(self) -> str:
        """The family's name in config.json."""
        return str(self.models[0].config_class.model_type)


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make `family` known.

    Raises:
        ValueError: there is one of its `model_type`, or a preset of one of its names.
    """
    if family.model_type in FAMILIES:
        raise ValueError(f"family: there is one of model_type {family.model_type!r} already")
    for name in family.presets:
        if any(name in other.presets for other in FAMILIES.values()):
            raise ValueError(f"family: there is a preset {name!r} already")
    FAMILIES[family.model_type] = family


register_family(
    Family(
        title="SegFormer",
        models=(
            modeling.SegformerForSemanticSegmentation,
            modeling.SegformerForImageClassification,
            modeling.SegformerModel,
        ),
        find_hosts=lambda module: [*find_encoders(module), *find_heads(module)],
        resembles=lambda module: resembles_encoder(module) or resembles_head(module),
        try_out=try_out,
        computes_loss=computes_loss,
        loss_problem=loss_problem,
        presets=PRESETS,
        from_preset=from_preset,
    )
)
register_family(
    Family(
        title="SegGPT",
        models=(SegGptForImageSegmentation, SegGptModel),
        find_hosts=seggpt_hosts.find_hosts,
        resembles=seggpt_hosts.resembles,
        try_out=try_out_seggpt,
    )
)

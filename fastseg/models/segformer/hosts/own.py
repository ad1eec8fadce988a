"""fastseg's own encoder and decode head, as hosts: they need no trial, and `accelerate` no look."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from fastseg.folding.swap import HOST

from ..encoder_plan import EncoderHost, RunStages
from ..encoder_training import training_lines, with_gradients
from ..head_plan import HeadHost
from .encoders import lists_of_stages
from .heads import children, fold_transformers, transformers_modules
from .names import TRANSFORMERS_EMBED, TRANSFORMERS_OLD


def _encoder(
    encoder: Any,
    run: RunStages,
    pixel_values: torch.Tensor,
    output_attentions: bool = False,
    pixel_scale: torch.Tensor | None = None,
    pixel_offset: torch.Tensor | None = None,
) -> Any:
    if output_attentions:
        return HOST
    encoder.check(pixel_values, pixel_scale)
    return tuple(run(pixel_values, pixel_scale=pixel_scale, pixel_offset=pixel_offset)), ()


def _checkpoint(encoder: Any, layer: Any, number: int) -> Any:
    checkpointing = encoder.gradient_checkpointing if encoder.training else None
    return None if checkpointing is None else functools.partial(checkpointing.run, number)


# Module names are those of transformers' files, which its older versions have in memory too.
ENCODER = EncoderHost(
    name="fastseg",
    method="forward",
    layer=replace(
        TRANSFORMERS_OLD,
        activation="mlp.hidden_act",
        mixes_channels="attention.self.mixes_channels",
    ),
    embed=TRANSFORMERS_EMBED,
    stages=lists_of_stages,
    forward=_encoder,
    own=True,
    with_gradients=with_gradients,
    training_lines=training_lines,
    trains="fastseg.models.",
    checkpoint=_checkpoint,
)
HEAD = HeadHost(
    name="fastseg",
    roots=lambda head: children(head, "classifier"),
    fold=fold_transformers,
    classifier="classifier",
    maps=lambda head, encoder_hidden_states: head.check(encoder_hidden_states),
    exports=True,
    modules=transformers_modules,
    own=True,
)

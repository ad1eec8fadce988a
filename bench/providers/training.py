"""Training steps: models as their libraries' users train them, and by fastseg.

A provider takes a plain model of its library, in training mode, and gives the model that is trained
and its loss of pixels and labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastseg

from ..setting import draw_weights, preset

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
IGNORED = 255


# Plain models. Without dropout they are the same in each step, and in each dtype.


def transformers_model(variant: str, classes: int, dropout: bool = True) -> Any:
    import transformers

    fields = ("depths", "hidden_sizes", "decoder_hidden_size")
    options: dict[str, Any] = {name: getattr(preset(variant), name) for name in fields}
    if not dropout:
        options |= {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
    options["num_labels"] = classes
    config = transformers.SegformerConfig(**options)
    model = transformers.SegformerForSemanticSegmentation(config)
    draw_weights(model)
    return model.train()


def smp_model(variant: str, classes: int, dropout: bool = True) -> Any:
    import segmentation_models_pytorch as smp

    width = preset(variant).decoder_hidden_size
    options = {"decoder_segmentation_channels": width, "classes": classes}
    model = smp.Segformer(f"mit_{variant}", encoder_weights=None, **options)
    draw_weights(model)
    if not dropout:
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
    return model.train()


# Providers


def _with_labels(model: Any) -> tuple[nn.Module, Loss]:
    return model, lambda pixels, labels: model(pixel_values=pixels, labels=labels).loss


def _checkpointing(model: Any) -> tuple[nn.Module, Loss]:
    model.gradient_checkpointing_enable()
    return _with_labels(model)


def _compiled(model: Any) -> tuple[nn.Module, Loss]:
    with torch.no_grad():  # sets hooks under a lock, which cannot be traced
        model.eval()(torch.zeros(1, 3, 64, 64, device=model.device))
    return _with_labels(torch.compile(model.train(), dynamic=False))


def _accelerated(model: Any) -> tuple[nn.Module, Loss]:
    return _with_labels(fastseg.accelerate(model, training=True))


def _own(model: Any) -> tuple[nn.Module, Loss]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        own = fastseg.from_pretrained(folder)
    return _with_labels(own.to(model.device).train())


def _smp(model: Any) -> tuple[nn.Module, Loss]:
    return model, lambda pixels, labels: F.cross_entropy(
        model(pixels), labels, ignore_index=IGNORED
    )


def _smp_accelerated(model: Any) -> tuple[nn.Module, Loss]:
    """As a loop of its users is written with fastseg: the loss is given logits as they are."""
    model.segmentation_head[1] = nn.Identity()  # which resizes them, with aligned corners
    fastseg.accelerate(model, training=True)
    return model, lambda pixels, labels: fastseg.kernels.upsample_cross_entropy(
        model(pixels), labels, ignore_index=IGNORED, align_corners=True
    )


Provider = Callable[[Any], tuple[nn.Module, Loss]]
ACCELERATED, OWN = "fastseg accelerate", "fastseg"
# By host, of options.TRAINING_HOSTS: its plain model and its providers, the baseline first.
PROVIDERS: dict[str, tuple[Callable[..., Any], dict[str, Provider]]] = {
    "transformers 5": (
        transformers_model,
        {
            "transformers eager": _with_labels,
            "transformers checkpointing": _checkpointing,
            "transformers compiled": _compiled,
            ACCELERATED: _accelerated,
            OWN: _own,
        },
    ),
    "smp": (smp_model, {"smp": _smp, ACCELERATED: _smp_accelerated}),
}

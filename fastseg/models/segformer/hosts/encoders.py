"""Encoders of other libraries: how each is recognised, and its forward on folded stages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from fastseg.folding.find import find
from fastseg.folding.swap import HOST, register_host

from ..encoder_plan import EncoderHost, RunStages, Stage
from ..encoder_training import training_lines, with_gradients
from .names import (
    MMSEG,
    MMSEG_EMBED,
    NVLABS,
    NVLABS_EMBED,
    NVLABS_HEAD,
    PVT_V2,
    SMP,
    SMP_EMBED,
    TIMM,
    TIMM_EMBED,
    TRANSFORMERS_EMBED,
    TRANSFORMERS_NEW,
    TRANSFORMERS_OLD,
    LayerNames,
)


def has(module: nn.Module, *paths: str) -> bool:
    return all(find(module, path) is not None for path in paths)


def _is_layers(layers: Any, *paths: str) -> bool:
    """Return whether there are layers, and the first has what `paths` name."""
    return (
        isinstance(layers, nn.ModuleList | nn.Sequential)
        and len(layers) > 0
        and has(layers[0], *paths)
    )


# -- transformers from 5.9: the unit is the stage, whose outputs the library collects by hooks ----


def _is_transformers_stage(module: nn.Module) -> bool:
    return has(module, "patch_embeddings.proj", "layer_norm") and _is_layers(
        find(module, "blocks"), "layernorm_before", "attention.q_proj", "mlp.dwconv"
    )


def _transformers_stage(
    stage: Any, run: RunStages, hidden_states: torch.Tensor, **kwargs: Any
) -> Any:
    # The option may come as an argument or from the configuration.
    config = find(stage, "blocks.0.attention.config")
    attentions = kwargs.get("output_attentions") or getattr(config, "output_attentions", False)
    if attentions or kwargs.get("attention_mask") is not None:
        return HOST
    (feature_map,) = run(hidden_states)
    return feature_map if stage.reshape else feature_map.flatten(2).transpose(1, 2)


def _checkpoint(encoder: Any, layer: Any, number: int) -> Any:
    is_on = getattr(layer, "gradient_checkpointing", False) and layer.training
    return layer._gradient_checkpointing_func if is_on else None


_TRAINS: dict[str, Any] = {
    "with_gradients": with_gradients,
    "training_lines": training_lines,
    "trains": "transformers.models.segformer.",
    "checkpoint": _checkpoint,
}


# -- transformers 4.x and 5.0 to 5.8 ---------------------------------------------------------------


def lists_of_stages(encoder: Any) -> list[Stage]:
    """Stages of an encoder that has its embeddings, layers and norms in three lists."""
    lists = (encoder.patch_embeddings, encoder.block, encoder.layer_norm)
    return [Stage(*parts) for parts in zip(*lists, strict=True)]


def _is_transformers_encoder(module: nn.Module) -> bool:
    blocks = find(module, "block")
    return (
        has(module, "patch_embeddings.0.proj", "layer_norm.0", "config")
        and isinstance(blocks, nn.ModuleList)
        and len(blocks) > 0
        and all(_is_layers(block, "layer_norm_1", "attention.self.query") for block in blocks)
    )


def _transformers_encoder(
    encoder: Any,
    run: RunStages,
    pixel_values: torch.Tensor,
    output_attentions: bool | None = False,
    output_hidden_states: bool | None = False,
    return_dict: bool | None = True,
) -> Any:
    if output_attentions:
        return HOST
    maps = tuple(run(pixel_values))
    if not getattr(encoder.config, "reshape_last_stage", True):  # GLPN and PVT v2 always do
        maps = (*maps[:-1], maps[-1].flatten(2).transpose(1, 2))
    hidden_states = maps if output_hidden_states else None
    if not return_dict:
        return (maps[-1],) if hidden_states is None else (maps[-1], hidden_states)
    output_class = sys.modules[type(encoder).__module__].BaseModelOutput
    return output_class(last_hidden_state=maps[-1], hidden_states=hidden_states, attentions=None)


# -- transformers' PVT v2: another order of the same parts -----------------------------------------


def _is_pvt_v2(module: nn.Module) -> bool:
    return has(module, "config") and _is_layers(
        find(module, "layers"), "patch_embedding.proj", "layer_norm", "blocks.0.attention.query"
    )


def _pvt_v2_stages(encoder: Any) -> list[Stage]:
    return [
        Stage(stage.patch_embedding, stage.blocks, stage.layer_norm, (stage,))
        for stage in encoder.layers
    ]


# -- NVlabs, and segmentation_models_pytorch, whose layers work on maps ----------------------------


def _is_nvlabs_tree(module: nn.Module) -> bool:
    return all(
        has(module, f"patch_embed{stage}.proj", f"patch_embed{stage}.norm", f"norm{stage}")
        and _is_layers(find(module, f"block{stage}"), "norm1", "attn.q", "attn.kv", "mlp.dwconv")
        for stage in range(1, 5)
    )


def _is_smp(module: nn.Module) -> bool:
    return (
        _is_nvlabs_tree(module) and hasattr(module, "_depth") and hasattr(module, "_out_channels")
    )


def _nvlabs_host(method: str, layer: LayerNames, container: Callable[..., Any]) -> EncoderHost:
    """The host of NVlabs' own code, and those of its many copies.

    Args:
        method: what gives the maps; where it is forward, there is no forward_features.
        container: what the maps come in, a list or a tuple.
    """

    def matches(module: nn.Module) -> bool:
        return (
            _is_nvlabs_tree(module)
            and not hasattr(module, "_depth")
            and hasattr(module, "forward_features") == (method == "forward_features")
            and has(module, f"block1.0.{layer.num_heads}")
        )

    of_a_copy = f", {method} to a {container.__name__}, {layer.num_heads}"
    is_original = (method, layer, container) == ("forward_features", NVLABS, list)
    return EncoderHost(
        name="NVlabs" + ("" if is_original else of_a_copy),
        method=method,
        layer=layer,
        embed=NVLABS_EMBED,
        stages=_nvlabs_stages,
        forward=lambda encoder, run, x: container(run(x)),
        matches=matches,
    )


def _nvlabs_stages(encoder: Any) -> list[Stage]:
    return [
        Stage(
            getattr(encoder, f"patch_embed{stage}"),
            getattr(encoder, f"block{stage}"),
            getattr(encoder, f"norm{stage}"),
            (getattr(encoder, f"block{stage}"),),
        )
        for stage in range(1, 5)
    ]


def _smp(encoder: Any, run: RunStages, x: torch.Tensor) -> Any:
    batch, _, height, width = x.shape
    # Its features count from the input, and the second one is empty.
    features = [x, x.new_empty(batch, 0, height // 2, width // 2)]
    return features + run(x, max(encoder._depth - 1, 0))


# -- timm's PVT v2, by the stage, which is what its features_only models and smp call -------------


def _is_timm_stage(module: nn.Module) -> bool:
    return (
        hasattr(module, "downsample")
        and has(module, "norm")
        and _is_layers(find(module, "blocks"), "norm1", "attn.q", "attn.kv", "mlp.dwconv")
    )


# -- open-mmlab's mmseg ----------------------------------------------------------------------------


def _is_mmseg(module: nn.Module) -> bool:
    stages = find(module, "layers")
    return (
        isinstance(stages, nn.ModuleList)
        and len(stages) > 0
        and hasattr(module, "out_indices")
        and all(
            isinstance(stage, nn.ModuleList)
            and len(stage) == 3
            and has(stage[0], "projection", "norm")
            and _is_layers(stage[1], "norm1", "attn.attn", "ffn.layers.4")
            for stage in stages
        )
    )


def _mmseg(encoder: Any, run: RunStages, x: torch.Tensor) -> Any:
    maps = run(x)
    return [maps[stage] for stage in range(len(maps)) if stage in encoder.out_indices]


ENCODERS: Sequence[EncoderHost] = (
    EncoderHost(
        name="transformers, 5.9 or later",
        method="forward",
        layer=TRANSFORMERS_NEW,
        embed=TRANSFORMERS_EMBED,
        stages=lambda stage: [Stage(stage.patch_embeddings, stage.blocks, stage.layer_norm)],
        forward=_transformers_stage,
        **_TRAINS,
        matches=_is_transformers_stage,
    ),
    EncoderHost(
        name="transformers before 5.9",
        method="forward",
        layer=TRANSFORMERS_OLD,
        embed=TRANSFORMERS_EMBED,
        stages=lists_of_stages,
        forward=_transformers_encoder,
        **_TRAINS,
        matches=_is_transformers_encoder,
    ),
    EncoderHost(
        name="transformers, PVT v2",
        method="forward",
        layer=PVT_V2,
        embed=TRANSFORMERS_EMBED,
        stages=_pvt_v2_stages,
        forward=_transformers_encoder,
        matches=_is_pvt_v2,
    ),
    EncoderHost(
        name="segmentation_models_pytorch",
        method="forward",
        layer=SMP,
        embed=SMP_EMBED,
        stages=_nvlabs_stages,
        forward=_smp,
        matches=_is_smp,
    ),
    *(
        _nvlabs_host(*kind)
        for kind in product(("forward_features", "forward"), (NVLABS, NVLABS_HEAD), (list, tuple))
    ),
    EncoderHost(
        name="timm, PVT v2",
        method="forward",
        layer=TIMM,
        embed=TIMM_EMBED,
        stages=lambda stage: [Stage(stage.downsample, stage.blocks, stage.norm)],
        forward=lambda stage, run, x: run(x)[0],
        matches=_is_timm_stage,
    ),
    EncoderHost(
        name="mmseg",
        method="forward",
        layer=MMSEG,
        embed=MMSEG_EMBED,
        stages=lambda encoder: [Stage(*stage) for stage in encoder.layers],
        forward=_mmseg,
        matches=_is_mmseg,
    ),
)
for _host in ENCODERS:
    register_host(_host)


def find_encoders(module: nn.Module) -> list[EncoderHost]:
    """The kinds of encoder that `module` may be by its names; none for no known one."""
    return [host for host in ENCODERS if host.matches(module)]


def resembles_encoder(module: nn.Module) -> bool:
    """Return whether there are patch embeddings, attention and a depthwise convolution in it."""
    inner = [(name.rpartition(".")[2], one) for name, one in module.named_modules() if name]
    return (
        any("patch_embed" in name or "PatchEmbed" in type(one).__name__ for name, one in inner)
        and any(name.startswith("att") for name, one in inner)
        and any(
            isinstance(one, nn.Conv2d) and one.groups == len(one.weight) > 1 for _, one in inner
        )
    )

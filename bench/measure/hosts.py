"""Models of other libraries before and after `fastseg.accelerate`, eager and under torch.compile.

Each host is measured in a process of its own, which has the folder of its library first on its
path. Weights are drawn the same way everywhere, 150 classes.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import nn

import fastseg
from fastseg.folding.swap import Accelerated
from fastseg.models.segformer.names.keras import KERAS_CV_FIELDS

from ..gates import logits_gate
from ..machine import ROOT, pinned_threads, version
from ..options import Options
from ..rows import Row
from ..setting import CLASSES, Setting, context, draw_pixels, draw_weights, preset
from .run import Checked, Run, tidy, what_of


@dataclass(frozen=True)
class Host:
    """Models of one library."""

    library: str  # the distribution; "" where the code is in this repository
    folder: str  # in .venv, to be first on the path of the process; "" for none
    build: Callable[[str], nn.Module]  # from a variant to its plain model
    own: Callable[[Any], nn.Module] | None = None  # to fastseg's own model with its weights
    accelerate: Callable[[Any], Any] | None = None  # in the place of fastseg.accelerate


def measure(run: Run) -> None:
    """Start a process for each host, and add its rows."""
    each_apart(run, measure_host)


def each_apart(
    run: Run, measure_one: Callable[[Options, str], tuple[list[Row], list[str], bool]]
) -> None:
    """Call `measure_one` in a process for each host that is wanted."""
    spawn = multiprocessing.get_context("spawn")
    for host in run.options.hosts:
        folder = ROOT / ".venv" / HOSTS[host].folder
        if HOSTS[host].folder and not folder.is_dir():
            run.say(f"{host}: not measured, no {folder}: `make test` installs it", bad=True)
            continue
        path = [str(folder)] if HOSTS[host].folder else []
        with run.telling(host, "its process"):
            with ProcessPoolExecutor(1, spawn, _start, (path,)) as process:
                options = copy.copy(run.options)
                options.minutes = run.minutes_left
                rows, notes, bad = process.submit(measure_one, options, host).result()
            run.measured += rows  # which it has added to the file
            run.notes += notes
            run.bad |= bad


def _start(path: list[str]) -> None:
    sys.path[:0] = path
    os.environ["HF_HUB_OFFLINE"] = "1"


def measure_host(options: Options, host: str) -> tuple[list[Row], list[str], bool]:
    """Rows of `host`, notes, and whether anything is wrong; in this process."""
    run = Run(options)
    with pinned_threads(options.threads, options.device), torch.no_grad():
        for setting, mode in product(options.settings, options.modes):
            what = {**what_of("host", setting), "host": host, "mode": mode}
            label = f"{host}, {setting}, {mode}"
            if run.wants(what, label):
                with run.telling(label, "accelerated"):
                    run.time(what, _checked(HOSTS[host], setting, mode), label)
                tidy(options.device)
    return run.measured, run.notes, run.bad


def _checked(host: Host, setting: Setting, mode: str) -> dict[str, Checked]:
    pixel_values = draw_pixels(setting.size)
    plain = host.build(setting.variant).requires_grad_(False)
    accelerated = (host.accelerate or fastseg.accelerate)(copy.deepcopy(plain))
    models = {"host": plain, "accelerated": accelerated}
    if host.own is not None:
        models["own"] = host.own(plain).requires_grad_(False)
    library = version(host.library) if host.library else ""
    found = {}
    with torch.inference_mode():
        wide = copy.deepcopy(plain).double()
        gate = logits_gate(logits_of(wide, pixel_values.double()).clone())
        for name, model in models.items():
            forward = _forward(model, mode, pixel_values)
            found[name] = Checked(forward, library, gate, gate.check(name, forward()))
    if mode == "eager":  # in a graph it is an operator among others
        check = freshness_check(accelerated)
        found["check"] = replace(found["accelerated"], function=check)
    return found


def _forward(model: Any, mode: str, pixel_values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A forward of `model`, whose weights are frozen, as one does to serve it."""
    logits_of(model, pixel_values)  # folds, before a graph takes the folded weights
    if mode == "compiled":
        model = torch.compile(model, dynamic=False)
    return lambda: logits_of(model, pixel_values)


def freshness_check(model: nn.Module) -> Callable[[], list[str | None]]:
    """What all accelerated modules do before they run on folded weights: None of each, if fresh."""
    modules = [module for module in model.modules() if isinstance(module, Accelerated)]
    return lambda: [module.fastseg_reason() for module in modules]


def logits_of(model: Callable[..., Any], pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of a forward, whatever it answers with; a depth or a map, of models without."""
    output = model(pixel_values)
    return output if isinstance(output, torch.Tensor) else output[0]


# Builders


def _transformers(variant: str) -> nn.Module:
    with context(Setting(variant, (64, 64), 1, "float32"), torch.device("cpu"), 1) as where:
        return where.transformers()


def _own(model: Any) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return fastseg.from_pretrained(folder).eval()


def _smp(variant: str) -> nn.Module:
    """Its head is another one: no bias in the projections."""
    import segmentation_models_pytorch as smp

    width = preset(variant).decoder_hidden_size
    options = {"decoder_segmentation_channels": width, "classes": CLASSES}
    model = smp.Segformer(f"mit_{variant}", encoder_weights=None, **options)
    draw_weights(model)
    return model.eval()


def _nvlabs(variant: str) -> nn.Module:
    from tests.models.hosts import nvlabs

    known = preset(variant)
    widths, heads = known.hidden_sizes, known.num_attention_heads
    layers = {"depths": known.depths, "sr_ratios": known.sr_ratios}
    backbone = nvlabs.MixVisionTransformer(widths, heads, **layers)
    head = nvlabs.SegFormerHead(widths, known.decoder_hidden_size, CLASSES)
    model = nvlabs.EncoderDecoder(backbone, head)
    draw_weights(model)
    return model.eval()


class _PlainPath(nn.Module):
    """A model of fastseg on its plain path."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with fastseg.plain_path():
            return logits_of(self.model, pixel_values)


def _keras_cv(variant: str) -> nn.Module:
    """Its network in fastseg's own modules, with KerasCV's width of the decode head."""
    sizes = {"num_classes": CLASSES, "projection_filters": 256}
    model = fastseg.from_preset(f"segformer_{variant}", **sizes, **KERAS_CV_FIELDS)
    draw_weights(model)
    return _PlainPath(model).eval()


def _glpn(variant: str) -> nn.Module:
    import transformers

    config = transformers.GLPNConfig(**_sizes(variant))
    model = transformers.GLPNForDepthEstimation(config)
    draw_weights(model)
    return model.eval()


def _pvt_v2(variant: str) -> nn.Module:
    """The model without a head; in the sizes of SegFormers but for its wider Mix-FFN."""
    import transformers

    ratios = [4, 4, 4, 4] if variant == "b5" else [8, 8, 4, 4]
    config = transformers.PvtV2Config(mlp_ratios=ratios, **_sizes(variant))
    model = transformers.PvtV2Model(config)
    draw_weights(model)
    return model.eval()


def _timm_pvt_v2(variant: str) -> nn.Module:
    import timm

    model = timm.create_model(f"pvt_v2_{variant}")
    draw_weights(model)
    return model.eval()


def _sizes(variant: str) -> dict[str, Any]:
    known = preset(variant)
    return {
        "depths": list(known.depths),
        "hidden_sizes": list(known.hidden_sizes),
        "num_attention_heads": list(known.num_attention_heads),
    }


# By the names in options.HOSTS.
HOSTS = {
    "transformers 5": Host("transformers", "", _transformers, _own),
    "transformers 4": Host("transformers", "transformers4", _transformers, _own),
    "smp": Host("segmentation-models-pytorch", "smp", _smp),
    "NVlabs structure": Host("", "", _nvlabs),
    "KerasCV structure": Host("", "", _keras_cv, accelerate=lambda plain: plain.model),
    "transformers GLPN": Host("transformers", "", _glpn),
    "transformers PVT v2": Host("transformers", "", _pvt_v2),
    "timm PVT v2": Host("timm", "smp", _timm_pvt_v2),
}

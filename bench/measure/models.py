"""Forwards, and the way from 8-bit images to label maps, of every provider."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

import fastseg
from fastseg.demo.scenes import draw_scene

from .. import gates, timing
from ..gates import Gate
from ..providers import PROVIDERS, Forward
from ..setting import Context, Setting, SkippedCase, context, first_line
from ..work import forward_work
from .run import Checked, Run, tidy, what_of

Steps = Sequence[Callable[[Any], Any]]  # "pre", "forward" and "post"


def measure(run: Run) -> None:
    """Add the rows of "forward" and "end to end"."""
    if run.options.list:
        list_providers(run)
        return
    for setting in run.options.settings:
        wanted = [
            kind
            for kind in ("forward", "end to end")
            if kind in run.options.kinds and run.wants(what_of(kind, setting), f"{kind}, {setting}")
        ]
        try:
            if wanted:
                _measure_setting(run, setting, wanted)
        except torch.OutOfMemoryError as error:
            run.say(f"{setting}: skipped, {first_line(error)}")
        tidy(run.options.device)  # only now has the setting let go of its models


def list_providers(run: Run) -> None:
    """Print which providers give the right logits of a B0 at 64x64 here; notes tell why not."""
    setting = Setting("b0", (64, 64), 1, run.options.settings[0].dtype)
    with context(setting, run.options.device, 1) as where:
        built = _build_all(run, where)
    for name in PROVIDERS:
        if name in built:
            print(f"{name}: {built[name].version}")
        elif name not in run.options.providers:
            print(f"{name}: only where --providers names it")


def _measure_setting(run: Run, setting: Setting, wanted: Sequence[str]) -> None:
    run.ceilings(setting.dtype)  # first, while there is memory for large matrices
    with context(setting, run.options.device, run.options.threads) as where:
        built = _build_all(run, where)
        if built and "forward" in wanted:
            on_pixels = {
                name: replace(one, function=functools.partial(one.function, where.pixel_values))
                for name, one in built.items()
            }
            what, works = what_of("forward", setting), forward_work(*setting)
            run.time(what, on_pixels, str(setting), works)
        if built and "end to end" in wanted:
            _time_pipelines(run, where, built)


# Providers


def _build_all(run: Run, where: Context) -> dict[str, Checked]:
    """The providers whose logits are right, in order."""
    gate_of = logits_gates(where)
    names = run.options.providers
    return run.checked(str(where.setting), names, lambda name: build(name, where, gate_of))


def logits_gates(where: Context) -> Callable[[Forward], Gate]:
    """From a forward to the gate of its logits; of a batch the first and the last image count.

    In half precision the measure is what transformers' model makes of that dtype.
    """
    pixel_values = gates.ends(where.pixel_values)
    reference = logits_of(where.transformers(torch.float64), pixel_values.double())

    @functools.cache
    def bound(dtype: torch.dtype) -> float:
        if dtype == torch.float32:
            return gates.GPU_FLOAT32_BOUND if where.device.type == "cuda" else gates.FLOAT32_BOUND
        logits = logits_of(where.transformers(dtype), pixel_values.to(dtype))
        return gates.HALF_BOUND * gates.relative_error(logits, reference)

    def gate(forward: Forward) -> Gate:
        dtype = getattr(forward, "dtype", where.dtype)  # OpenVINO chooses its own
        return gates.of_ends(gates.logits_gate(reference, bound(dtype)))

    return gate


def logits_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Image by image: float64 takes memory."""
    return torch.cat([model(image).logits for image in batch.split(1)])


def build(name: str, where: Context, gate_of: Callable[[Forward], Gate]) -> Checked:
    """Build a provider, a function of pixel values; a SkippedCase or RedGate where it is wrong."""
    provider, on_gpu = PROVIDERS[name], where.device.type == "cuda"
    if provider.device not in ("", where.device.type):
        raise SkippedCase(f"it runs on {provider.device} only")
    before = torch.cuda.memory_allocated(where.device) if on_gpu else 0
    start = time.perf_counter()
    forward = provider.build(where)
    # As users call it. They load outside, or there would be no counting of edits.
    with torch.inference_mode():
        result = forward(where.pixel_values)
        if on_gpu:
            torch.cuda.synchronize(where.device)
        seconds = time.perf_counter() - start
        if provider.graph:  # the result of a replay, which has seen other pixels before
            for pixel_values in (*[where.pixel_values.flip(3)] * 3, where.pixel_values):
                result = forward(pixel_values)
        gate = gate_of(forward)
        error = gate.check(name, result)
        del result  # it would count
        peak_mb = None
        if on_gpu and not provider.graph and name != "torch-tensorrt":  # which has its own memory
            torch.cuda.reset_peak_memory_stats(where.device)
            forward(where.pixel_values)
            torch.cuda.synchronize(where.device)
            peak_mb = (torch.cuda.max_memory_allocated(where.device) - before) / 1e6
    return Checked(forward, provider.version(), gate, error, seconds, peak_mb)


# From images to label maps


def _time_pipelines(run: Run, where: Context, built: Mapping[str, Checked]) -> None:
    setting = where.setting
    label = f"{setting}, images"
    images = draw_images(setting.size, setting.batch)
    gate = pipelines_gate(where, images)
    names = [name for name in built if PROVIDERS[name].end_to_end]
    pipelines = {n: pipeline(PROVIDERS[n].ours, built[n].function, where) for n in names}

    @torch.inference_mode()
    def check(name: str) -> Checked:
        error = gate.check(name, through(pipelines[name], images))
        return Checked(built[name].function, built[name].version, gate, error)

    checked = run.checked(label, names, check)
    if not checked:
        return
    pipelines = {name: pipelines[name] for name in checked}
    wait = torch.cuda.synchronize if run.on_gpu else lambda: None
    with torch.inference_mode():
        samples = timing.interleave_steps(pipelines, images, run.options.repeats, label, wait)
    what = what_of("end to end", setting)
    found = []
    for part, taken in samples.items():
        # All parts have the date of the first: newest rows stay together.
        found += run.rows({**what, "part": part}, taken, checked)
        what["date"] = found[0].date
    run.add(found)


def draw_images(size: tuple[int, int], batch: int) -> list[Any]:
    """Street scenes, 8 bits a channel, of the size that the model sees."""
    seeds = range(7, 7 + batch)  # the demo model was trained on seeds from 1000000
    return [Image.fromarray(draw_scene(seed, size).image) for seed in seeds]


def through(steps: Steps, images: Any) -> torch.Tensor:
    """Label maps (B, H, W)."""
    for step in steps:
        images = step(images)
    return images


def pipelines_gate(where: Context, images: list[Any]) -> Gate:
    """For label maps: against logits in float64, only near-ties may be decided otherwise.

    In half precision 1.25 times what transformers in that precision decides otherwise.
    """
    size = where.setting.size
    pixels = _theirs(size)(images, return_tensors="pt")["pixel_values"].to(where.device)
    pixels = gates.ends(pixels)
    reference = logits_of(where.transformers(torch.float64), pixels.double())
    gate = gates.labels_gate(reference, size, gates.NETWORK_LABELS_BOUND)
    if where.dtype != torch.float32:
        labels = plain_labels(logits_of(where.transformers(), pixels.to(where.dtype)), size)
        gate = gates.labels_gate(reference, size, gates.HALF_BOUND * gate.error(labels))
    return gates.of_ends(gate)


def pipeline(ours: bool, forward: Forward, where: Context) -> Steps:
    """What users of fastseg, or of transformers, write around a forward."""
    size = where.setting.size
    processor = _theirs(size)
    if ours:
        processor = fastseg.SegformerImageProcessor(size={"height": size[0], "width": size[1]})

    def pre(images: list[Any]) -> torch.Tensor:
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        return pixel_values.to(where.device, where.dtype)

    def post(logits: torch.Tensor) -> torch.Tensor:
        if ours:
            return fastseg.kernels.upsample_argmax(logits, size)
        output, sizes = SimpleNamespace(logits=logits), [size] * len(logits)
        return torch.stack(processor.post_process_semantic_segmentation(output, sizes))

    return pre, forward, post


def _theirs(size: tuple[int, int]) -> Any:
    import transformers

    return transformers.SegformerImageProcessor(size={"height": size[0], "width": size[1]})


def plain_labels(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Label maps (B, H, W) as transformers' image processor makes them."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)

"""The cases that are timed: what each provider computes, and the gate its result must pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

import fastseg
from fastseg.demo.scenes import draw_scene

from . import gates, pairs
from .context import Context, SkippedCase, first_line
from .gates import Gate, RedGate
from .providers import BASELINE, GRAPHS, PROVIDERS, UNCOUNTED_MEMORY, Forward

DEMO_MODEL = Path(fastseg.__file__).parent / "demo" / "assets" / "scenes-b0"
SCENE_SEED = 7  # the demo model was trained on seeds from 1000000


@dataclass(frozen=True)
class Built:
    """A provider that gave the right logits.

    Attributes:
        setup_seconds: from files to the first result.
        peak_mb: of GPU memory during a call, its weights included; None on a CPU, and of providers
            whose memory the allocator does not count.
    """

    forward: Forward
    version: str
    setup_seconds: float
    peak_mb: float | None
    gate: Gate
    error: float


class LogitsGates:
    """Gates for the logits of a context's pixels: one a precision, and those of other weights.

    Of a batch the first and the last image are compared.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._half_errors: dict[torch.dtype, float] = {}
        self.pixel_values = _ends(context.pixel_values)
        wide = pairs.load_transformers(context.folder, torch.float64).to(context.device)
        self.reference = _by_image(lambda one: wide(one).logits, self.pixel_values.double())
        pairs.check_scale(context.transformers().float(), self.pixel_values[:1].float())

    def of(self, forward: Forward) -> Gate:
        """The gate that results of `forward` have to pass."""
        if reference := getattr(forward, "reference", None):  # weights of its own
            return self._gate(self._context.dtype, _by_image(reference, self.pixel_values))
        return self._gate(getattr(forward, "dtype", self._context.dtype), self.reference)

    def _gate(self, dtype: torch.dtype, reference: torch.Tensor) -> Gate:
        """In half precision the measure is what transformers' model makes of that dtype."""
        if dtype == torch.float32:
            on_gpu = self._context.device.type == "cuda"
            bound = gates.GPU_FLOAT32_BOUND if on_gpu else gates.FLOAT32_BOUND
            return _of_ends(gates.logits_gate(reference, bound))
        if dtype not in self._half_errors:
            half = pairs.load_transformers(self._context.folder, dtype).to(self._context.device)
            logits = _by_image(lambda one: half(one).logits, self.pixel_values.to(dtype))
            self._half_errors[dtype] = gates.logits_gate(self.reference).error(logits)
        bound = gates.HALF_BOUND * self._half_errors[dtype]
        return _of_ends(gates.logits_gate(reference, bound))


def _ends(batch: torch.Tensor) -> torch.Tensor:
    """The first and the last image, or the only one."""
    return batch if len(batch) < 3 else batch[[0, -1]]


def _of_ends(gate: Gate) -> Gate:
    return Gate(gate.measure, gate.bound, lambda result: gate.error(_ends(result)))


def _by_image(run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """float64 takes memory."""
    return torch.cat([run(image) for image in batch.split(1)])


# Told the name of a provider and why it gives no figure.
Tell = Callable[[str, str], None]


def build(context: Context, names: Sequence[str], skip: Tell, bad: Tell) -> dict[str, Built]:
    """The providers `names` whose logits are right, in order.

    Args:
        skip: told of a provider that cannot run here.
        bad: told of one that is wrong, and of one of fastseg's that fails.
    """
    found: dict[str, Built] = {}
    gate = LogitsGates(context)
    for name in names:
        with _told(name, skip, bad):
            found[name] = _build(name, context, gate)
    return found


def _build(name: str, context: Context, gate: LogitsGates) -> Built:
    """
    Raises:
        SkippedCase, RedGate: it cannot run, or is wrong.
    """
    provider, device = PROVIDERS[name], context.device
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    start = time.perf_counter()
    forward = provider.build(context)
    # As users call it. They load outside, or there would be no counting of edits.
    with torch.inference_mode():
        result = forward(context.pixel_values)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        if name in GRAPHS:  # the result of a replay, which has seen other pixels before
            for pixel_values in (*[context.pixel_values.flip(3)] * 3, context.pixel_values):
                result = forward(pixel_values)
        own = gate.of(forward)
        error = own.check(name, result)
        del result  # it would count
        peak_mb = None
        if on_gpu and name not in UNCOUNTED_MEMORY:
            torch.cuda.reset_peak_memory_stats(device)
            forward(context.pixel_values)
            torch.cuda.synchronize(device)
            peak_mb = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    return Built(forward, provider.version(), seconds, peak_mb, own, error)


def check_labels(
    gate: Gate, providers: Mapping[str, Callable[[], torch.Tensor]], skip: Tell, bad: Tell
) -> dict[str, float]:
    """The errors of the label maps of `providers`, where they are right; see `build`."""
    errors = {}
    for name, function in providers.items():
        with _told(name, skip, bad), torch.inference_mode():
            errors[name] = gate.check(name, function())
    return errors


@contextmanager
def _told(name: str, skip: Tell, bad: Tell) -> Iterator[None]:
    """What happens to one provider is told, and costs no other.

    Raises:
        RuntimeError: the GPU does not answer any more.
    """
    try:
        yield
    except SkippedCase as reason:
        skip(name, str(reason))
    except RedGate as reason:
        bad(name, f"parity gate is red: {reason}")
    except torch.OutOfMemoryError as reason:
        skip(name, first_line(reason))
    except Exception as reason:  # of any compiler, converter or driver
        # Of others it is a limit; of fastseg a defect.
        (bad if name.startswith("fastseg") else skip)(name, first_line(reason))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


# From images to label maps

Steps = Mapping[str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Pipelines:
    """Steps "pre", "forward" and "post" by provider, from `images` to label maps (B, H, W)."""

    images: list[Any]
    steps: Mapping[str, Steps]
    errors: Mapping[str, float]
    gate: Gate


# Runtimes that take NumPy arrays have no image processor and no label maps of their own.
_END_TO_END = (
    BASELINE,
    "transformers compiled",
    "transformers max-autotune",
    "transformers CUDA graph",
    "fastseg eager",
    "fastseg accelerate",
    "fastseg compiled",
    "fastseg Triton",
    "fastseg CUDA graph",
)


def draw_images(setting_size: tuple[int, int], batch: int) -> list[Any]:
    """Street scenes, 8 bits a channel, of the size that the model sees."""
    seeds = range(SCENE_SEED, SCENE_SEED + batch)
    return [Image.fromarray(draw_scene(seed, setting_size).image) for seed in seeds]


def pipelines(context: Context, built: Mapping[str, Built], skip: Tell, bad: Tell) -> Pipelines:
    """What transformers' users and fastseg's write around a forward.

    The gate is for label maps: against logits in float64, only near-ties may be decided otherwise,
    and in half precision 1.25 times what transformers in that precision decides otherwise.
    """
    size = context.setting.size
    images = draw_images(size, context.setting.batch)
    all_steps = {
        name: _steps(name, one.forward, context)
        for name, one in built.items()
        if name in _END_TO_END
    }
    wide = pairs.load_transformers(context.folder, torch.float64).to(context.device)
    ends = images if len(images) < 3 else [images[0], images[-1]]
    pixels = _theirs(size)(ends, return_tensors="pt")["pixel_values"].to(context.device)
    reference = _by_image(lambda one: wide(one).logits, pixels.double())
    gate = gates.labels_gate(reference, size, gates.NETWORK_LABELS_BOUND)
    if context.dtype != torch.float32:
        half = context.transformers()
        labels = _by_image(lambda one: plain_labels(half(one).logits, size), pixels.to(half.dtype))
        gate = gates.labels_gate(reference, size, gates.HALF_BOUND * gate.error(labels))
    gate = _of_ends(gate)
    errors = {}
    for name, steps in all_steps.items():
        with _told(name, skip, bad), torch.inference_mode():
            value: Any = images
            for step in steps.values():
                value = step(value)
            errors[name] = gate.check(name, value)
    return Pipelines(images, {name: all_steps[name] for name in errors}, errors, gate)


def _steps(name: str, forward: Forward, context: Context) -> Steps:
    size = context.setting.size
    if name.startswith("fastseg"):
        ours = fastseg.SegformerImageProcessor(size={"height": size[0], "width": size[1]})
        return {
            "pre": lambda images: ours(images, return_tensors="pt")["pixel_values"].to(
                context.device, context.dtype
            ),
            "forward": forward,
            "post": lambda logits: fastseg.kernels.upsample_argmax(logits, size),
        }
    theirs = _theirs(size)
    return {
        "pre": lambda images: theirs(images, return_tensors="pt")["pixel_values"].to(
            context.device, context.dtype
        ),
        "forward": forward,
        "post": lambda logits: torch.stack(
            theirs.post_process_semantic_segmentation(
                SimpleNamespace(logits=logits), target_sizes=[size] * len(logits)
            )
        ),
    }


def _theirs(size: tuple[int, int]) -> Any:
    import transformers

    return transformers.SegformerImageProcessor(size={"height": size[0], "width": size[1]})


def plain_labels(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Label maps (B, H, W) as transformers' image processor makes them."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)

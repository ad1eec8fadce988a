"""SegGPT of the published widths: forwards, label maps by prompts, post-processing, memory.

transformers' model as it is, and after `fastseg.accelerate`, with the same drawn weights, which
both hold in the same memory. Where a case takes prompts, it begins with 8-bit pictures and ends
with a label map, as users of either library write it; several prompts are averaged by
transformers' rule on both sides.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastseg
from fastseg.demo.scenes import CLASSES, draw_scene

from .. import gates
from ..gates import Gate
from ..machine import version
from ..options import SEGGPT_CASES
from ..providers import BASELINE
from ..setting import DTYPES, SkippedCase, draw_pixels, draw_weights
from ..work import Work, seggpt_config, seggpt_work
from .memory import status_bytes
from .run import Checked, Run, tidy

OURS = "fastseg accelerate"
LABEL_MAP_SIZE = (1080, 1920)
CLASSES_OF_LABEL_MAP = 150
_CLEAR = Path("/proc/self/clear_refs")

Inputs = Mapping[str, torch.Tensor]  # arguments of a forward
Functions = dict[str, Callable[[], torch.Tensor]]  # that compute the same; first the baseline


def measure(run: Run) -> None:
    """Add the rows of the cases."""
    for dtype in run.options.dtypes or ["float32"]:
        for name in run.options.cases:
            layers = run.options.layers or SEGGPT_CASES[name]
            if name == "post-processing":
                case, size = f"{name}, {CLASSES_OF_LABEL_MAP} labels", LABEL_MAP_SIZE
            else:
                height, width = seggpt_config(layers).image_size
                case, size = f"{name}, {layers} layers", (height, width)
            kind = "seggpt memory" if name == "memory" else "seggpt"
            what = {"kind": kind, "case": case, "size": size, "batch": 1, "dtype": dtype}
            label = f"SegGPT, {case}, {dtype}"
            if run.wants(what, label):
                with run.telling(label, "all"):
                    _MEASURES.get(name, _label_maps)(run, what, layers)
                tidy(run.options.device)


# Models and what they get


def build(config: fastseg.SegGptConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The models of both providers, by name, in eval mode."""
    import transformers

    theirs_config = transformers.SegGptConfig.from_dict(config.to_dict())
    with torch.device("meta"):
        models = [transformers.SegGptForImageSegmentation(theirs_config).eval() for _ in range(2)]
    theirs, ours = (model.requires_grad_(False) for model in models)
    theirs.to_empty(device="cpu")
    draw_weights(theirs)
    theirs.to(device, dtype)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return {BASELINE: theirs, OURS: fastseg.accelerate(ours, strict=True)}


def draw_inputs(model: Any) -> Inputs:
    """Noise as images, prompts and masks, in the model's dtype."""
    height, width = model.config.image_size
    pixels = draw_pixels((height // 2, width), 3).to(model.device, model.dtype)
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return dict(zip(names, pixels.split(1), strict=True))


def wide(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same in `dtype`."""
    return {name: one.to(dtype) for name, one in inputs.items()}


# Cases


def _forward(run: Run, what: dict[str, Any], layers: int) -> None:
    """From pixel values to painted masks."""
    run.ceilings(what["dtype"])  # first, while there is memory for large matrices
    models = build(seggpt_config(layers), DTYPES[what["dtype"]], run.options.device)
    inputs = draw_inputs(models[BASELINE])

    def paint(model: Any) -> torch.Tensor:
        return model(**inputs).pred_masks

    functions: Functions = {name: partial(paint, model) for name, model in models.items()}
    # In a process of its own: where it ran before, in this one, malloc had kept so much memory that
    # transformers' forward of 24 layers took 0.73 of its time.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        reference = process.submit(
            reference_masks, seggpt_config(layers), what["dtype"], run.options.threads
        )
        gate = masks_gate(torch.from_numpy(reference.result()), first := functions[BASELINE]())
    _time(run, what, functions, gate, first, seggpt_work(layers, what["dtype"]))


def reference_masks(config: fastseg.SegGptConfig, dtype: str, threads: int) -> np.ndarray:
    """What transformers' model of weights and inputs in `dtype` paints in float64."""
    torch.set_num_threads(threads)
    model = build(config, DTYPES[dtype], torch.device("cpu"))[BASELINE]
    inputs = wide(draw_inputs(model), torch.float64)
    with torch.inference_mode():
        return model.double()(**inputs).pred_masks.numpy()


def masks_gate(reference: torch.Tensor, theirs: torch.Tensor) -> Gate:
    """For painted masks against the `reference` in float64.

    In half precision 1.25 times the error of `theirs`, what transformers' model itself paints.
    """
    bound = gates.GPU_FLOAT32_BOUND if theirs.is_cuda else gates.FLOAT32_BOUND
    if theirs.dtype != torch.float32:
        bound = gates.HALF_BOUND * gates.relative_error(theirs, reference)
    measure = "relative RMS error of the painted masks against float64"
    return Gate(measure, bound, partial(gates.relative_error, reference=reference))


def _label_maps(run: Run, what: dict[str, Any], layers: int) -> None:
    """From a picture and prompts to the label map of the picture, of one class."""
    import transformers

    is_kept = what["case"].startswith("kept")
    count = 1 if is_kept else int(what["case"].split()[0])
    models = build(seggpt_config(layers), DTYPES[what["dtype"]], run.options.device)
    model, ours = models[BASELINE], models[OURS]
    side = model.config.image_size[1]
    scenes = [draw_scene(seed, (side, side)) for seed in range(7, 8 + count)]
    image, *pictures = (Image.fromarray(scene.image) for scene in scenes)
    masks = [(scene.labels == CLASSES.index("road")).astype(np.uint8) for scene in scenes[1:]]
    processor: Any = transformers.SegGptImageProcessor(size={"height": side, "width": side})

    def prepared() -> Inputs:
        pixels = processor(
            images=[image] * count,
            prompt_images=pictures,
            prompt_masks=masks,
            num_labels=1,
            return_tensors="pt",
        )
        return wide({name: one.to(model.device) for name, one in pixels.items()}, model.dtype)

    def paint(model: Any, inputs: Inputs) -> torch.Tensor:
        return model(**inputs, feature_ensemble=count > 1).pred_masks[:1]

    def labels_of(painted: torch.Tensor) -> torch.Tensor:
        output, size = SimpleNamespace(pred_masks=painted), image.size[::-1]
        return processor.post_process_semantic_segmentation(output, [size], 1)[0]

    pairs = list(zip(pictures, masks, strict=True))
    prompts = [fastseg.keep_prompt(ours, *pairs[0], num_labels=1)] if is_kept else pairs
    functions: Functions = {
        BASELINE: lambda: labels_of(paint(model, prepared())),
        OURS: lambda: fastseg.segment(
            ours, image, prompts=prompts, num_labels=1, ensemble_rule="transformers"
        )[0],
    }
    painted = reference = paint(model, prepared())
    first = labels_of(painted)
    if model.dtype != torch.float32:
        single = copy.deepcopy(model).float()
        reference = paint(single, wide(prepared(), torch.float32))
    theirs, exact = (colour_distances(one[0, :, side:], processor) for one in (painted, reference))
    bound = max(gates.NETWORK_LABELS_BOUND, gates.HALF_BOUND * margin_error(theirs, exact))
    gate = colours_gate(exact, bound)
    _time(run, what, functions, gate, first)


def colour_distances(painted: torch.Tensor, processor: Any) -> torch.Tensor:
    """Squared, of what is painted (3, H, W) from both colours of one class, of 255 squared."""
    mean, std = (
        torch.tensor(one)[:, None, None] for one in (processor.image_mean, processor.image_std)
    )
    colours = (255 * (painted.cpu().double() * std + mean)).clip(0, 255)
    palette = torch.tensor(processor.get_palette(1)).double()
    return (colours - palette[:, :, None, None]).square().sum(1) / 255**2


def margin_error(distances: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest error of the margin by which one colour is nearer than the other.

    The nearest colour by `distances` is at most so much farther off than the nearest one by
    `reference`. Unlike the worst pixel of a label map this hardly depends on which pixels happen to
    lie near the middle: over 20 prompts such a pixel was 0.001 to 0.033 off with either library.
    """
    margin, expected = (one[0] - one[1] for one in (distances, reference))
    return (margin - expected).abs().max().item()


def colours_gate(distances: torch.Tensor, bound: float) -> Gate:
    """For label maps of one class, by the `colour_distances` of transformers' model in float32.

    Only where both colours are as near may a pixel be decided otherwise.
    """

    def error(labels: torch.Tensor) -> float:
        chosen = distances.gather(0, labels.cpu()[None].long())[0]
        return (chosen - distances.amin(0)).max().item()

    measure = "squared distance of the chosen colour above that of the nearest, of 255 squared"
    return Gate(measure, bound, error)


def _post_processing(run: Run, what: dict[str, Any], layers: int) -> None:
    """From painted masks to a label map."""
    import transformers

    height, width = seggpt_config(layers).image_size
    masks = draw_pixels((height, width)).to(DTYPES[what["dtype"]])
    output = SimpleNamespace(pred_masks=masks)
    processors: dict[str, Any] = {
        BASELINE: transformers.SegGptImageProcessor(),
        OURS: fastseg.SegGptImageProcessor(),
    }

    def label_map(processor: Any) -> torch.Tensor:
        post_process = processor.post_process_semantic_segmentation
        return post_process(output, [LABEL_MAP_SIZE], CLASSES_OF_LABEL_MAP)[0]

    functions: Functions = {name: partial(label_map, one) for name, one in processors.items()}
    first = functions[BASELINE]()
    gate = Gate(
        "share of pixels with another label than transformers'",
        0.0,
        lambda labels: (labels != first).double().mean().item(),
    )
    _time(run, what, functions, gate, first)


def _time(
    run: Run,
    what: dict[str, Any],
    functions: Functions,
    gate: Gate,
    first: torch.Tensor,
    works: Sequence[Work] = (),
) -> None:
    """Check, and time in turn; `first` is what the baseline has given."""

    def check(name: str) -> Checked:
        result = first if name == BASELINE else functions[name]()
        return Checked(functions[name], _version(name), gate, gate.check(name, result))

    if checked := run.checked(what["case"], functions, check):
        run.time(what, checked, what["case"], works, warm_up_rounds=0)  # which the checks were


def _version(provider: str) -> str:
    return version("transformers") if provider == BASELINE else fastseg.__version__


def _memory(run: Run, what: dict[str, Any], layers: int) -> None:
    """How far a first forward raises the resident memory, of each provider in its own process."""
    if not _CLEAR.exists():
        raise SkippedCase("the peak of a process is read from Linux's /proc")
    found = {}
    for name in (BASELINE, OURS):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            arguments = name, seggpt_config(layers), what["dtype"], run.options.threads
            found[name] = process.submit(peak, *arguments).result()
    dtype = DTYPES[what["dtype"]]
    painted = {name: torch.from_numpy(one).to(dtype) for name, (_, one) in found.items()}
    reference = reference_masks(seggpt_config(layers), what["dtype"], run.options.threads)
    gate = masks_gate(torch.from_numpy(reference), painted[BASELINE])
    checked = {
        name: Checked(peak, _version(name), gate, gate.check(name, one))
        for name, one in painted.items()
    }
    run.add(run.rows(what, {name: [one / 1e6] for name, (one, _) in found.items()}, checked))


def peak(
    name: str, config: fastseg.SegGptConfig, dtype: str, threads: int
) -> tuple[int, np.ndarray]:
    """Bytes above what the process has with the model loaded, and the painted masks, float32."""
    torch.set_num_threads(threads)
    model = build(config, DTYPES[dtype], torch.device("cpu"))[name]
    inputs = draw_inputs(model)
    _CLEAR.write_text("5")  # the peak begins anew
    before = status_bytes("VmRSS")
    with torch.inference_mode():
        painted = model(**inputs).pred_masks
        return status_bytes("VmHWM") - before, painted.float().numpy()


_MEASURES: dict[str, Callable[[Run, dict[str, Any], int], None]] = {
    "forward": _forward,
    "post-processing": _post_processing,
    "memory": _memory,
}

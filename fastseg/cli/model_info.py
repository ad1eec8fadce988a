"""What `fastseg info MODEL` tells of a model: its size, its work, and how it would run here."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import fastseg
from fastseg.images.options import resized_size

from .options import CommandError

_STAGE = re.compile(r"\.encoder\.\w+\.(\d+)(\.|$)")
_NAMES = 12  # of classes that are listed


def collect(source: str, device: torch.device, size: tuple[int, int] | None) -> dict[str, Any]:
    """Collect what `fastseg info MODEL --json` prints.

    The checkpoint is read once; its tensors are given up in the end.

    Args:
        source: a folder, a file or a hub id.
        size: (H, W) of the image that work is counted for; None for the image processor's.

    Raises:
        CommandError: the model cannot be read, or cannot take the size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fastseg.CheckpointWarning)  # in `load_report`
            model = fastseg.from_pretrained(source, dtype="auto")
        given = model.preprocessor_file
        processor_class = model.image_processor_class
        processor = processor_class() if given is None else processor_class.from_pretrained(given)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"MODEL: {error}") from error
    stored = model.dtype
    if device.type == "cpu":  # as `fastseg predict` takes it there
        model = model.to(torch.promote_types(stored, torch.float32))
    model = model.to(device)
    # An encoder alone has no classes, whatever its configuration says.
    classifies = hasattr(model, model.base_model_prefix)
    names = {int(number): str(name) for number, name in model.config.id2label.items()}
    with torch.no_grad():
        report = fastseg.report(model).splitlines()
    tensors = [*model.parameters(), *model.buffers()]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = size or resized_size(processor.size, 512, 512)  # where an edge is asked for: a square
    return {
        "model": source,
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "differences": str(model.load_report) or None,
        "num_labels": model.config.num_labels if classifies else None,
        "id2label": names if classifies else None,
        "parameters": parameters,
        "stored_dtype": str(stored).removeprefix("torch."),
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "report": report,
        "size": list(size),
        "multiply_adds": _multiply_adds(model, size),
    }


def _multiply_adds(model: Any, size: tuple[int, int]) -> dict[str, int]:
    """Multiply-adds of one image, by stage; the model loses its weights."""
    model = model.to("meta")
    channels = getattr(model.config, "num_channels", 3)
    pixels = torch.empty(1, channels, *size, dtype=model.dtype, device="meta")
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), fastseg.plain_path(), counter:
            model(pixels)
    except ValueError as error:
        raise CommandError(f"--size {size[0]} {size[1]}: {error}", status=2) from error
    counts = {name: sum(of.values()) // 2 for name, of in counter.get_flop_counts().items()}
    return _by_stage(counts)


def _by_stage(counts: Mapping[str, int]) -> dict[str, int]:
    """Sums of the modules of each stage, and what else the model's own parts do.

    Args:
        counts: by dotted names that begin with the model's class, each with what is in it, and all
            as "Global".
    """
    stages: dict[str, int] = {}
    taken: list[str] = []
    for name in sorted(counts):  # a module before those in it
        stage = _STAGE.search(name)
        if stage and not any(name.startswith(f"{outer}.") for outer in taken):
            taken.append(name)
            label = f"stage {int(stage[1]) + 1}"
            stages[label] = stages.get(label, 0) + counts[name]
    found = dict(sorted(stages.items()))
    for name in counts:
        if name.count(".") == 1:
            inside = sum(counts[inner] for inner in taken if inner.startswith(f"{name}."))
            if counts[name] > inside:
                found[name.split(".")[1]] = counts[name] - inside
    return {**found, "total": counts.get("Global", 0)}


def text(info: Mapping[str, Any]) -> str:
    """What `fastseg info MODEL` prints."""
    stored, dtype = info["stored_dtype"], info["dtype"]
    weights = f"{info['parameters']:,} parameters, {info['weight_bytes'] / 1e6:.1f} MB in {dtype}"
    if stored != dtype:
        weights += f" (stored in {stored})"
    lines = [f"{info['model']}: {info['class']}", f"  {'weights':<16} {weights}"]
    if info["num_labels"] is not None:
        names = [info["id2label"].get(number, "") for number in range(info["num_labels"])]
        listed = ", ".join(name for name in names[:_NAMES] if name)
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        lines.append(f"  {'classes':<16} {len(names)}: {listed}{more}")
    if info["differences"]:
        lines.append(f"  loaded with differences:\n{info['differences']}")
    height, width = info["size"]
    lines.append(f"\nmultiply-adds of the plain path, in G, at {height}x{width}")
    lines += [f"  {part:<16} {count / 1e9:.2f}" for part, count in info["multiply_adds"].items()]
    lines.append(f"\non {info['device']}")
    lines += [f"  {line}" for line in info["report"]]
    return "\n".join(lines)

"""Helpers that commands share: the error they end with, option types, and loading a model."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastseg
from fastseg.images.reasons import first_line
from fastseg.images.storage import is_url
from fastseg.inference.augmented import Views
from fastseg.kernels.core.precision import FAST
from fastseg.models.base import PreTrainedModel
from fastseg.models.runtime import RuntimeModel
from fastseg.models.seggpt.prompts import is_seggpt

EMBEDDED_MODEL = Path(fastseg.__file__).parent / "demo" / "assets" / "scenes-b0"
EMBEDDED = "scenes-b0"
EMBEDDED_NAME = f"{EMBEDDED} (embedded)"

_quiet = False  # see `quiet`

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CommandError(Exception):
    """Error that ends a command with a message; `status` is 2 where arguments are wrong, else 1."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def device(text: str) -> torch.device:
    """Option type: a device that torch has here, or "auto" for the first CUDA GPU, else the CPU."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {first_line(error)}") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise argparse.ArgumentTypeError(f"{text}: torch sees {count} CUDA device(s)")
    elif found.type != "cpu":
        try:
            torch.zeros(1, device=found).cpu()
        except Exception as error:  # each device fails in its own way
            raise argparse.ArgumentTypeError(
                f"{text}: torch cannot compute there: {first_line(error)}"
            ) from error
    return found


def place(text: str) -> Path | str:
    """Option type: a path, or a URL as it stands."""
    return text if is_url(text) else Path(text)


def positive(text: str) -> int:
    """Option type: an integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """Option type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def fraction(text: str) -> float:
    """Option type: a number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return number


def add_device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        type=device,
        default="auto",
        metavar="DEVICE",
        help="cpu, cuda, cuda:N, or any that torch has here, such as mps and xpu, which are "
        "untested and run the eager path; auto is a CUDA GPU where there is one, else the CPU "
        "(default: auto)",
    )
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, FAST),
        help="precision of the model; fast is bfloat16 where the device is quicker in it, else "
        "float32, as `fastseg info` tells (default: as stored, and float32 on a CPU)",
    )


def load_model(
    source: str | None, device: torch.device, dtype: str | None, runtime: str | None = None
) -> tuple[Any, Any]:
    """A segmentation model in eval mode and its image processor; `source` None is the embedded one.

    `dtype` None is what is stored, and float32 on a CPU where that is half precision; with a
    `runtime` what that chooses.

    Raises:
        CommandError: neither can be read, or the model does not segment.
    """
    name = EMBEDDED_NAME if source is None else source
    place = str(EMBEDDED_MODEL) if source is None else source
    try:
        with warnings.catch_warnings():
            # What it warns of is in `load_report`, told below.
            warnings.simplefilter("ignore", fastseg.CheckpointWarning)
            chosen: Any = DTYPES.get(dtype or "", dtype)
            model: PreTrainedModel | RuntimeModel
            if runtime is None:
                model = fastseg.from_pretrained(place, device=device, dtype=chosen)
            else:
                model = fastseg.from_pretrained(place, runtime=runtime, dtype=chosen)
                note(fastseg.report(model))
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"--model {name}: {without_name(error, place)}") from error
    if not model.segments and not is_seggpt(model):
        kind = type(model).__name__
        raise CommandError(f"--model {name}: expected a segmentation model, got a {kind}")
    report: Any = model.load_report
    if report.reinitialized:
        raise CommandError(f"--model {name}: weights are missing\n{report}")
    if report:
        note(f"{name}, loaded with differences:\n{report}")
    if device.type not in ("cpu", "cuda"):
        note(f"--device {device} is untested with fastseg, and runs the eager path")
    if getattr(model, "image_processor", None) is not None:
        return model, model.image_processor
    # Of a single file of weights, the processor's options are beside it or nowhere.
    options = model.preprocessor_file if Path(place).is_file() else place
    try:
        if options is None:
            raise FileNotFoundError(place)
        return model, model.image_processor_class.from_pretrained(options)
    except FileNotFoundError:
        note(f"no preprocessor_config.json in {name}; the default image processor is used")
        return model, model.image_processor_class()
    except (OSError, ValueError) as error:
        raise CommandError(f"--model {name}: {without_name(error, place)}") from error


def add_tta_option(parser: Any) -> None:
    """Add `--tta` to a parser, or to a group of one."""
    parser.add_argument(
        "--tta",
        type=_views,
        metavar="VIEWS",
        help="flip, scales, or both with commas between them, such as flip,0.75,1.25: see the "
        "picture at these scales too, and mirrored, and average the probabilities, as in mmseg",
    )


def _views(text: str) -> list[str | float]:
    try:
        views = [item if item == "flip" else float(item) for item in text.split(",")]
        Views.of(views)
    except ValueError:
        message = f"expected flip and scales above 0 with commas between them, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
    return views


def without_name(error: BaseException, name: str) -> str:
    """What an error says of the file or hub id `name`, which is told already."""
    return str(error).removeprefix(f"{name}: ")


def say(message: str) -> None:
    """A remark to the user, kept apart from results."""
    print(message, file=sys.stderr)


def note(message: str) -> None:
    """A remark on what is no failure; none inside `quiet`."""
    if not _quiet:
        say(f"note: {message}")


@contextlib.contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Leave out notes inside the block."""
    global _quiet
    before, _quiet = _quiet, on
    try:
        yield
    finally:
        _quiet = before

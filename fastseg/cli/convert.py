"""`fastseg convert`: a checkpoint of any library, as a folder that transformers loads."""

from __future__ import annotations

import argparse
import functools
import warnings
from pathlib import Path
from typing import Any

import torch

import fastseg
from fastseg.checkpoints.files import CONFIG_NAME, CONVERTER_NAME, PREPROCESSOR_NAME, read_json
from fastseg.checkpoints.hdf5 import image_converter
from fastseg.checkpoints.hub import find_file
from fastseg.checkpoints.kinds import KERAS, kind_of
from fastseg.checkpoints.load import load_pretrained
from fastseg.models.families import FAMILIES

from . import options
from .options import CommandError, say

_EPSILONS = ("patch_norm_eps", "block_norm_eps", "reduction_norm_eps", "stage_norm_eps")
_TRANSFORMERS_EPS = 1e-5


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint of another library as config.json + model.safetensors",
        description="Reads a checkpoint of transformers (PyTorch or TensorFlow), NVlabs, mmseg, "
        "segmentation_models_pytorch or KerasHub, or what a training program has stored, and "
        "writes it as config.json, model.safetensors and, where the source has its options, "
        "preprocessor_config.json. The layout is told by the tensors. What was written is read "
        "again and compared.",
    )
    parser.add_argument("source", metavar="IN", help="a file, a folder or a Hugging Face hub id")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--dtype", choices=options.DTYPES, help="to store weights in (default: as in the source)"
    )
    parser.add_argument(
        "--encoder", action="store_true", help="the encoder alone, whichever head the source has"
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        type=options.positive,
        metavar="N",
        help="attention heads of each stage, where the widths are not those of MiT-B0 to B5",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the checkpoint in OUT, which is not empty"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _check_output(arguments.output, arguments.force)
    model = _load(arguments)
    processor = _image_processor(arguments.source, model)
    try:
        model.save_pretrained(arguments.output)
        if processor is not None:
            processor.save_pretrained(arguments.output)
        else:  # that of an earlier checkpoint
            (arguments.output / PREPROCESSOR_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise CommandError(f"OUT {arguments.output}: {options.first_line(error)}") from error
    _compare(model, arguments.output)
    print(f"{arguments.output}: {_summary(model)}")
    if processor is None:
        say("note: IN has no options of an image processor; users get the default one")
    epsilons = (getattr(model.config, name, _TRANSFORMERS_EPS) for name in _EPSILONS)
    if any(eps != _TRANSFORMERS_EPS for eps in epsilons):
        say(
            "note: config.json keeps the source's LayerNorm epsilons, which fastseg obeys and "
            f"transformers does not: it computes with {_TRANSFORMERS_EPS:g} everywhere"
        )
    return 0


def _check_output(folder: Path, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"OUT {folder}: expected a folder, found a file", status=2)
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise CommandError(
            f"OUT {folder}: expected a new or an empty folder; --force replaces the checkpoint in "
            "it, and leaves other files",
            status=2,
        )


def _load(arguments: argparse.Namespace) -> Any:
    load: Any = fastseg.from_pretrained
    if arguments.encoder:
        encoders = [family.models[-1] for family in FAMILIES.values()]
        load = functools.partial(load_pretrained, model_class=encoders)
    fields = {} if arguments.heads is None else {"num_attention_heads": arguments.heads}
    dtype = "auto" if arguments.dtype is None else options.DTYPES[arguments.dtype]
    try:
        with warnings.catch_warnings():
            # What it warns of is in `load_report`, told below.
            warnings.simplefilter("ignore", fastseg.CheckpointWarning)
            model = load(arguments.source, dtype=dtype, device="cpu", **fields)
    except (OSError, ValueError, ImportError) as error:
        text = str(error).replace("pass num_attention_heads=", "pass --heads")
        raise CommandError(f"IN {arguments.source}: {text}") from error
    if model.load_report.reinitialized:
        raise CommandError(f"IN {arguments.source}: weights are missing\n{model.load_report}")
    if model.load_report:
        say(f"note: {arguments.source}, loaded with differences:\n{model.load_report}")
    return model


def _image_processor(source: str, model: Any) -> Any:
    """Image processor with the options that the source has; None where it has none."""
    file = Path(source)
    try:
        if file.is_file() and kind_of(file) == KERAS:
            return _of_converter(image_converter(file), model)
        if file.is_file() and model.preprocessor_file is None:
            return None
        place = str(model.preprocessor_file.parent) if file.is_file() else source
        try:
            return model.image_processor_class.from_pretrained(place)
        except FileNotFoundError:
            path = find_file(place, CONVERTER_NAME)
        return _of_converter(None if path is None else read_json(path), model)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"IN {source}: {error}") from error


def _of_converter(converter: dict[str, Any] | None, model: Any) -> Any:
    """The image processor that does what an image converter of KerasHub does; None for None."""
    if converter is None:
        return None
    return model.image_processor_class(**model.checkpoint_names.read_converter(converter))


def _compare(model: Any, folder: Path) -> None:
    """Read back what was written.

    Raises:
        CommandError: a tensor or a field of the configuration is not what the model has.
    """
    written = type(model).from_pretrained(folder, device="cpu", dtype="auto")
    expected, got = model.state_dict(), written.state_dict()
    differing = [name for name in expected if not torch.equal(expected[name], got[name])]
    stored = type(model.config).from_dict(read_json(folder / CONFIG_NAME))
    fields = [
        name
        for name, value in model.config.to_dict().items()
        if name != "architectures" and getattr(stored, name, None) != value
    ]
    if differing or fields:
        raise CommandError(
            f"OUT {folder}: reads back otherwise than it was written: "
            + ", ".join(differing + fields)
        )


def _summary(model: Any) -> str:
    config = model.config
    parts = [type(model).__name__, f"{model.num_parameters() / 1e6:.1f} M parameters"]
    if type(model) not in [family.models[-1] for family in FAMILIES.values()]:
        parts.append(f"{config.num_labels} classes")
    return ", ".join([*parts, str(model.dtype).removeprefix("torch.")])

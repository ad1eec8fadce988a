"""`fastseg convert`: a checkpoint of any library, as transformers or another library loads it."""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fastseg
from fastseg.checkpoints.files import CONFIG_NAME, CONVERTER_NAME, PREPROCESSOR_NAME, read_json
from fastseg.checkpoints.hdf5 import image_converter
from fastseg.checkpoints.hub import find_file
from fastseg.checkpoints.kinds import KERAS, kind_of
from fastseg.checkpoints.layouts import Layout, layout_for, told
from fastseg.checkpoints.load import load_pretrained
from fastseg.checkpoints.save import save_for
from fastseg.checkpoints.values import names_of
from fastseg.models.families import FAMILIES

from . import options
from .options import CommandError, say

_EPSILONS = (
    *("patch_norm_eps", "block_norm_eps", "reduction_norm_eps", "stage_norm_eps"),
    "batch_norm_eps",
)
_TRANSFORMERS, _TRANSFORMERS_EPS = "transformers", 1e-5
_LIBRARIES = [
    name for family in FAMILIES.values() for name in family.models[0].checkpoint_names.layouts
]
_SIDE = 128  # of the noise that results are compared on


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint of one library as another loads it",
        description="Reads a checkpoint of transformers (PyTorch or TensorFlow), NVlabs, mmseg, "
        "segmentation_models_pytorch or KerasHub, or what a training program has stored, and "
        "writes it as config.json, model.safetensors and, where the source has its options, "
        "preprocessor_config.json; or with --to as another library reads it. The layout of IN is "
        "told by the tensors. What was written is read again and compared.",
    )
    parser.add_argument("source", metavar="IN", help="a file, a folder or a Hugging Face hub id")
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help="folder to write; a file with --to nvlabs and mmseg, and with --to smp of an encoder",
    )
    parser.add_argument(
        "--to",
        choices=[_TRANSFORMERS, *_LIBRARIES],
        default=_TRANSFORMERS,
        help="the library that is to load it (default: transformers, which fastseg loads as well); "
        "smp is segmentation_models_pytorch. mmseg has another decode head: for its encoder say "
        "--encoder too. Where it computes with other epsilons, what that is worth is printed",
    )
    parser.add_argument(
        "--dtype", choices=options.DTYPES, help="to store weights in (default: as in the source)"
    )
    parser.add_argument(
        "--encoder", action="store_true", help="the encoder alone, whichever head the source has"
    )
    parser.add_argument(
        "--weights",
        choices=("model", "ema"),
        default="model",
        help="ema: the average of the weights, or the teacher's, that a training program has "
        "stored beside the model's own (default: model)",
    )
    parser.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="leave out, and list, tensors that the model has no use for, such as counters of a "
        "profiler (total_ops) or a loss's weights",
    )
    parser.add_argument("--subfolder", metavar="NAME", help="of IN, where its files are")
    parser.add_argument(
        "--variant", metavar="NAME", help="of IN's files: fp16 for model.fp16.safetensors"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--heads",
        nargs="+",
        type=options.positive,
        metavar="N",
        help="attention heads of each stage, where the widths are not those of MiT-B0 to B5",
    )
    parser.add_argument("--force", action="store_true", help="replace the checkpoint in OUT")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    model = _load(arguments)
    processor = _image_processor(arguments, model)
    if arguments.to == _TRANSFORMERS:
        _write(model, processor, arguments)
    else:
        _write_for(model, processor, arguments)
    return 0


def _write(model: Any, processor: Any, arguments: argparse.Namespace) -> None:
    """Write a folder that transformers and fastseg load."""
    if model.config.to_dict()["model_type"] != model.config.model_type:
        raise CommandError(
            f"--to {_TRANSFORMERS}: transformers has no such network as IN {arguments.source}; "
            "save_pretrained of the model writes it for fastseg alone"
        )
    _check_output(arguments.output, True, arguments.force)
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
    if type(model).segments and _is_nameless(model.config.id2label):
        say(
            "note: IN has no names of classes, so they are called LABEL_0 and so on: edit id2label "
            f"in {CONFIG_NAME}, or see --palette of `fastseg predict`"
        )
    fields = {name: _TRANSFORMERS_EPS for name in _EPSILONS if hasattr(model.config, name)}
    if any(getattr(model.config, name) != _TRANSFORMERS_EPS for name in fields):
        say(
            "note: config.json keeps the source's epsilons, which fastseg obeys and "
            f"transformers does not: it computes with {_TRANSFORMERS_EPS:g} everywhere"
            + _worth(model, fields)
        )


def _is_nameless(id2label: Mapping[int, str]) -> bool:
    return dict(id2label) == names_of(len(id2label), {})


def _write_for(model: Any, processor: Any, arguments: argparse.Namespace) -> None:
    """Write what another library loads."""
    try:
        layout = layout_for(model, arguments.to)
    except ValueError as error:
        raise CommandError(f"--to {arguments.to}: {error}") from error
    _check_output(arguments.output, layout.config(model) is not None, arguments.force)
    try:
        save_for(model, layout, arguments.output)
    except OSError as error:
        raise CommandError(f"OUT {arguments.output}: {options.first_line(error)}") from error
    _compare_tensors(model, arguments.output, config=model.config)
    print(f"{arguments.output}: {_summary(model)}, for {layout.title}")
    _say_what_differs(model, processor, layout)


def _say_what_differs(model: Any, processor: Any, layout: Layout) -> None:
    """What the other library does not take over from files."""
    if others := layout.differences(model.config):
        say(f"note: {layout.title} computes with {told(others)}" + _worth(model, layout.fields))
    names = getattr(model.config, "id2label", {})
    if model.segments and not layout.keeps_names and names != names_of(len(names), {}):
        say(f"note: names of classes have no place in files of {layout.title}")
    if processor is not None:
        say(
            f"note: options of an image processor have no place in files of {layout.title}: "
            f"{processor.to_dict()}"
        )


def _worth(model: Any, fields: Mapping[str, Any]) -> str:
    """How much results change where `fields` are others, on one picture of noise, in float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, model.config.num_channels, _SIDE, _SIDE)
    pixels = torch.randn(shape, dtype=torch.float64, generator=generator)

    @torch.no_grad()
    def result(changed: Mapping[str, Any]) -> torch.Tensor:
        config = type(model.config).from_dict({**model.config.to_dict(), **changed})
        copy = type(model)(config).double().eval()
        copy.load_state_dict(model.state_dict())
        return copy(pixels, return_dict=True)[0]

    own, other = result({}), result(fields)
    error = ((other - own).square().mean() / own.square().mean()).sqrt().item()
    return f"; on noise its results differ by {error:.1e} of their size (root mean square)"


def _check_output(output: Path, is_folder: bool, force: bool) -> None:
    if output.exists() and output.is_dir() != is_folder:
        expected, found = ("a folder", "a file") if is_folder else ("a file", "a folder")
        raise CommandError(f"OUT {output}: expected {expected}, found {found}", status=2)
    if output.parent.is_file():
        raise CommandError(f"OUT {output}: {output.parent} is a file")
    if force or not output.exists() or (is_folder and not any(output.iterdir())):
        return
    raise CommandError(
        f"OUT {output}: expected a new or an empty folder; --force replaces the checkpoint in it, "
        "and leaves other files"
        if is_folder
        else f"OUT {output}: expected a new file; --force replaces it",
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
            model = load(
                arguments.source,
                dtype=dtype,
                device="cpu",
                strict=arguments.strict,
                weights=arguments.weights,
                subfolder=arguments.subfolder,
                variant=arguments.variant,
                revision=arguments.revision,
                **fields,
            )
    except (OSError, ValueError, ImportError) as error:
        text = options.without_name(error, arguments.source).replace(
            "pass num_attention_heads=", "pass --heads"
        )
        text = text.replace("(strict=False leaves", "(--no-strict leaves")
        raise CommandError(f"IN {arguments.source}: {text}") from error
    if model.load_report.reinitialized:
        raise CommandError(f"IN {arguments.source}: weights are missing\n{model.load_report}")
    if model.load_report:
        say(f"note: {arguments.source}, loaded with differences:\n{model.load_report}")
    return model


def _image_processor(arguments: argparse.Namespace, model: Any) -> Any:
    """Image processor with the options that the source has; None where it has none."""
    source = arguments.source
    file = Path(source)
    where = {"subfolder": arguments.subfolder, "revision": arguments.revision}
    try:
        if file.is_file() and kind_of(file) == KERAS:
            return _of_converter(image_converter(file), model)
        if file.is_file() and model.preprocessor_file is None:
            return None
        place = str(model.preprocessor_file.parent) if file.is_file() else source
        try:
            return model.image_processor_class.from_pretrained(place, **where)
        except FileNotFoundError:
            path = find_file(place, CONVERTER_NAME, **where)
        return _of_converter(None if path is None else read_json(path), model)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"IN {source}: {options.without_name(error, source)}") from error


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
    _compare_tensors(model, folder)
    stored = type(model.config).from_dict(read_json(folder / CONFIG_NAME))
    fields = [
        name
        for name, value in model.config.to_dict().items()
        if name != "architectures" and getattr(stored, name, None) != value
    ]
    _raise_where_any(folder, fields)


def _compare_tensors(model: Any, output: Path, **how: Any) -> None:
    written = type(model).from_pretrained(output, device="cpu", dtype=model.dtype, **how)
    expected, got = model.state_dict(), written.state_dict()
    _raise_where_any(output, [n for n in expected if not torch.equal(expected[n], got[n])])


def _raise_where_any(output: Path, differing: list[str]) -> None:
    if differing:
        raise CommandError(
            f"OUT {output}: reads back otherwise than it was written: " + ", ".join(differing)
        )


def _summary(model: Any) -> str:
    config = model.config
    parts = [type(model).__name__, f"{model.num_parameters() / 1e6:.1f} M parameters"]
    encoders = [family.models[-1] for family in FAMILIES.values()]
    if type(model) not in encoders and model.checkpoint_names.classifiers:
        parts.append(f"{config.num_labels} classes")
    return ", ".join([*parts, str(model.dtype).removeprefix("torch.")])

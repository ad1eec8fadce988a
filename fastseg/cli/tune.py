"""`fastseg tune`: measure launch configurations on the present GPU, and write them to a file."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import time
from pathlib import Path
from typing import Any

import torch

import fastseg
from fastseg.kernels import select_backend, upsample_argmax, upsample_scores
from fastseg.kernels.core.configurations import device_family, read_kernels

from . import options
from .options import CommandError


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure kernel configurations on this GPU",
        description="Tries launch configurations of every kernel on this GPU, checks each for the "
        "right answer, times it, and writes the best to a file; what takes most time comes first. "
        "Set FASTSEG_CONFIGS to that file to use it.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON to write")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=[f"b{size}" for size in range(6)],
        default=["b0", "b2"],
        help="models to tune for (default: b0 b2; the encoders of B1 to B5 share the widths of B2)",
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=options.positive,
        default=(512, 512),
        metavar=("HEIGHT", "WIDTH"),
        help="of the images (default: 512 512)",
    )
    parser.add_argument(
        "--batch", nargs="+", type=options.positive, default=[1, 8], help="(default: 1 8)"
    )
    parser.add_argument(
        "--minutes",
        type=options.minutes,
        default=10.0,
        help="begin nothing new after so many (default: 10)",
    )
    parser.add_argument(
        "--device", type=options.device, default="auto", metavar="DEVICE", help="(default: auto)"
    )
    parser.add_argument(
        "--dtype", choices=options.DTYPES, default="bfloat16", help="(default: bfloat16)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    stop = time.monotonic() + 60 * arguments.minutes
    device = arguments.device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    name, reason = select_backend(device)
    on_gpu = device.type == "cuda"
    if name != "triton":  # on a CPU it is, in Triton's interpreter: to try the command
        raise CommandError(f"--device {device}: tuning needs a GPU: {reason}")
    from fastseg.kernels.tune import tuner  # it needs triton
    from fastseg.kernels.tune.precompile import Precompiler, present_target

    if not arguments.output.absolute().parent.is_dir():
        raise CommandError(f"--output {arguments.output}: there is no such folder", status=2)
    calls: dict[str, Any] = {}
    for variant, batch in itertools.product(arguments.variants, arguments.batch):
        dtype = options.DTYPES[arguments.dtype]
        for call, count in _calls(variant, arguments.size, batch, dtype, device):
            counted = calls.get(call.key(), (call, 0))[1] + count
            calls[call.key()] = (call, counted)
    if arguments.output.exists():
        try:
            read_kernels(arguments.output)
        except ValueError as error:
            raise CommandError(f"--output {error}", status=2) from error
    family = device_family(device)
    done: list[tuner.Tuned] = []

    def report(tuned: tuner.Tuned) -> None:
        """Tell and write each result at once: a lost GPU loses nothing."""
        done.append(tuned)
        sizes = " ".join(f"{name} {size}" for name, size in tuned.query.sizes)
        if tuned.rejected == tuned.tried:
            print(f"{tuned.query.kernel} ({sizes}): none of {tuned.tried} ran right")
            return
        gain = tuned.before_microseconds / tuned.microseconds
        print(
            f"{tuned.query.kernel} ({sizes}): {tuned.microseconds:.1f} us, {gain:.2f}x as fast as "
            f"before, {tuned.tried} tried, {tuned.rejected} rejected: {tuned.config}"
        )
        tuner.write_configs(arguments.output, family, _source(device), done)

    print(f"{len(calls)} different calls of ops")
    measure = tuner.graph_microseconds if on_gpu else tuner.wall_microseconds
    with contextlib.ExitStack() as stack:
        compiler = None
        if on_gpu:
            stack.enter_context(torch.cuda.device(device))
            compiler = stack.enter_context(Precompiler(present_target()))
        ordered = tuner.most_time_first(list(calls.values()), measure)
        seconds = stop - time.monotonic()
        tuner.tune(ordered, measure, seconds=seconds, report=report, compiler=compiler)
    if time.monotonic() > stop:
        print(f"stopped after {arguments.minutes:g} minutes: later calls were not tuned")
    print(
        f"{len(done)} configurations in {arguments.output}; to use it: "
        f"FASTSEG_CONFIGS={arguments.output}"
    )
    return 0


def _calls(
    variant: str, size: tuple[int, int], batch: int, dtype: torch.dtype, device: torch.device
) -> list[Any]:
    """Calls of ops that a forward of `variant` to its label map and scores makes."""
    from fastseg.kernels.tune.tuner import record_calls

    model = fastseg.from_preset(f"segformer_{variant}").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # of order one: a branch left out must not pass for rounding
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model = model.to(device, dtype)
    pixels = torch.randn(batch, 3, *size, device=device, dtype=dtype)

    def forward() -> None:
        logits = model(pixels).logits
        upsample_argmax(logits, size)
        upsample_scores(logits, size)

    return record_calls(forward)


def _source(device: torch.device) -> str:
    import triton

    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "the interpreter"
    today = datetime.date.today().isoformat()
    return f"fastseg tune: {name}, torch {torch.__version__}, triton {triton.__version__}, {today}"

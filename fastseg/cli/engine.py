"""Engines of many machines: options, the cluster, and a pool of actors that batches go through.

So far the one engine is Ray Data, the one that people who segment pictures already run.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastseg.images.reasons import first_line

from .options import CommandError, note, positive

RAY = "ray"
MAX_BLOCK = 256  # rows that one call of an actor takes, and that its death costs
_BLOCKS = 8  # for each actor at least, so that all end at about the same time
# A line of a traceback; none of Ray's own.
_RAISED = re.compile(r"^(?!ray\.)[\w.]+(?:Error|Exception): .+$", re.MULTILINE)
_INSTALL = 'pip install "fastseg-segformer[ray]"'


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("many machines")
    engine.add_argument(
        "--engine",
        choices=(RAY,),
        help="let a cluster do the work: Ray Data, with actors that keep the model each; needs "
        "fastseg-segformer[ray]",
    )
    engine.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of the cluster, as ray.init takes it (default: the one that runs here or that "
        "RAY_ADDRESS names, else one of this machine alone)",
    )
    engine.add_argument(
        "--num-actors",
        type=positive,
        metavar="N",
        help="how many actors (default: as many as the cluster has room for now)",
    )
    engine.add_argument(
        "--gpus-per-actor",
        type=_share,
        metavar="F",
        help="GPUs of an actor, such as 1, or 0.5 for two on a GPU; 0 runs on the CPU (default: 1 "
        "where the cluster has GPUs, else 0)",
    )
    engine.add_argument(
        "--cpus-per-actor",
        type=positive,
        default=1,
        metavar="N",
        help="CPUs of an actor, and threads of torch in it (default: 1)",
    )


ONLY_WITH_ENGINE = {"address": None, "num_actors": None, "gpus_per_actor": None}
ONLY_WITH_ENGINE["cpus_per_actor"] = 1  # type: ignore[assignment]


def check_engine_options(arguments: argparse.Namespace, refused: Mapping[str, Any]) -> None:
    """Refuse what does not go together: without an engine its options, with one those `refused`.

    Args:
        refused: names of options with the values that they have where they are not given.

    Raises:
        CommandError: names the option.
    """
    wrong = ONLY_WITH_ENGINE if arguments.engine is None else refused
    relation = "only" if arguments.engine is None else "not"
    for name, default in wrong.items():
        if getattr(arguments, name) != default:
            option = "--" + name.replace("_", "-")
            raise CommandError(f"{option}: {relation} with --engine {arguments.engine or RAY}", 2)


@dataclass(frozen=True)
class Cluster:
    """Ray, connected, and the actors that it is to run."""

    actors: int
    cpus: int
    gpus: float

    @property
    def device(self) -> str:
        """Where an actor's model is."""
        return "cuda" if self.gpus else "cpu"

    def __str__(self) -> str:
        each = f"{self.gpus:g} GPU" if self.gpus else f"{self.cpus} CPU{'s' * (self.cpus > 1)}"
        return f"{self.actors} actor{'s' * (self.actors > 1)} of {each}"

    def block(self, rows: int, least: int = 1) -> int:
        """How many of so many rows, or items, one call is to take."""
        return min(max(math.ceil(rows / (self.actors * _BLOCKS)), least), MAX_BLOCK)

    def map(self, worker: type, options: dict[str, Any], blocks: Iterable[Any]) -> Iterator[Any]:
        """What a callable class makes of Arrow tables, as soon as it is there, in any order.

        Each table is one call. Where an actor dies, another takes its place and the call is made
        again; each result comes once.

        Args:
            worker: made with `options` in each actor, and called with a table; gives a table.

        Raises:
            CommandError: it raised an error, in one of the actors.
        """
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is one already
        # That many calls to one actor would leave others without work at the end.
        pool = ray.data.ActorPoolStrategy(size=self.actors, max_tasks_in_flight_per_actor=2)
        rows = ray.data.from_arrow(list(blocks)).map_batches(
            worker,
            fn_constructor_kwargs=options,
            batch_size=None,  # the whole block
            batch_format="pyarrow",
            compute=pool,
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
        )
        try:
            yield from rows.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            )
        except ray.exceptions.RayError as error:
            raise CommandError(f"--engine {RAY}: an actor failed: {_reason(error)}") from error


@contextlib.contextmanager
def connected(arguments: argparse.Namespace) -> Iterator[Cluster]:
    """Connect to the cluster of `add_engine_options`, or begin one on this machine.

    Raises:
        CommandError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CommandError(f"--engine {RAY}: {first_line(error)}: {_INSTALL}", 2) from error
    ours = not ray.is_initialized()
    if ours:
        # Nothing is told to others, and no page is served, unless a user wants that.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"address": arguments.address, "log_to_driver": True}
        try:
            ray.init(**options, logging_level=logging.WARNING)
        except Exception as error:  # of many kinds
            where = arguments.address or "a cluster of this machine"
            raise CommandError(f"--engine {RAY}: {where}: {first_line(error)}") from error
    # What it would say of a failure is told here; its advice is to let rows vanish.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield _sized(arguments, ray.cluster_resources(), ray.available_resources())
    finally:
        if ours:
            ray.shutdown()


def _sized(
    arguments: argparse.Namespace, whole: Mapping[str, float], free: Mapping[str, float]
) -> Cluster:
    """The actors that are asked for, or that there is room for."""
    cpus, gpus = arguments.cpus_per_actor, arguments.gpus_per_actor
    if gpus is None:
        wants_cpu = arguments.device.type == "cpu" and torch.cuda.is_available()
        gpus = 1.0 if whole.get("GPU", 0) >= 1 and not wants_cpu else 0.0
    room = int(free.get("CPU", 0) // cpus)
    if gpus:
        room = min(room, int(free.get("GPU", 0) / gpus + 1e-6))
    actors = arguments.num_actors or max(room, 1)
    if actors > room:
        note(
            f"the cluster has room for {room} of {actors} actors now ({free.get('CPU', 0):g} CPUs "
            f"and {free.get('GPU', 0):g} GPUs are free); the others begin when there is more"
        )
    return Cluster(actors, cpus, gpus)


def _share(text: str) -> float:
    """Option type: GPUs, a number from 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return number


def _reason(error: BaseException) -> str:
    """What the worker raised. Ray hands it on as the text of tracebacks, its own behind it."""
    raised = _RAISED.findall(str(error))
    return raised[-1] if raised else first_line(error)

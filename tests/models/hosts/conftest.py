"""What the tests of hosts share: which files this process collects, and fixtures."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastseg

from .host_models import DEFAULT_FAMILIES, FAMILIES, HOSTS, OPS, WHOLE, Host

collect_ignore_glob: list[str] = []
if not {"transformers4", "transformers5"} & set(FAMILIES):
    collect_ignore_glob.append("test_transformers_*.py")
if "transformers4" not in FAMILIES:  # with the 5 it is in tests/models/seggpt
    collect_ignore_glob.append("test_transformers_seggpt.py")
if "smp" not in FAMILIES:
    collect_ignore_glob.append("test_smp_*.py")


# What depends on a library's version. Of a second one the rest is slow: it was run with the first.
_BY_VERSION = ("test_parity", "test_modes", "test_weights", "test_smp_models")
_BY_VERSION += ("test_transformers_seggpt",)


# Of encoders alone, which whole models have inside, and of classifiers the rest is slow too. One
# of them is a model that has no module around what is accelerated. Of relatives parity is quick.
_OF_ALL_HOSTS = ("test_parity", "test_modes")
_RELATIVES = ("nvlabs-sithu31296", "nvlabs-bubbliiiing", "nvlabs-daformer")
_RELATIVES += ("transformers-glpn", "transformers-pvt_v2")
_QUICK = {*WHOLE, "transformers-base"}
# Graphs take seconds to compile; those of two hosts are made by the same code as the others'.
_COMPILED = ("transformers", "fastseg")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    quick = []
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        of_second = ",".join(FAMILIES) != DEFAULT_FAMILIES and item.path.stem not in _BY_VERSION
        host = getattr(item, "callspec", None) and item.callspec.params.get("host")
        of_part = isinstance(host, Host) and host.name not in _QUICK
        of_graphs = item.path.stem == "test_compile" and isinstance(host, Host)
        is_third = of_graphs and host.name not in _COMPILED
        of_relative = isinstance(host, Host) and host.name in _RELATIVES
        left_out = _OF_ALL_HOSTS[: 1 if of_relative else 2]
        if of_second or is_third or (of_part and item.path.stem not in left_out):
            item.add_marker(pytest.mark.slow)
        elif isinstance(host, Host) and item.path.stem not in _OF_ALL_HOSTS:
            quick.append(item)
    _take_turns(quick)


def _take_turns(items: list[pytest.Item]) -> None:
    """Of each case one host is quick, in turn: the cases of a test are spread over all hosts."""
    cases: dict[str, dict[str, list[pytest.Item]]] = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            function, case = item.nodeid.split("[", 1)
            without_host = case.replace(item.callspec.params["host"].name, "", 1)
            cases.setdefault(function, {}).setdefault(without_host, []).append(item)
    for function, by_case in cases.items():
        for turn, same in enumerate(by_case.values(), zlib.crc32(function.encode())):
            for other in same[: turn % len(same)] + same[turn % len(same) + 1 :]:
                other.add_marker(pytest.mark.slow)


@pytest.fixture(params=HOSTS.values(), ids=HOSTS)
def host(request: pytest.FixtureRequest) -> Host:
    return request.param


@pytest.fixture
def model(host: Host) -> torch.nn.Module:
    """A plain model of `host`; tests accelerate it, and compare with copies of it."""
    return host.build()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96)


class Calls(list):
    """The names of the ops called, one after the other."""

    def count_and_clear(self) -> dict[str, int]:
        counts = dict(Counter(self))
        self.clear()
        return counts


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Grows by a name for each call of an op: what proves that the fast path ran."""
    made = Calls()

    # While torch.compile traces, it runs as Python, and the graph does not depend on the list.
    @torch.compiler.assume_constant_result
    def note(name):
        made.append(name)

    def counted(name, op):
        def call(*args, **kwargs):
            note(name)
            return op(*args, **kwargs)

        return call

    accelerate = fastseg.accelerate

    def accelerate_unheard(model, **options):
        """It tries ops out on copies."""
        before = len(made)
        result = accelerate(model, **options)
        del made[before:]
        return result

    monkeypatch.setattr(fastseg, "accelerate", accelerate_unheard)
    for name in OPS:
        monkeypatch.setattr(fastseg.kernels, name, counted(name, getattr(fastseg.kernels, name)))
    return made

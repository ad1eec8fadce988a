"""Options of the suites, and what their tests share.

    pytest bench/suites --benchmark-only
    pytest bench/suites --benchmark-only --variants b0,b2 --providers fastseg-eager -k forward

pytest-benchmark's options save and compare runs. It runs each benchmark by itself; rows for the
tables come from `python -m bench`, which takes turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.arguments import VARIANTS, positive, size, some_of
from bench.context import DTYPES, Context, Setting, context
from bench.label_cases import LABEL_CASES
from bench.machine import commit, cpu_name, pinned_threads
from bench.op_cases import OPS
from bench.op_rows import PROVIDERS as OP_PROVIDERS
from bench.providers import PROVIDERS, SLOW_TO_BUILD_ON_A_CPU


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("fastseg").addoption
    on_gpu = torch.cuda.is_available()
    add("--variants", type=_type(some_of(VARIANTS)), default=list(VARIANTS), help="default: all")
    add("--size", type=_type(size), default=(512, 512), metavar="512|1024x2048", help="of images")
    add("--batch", type=_type(positive), default=1, help="images in a forward")
    add("--dtype", choices=list(DTYPES), default="bfloat16" if on_gpu else "float32")
    add("--providers", type=_type(some_of(PROVIDERS)), default=None, help="default: all")
    add("--device", default="cuda" if on_gpu else "cpu", help="default: cuda where there is one")
    add("--threads", type=_type(positive), default=2, help="of torch (default: 2)")


def _type(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """pytest passes defaults through a type as well."""

    def convert(value: Any) -> Any:
        return parse(value) if isinstance(value, str) else value

    return convert


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Variants, providers, ops and logits, as the options say."""
    option = metafunc.config.option
    names = option.providers or [
        name for name in PROVIDERS if option.device != "cpu" or name not in SLOW_TO_BUILD_ON_A_CPU
    ]
    # A provider is built once for all tests of it.
    for fixture, values in (
        ("setting", [Setting(v, option.size, option.batch, option.dtype) for v in option.variants]),
        ("provider", names),
    ):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, values, ids=str, indirect=True, scope="module")
    for argument, values in (("op", OPS), ("op_provider", OP_PROVIDERS), ("logits", LABEL_CASES)):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, list(values))


@pytest.fixture(autouse=True, scope="session")
def machine_settings(request: pytest.FixtureRequest, device: torch.device) -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = False  # float32 is IEEE on all sides
    with pinned_threads(request.config.option.threads, device):
        yield


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.option.device)


@pytest.fixture(scope="module")
def setting(request: pytest.FixtureRequest) -> Setting:
    return request.param


@pytest.fixture(scope="module")
def provider(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def setting_context(
    setting: Setting, device: torch.device, request: pytest.FixtureRequest
) -> Iterator[Context]:
    with torch.no_grad(), context(setting, device, request.config.option.threads) as made:
        yield made


@pytest.fixture(scope="session")
def facts(device: torch.device) -> dict[str, Any]:
    """What each figure is stored with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


@pytest.fixture
def timed(benchmark: Any, facts: dict[str, Any], device: torch.device) -> Callable[..., None]:
    """`timed(group, function, parity_error)`: time a function whose result is right."""

    def run(group: str, function: Callable[[], object], parity_error: float) -> None:
        def call() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.group = group
        benchmark.extra_info.update(facts, parity_error=parity_error)
        with torch.inference_mode():
            call()
            benchmark(call)

    return run

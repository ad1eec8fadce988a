"""A turn of a side of `python -m bench host-time`: what calls cost before a GPU has anything to do.

    python host_time_side.py FOLDER VARIANT ...

It prints, as JSON, microseconds by variant and part. Kernels are neither compiled nor launched:
Triton has a driver without a device, and its launches end in a function that does nothing. So do
captured graphs. What is measured is Python: checks, tables, binding, allocation.

Of fastseg it uses what the first commit had, or what came in its place.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

_SECONDS = 2.0  # that a part is measured for
_BURST = 10  # calls of which the quickest counts


def main(folder: str, *variants: str) -> None:
    """Import fastseg, which must come from `folder` as a whole, and measure it."""
    # An editable installation would lend modules that this side does not have.
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not getattr(finder, "__module__", "").startswith("__editable__")
    ]
    sys.path[0] = folder
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    pretend_gpu()
    answers.write(json.dumps({variant: measure(variant) for variant in variants}))


def measure(variant: str) -> dict[str, list[float]]:
    """Microseconds of each part."""
    import fastseg

    model = fastseg.from_preset(f"segformer_{variant}", num_classes=150)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    pixels = torch.zeros(1, 3, 512, 512, dtype=torch.bfloat16)
    calls = refresh_calls(model, pixels)
    return {
        "forward": quickest(lambda: model(pixels)),
        "replay": quickest(replaying(model, pixels)),
        "refresh": quickest(lambda: [call() for call in calls]),
    }


def quickest(function: Callable[[], Any]) -> list[float]:
    """The quickest of each burst of calls, microseconds."""
    for _ in range(5):
        function()
    found: list[float] = []
    stop = time.perf_counter() + _SECONDS
    while len(found) < 3 or time.perf_counter() < stop:
        burst = []
        for _ in range(_BURST):
            begun = time.perf_counter()
            function()
            burst.append(time.perf_counter() - begun)
        found.append(1e6 * min(burst))
    return found


def replaying(model: Any, pixels: torch.Tensor) -> Callable[[], Any]:
    """A call that replays a graph, which checks the weights and copies nothing out."""
    runner = _find("cuda_graphs.runner", "graphed").GraphedModel
    graphed = runner(model, capturer=_Capturer(), copy_outputs=False)
    for _ in range(3):
        graphed(pixels)
    assert "1 replays" in graphed.report(), graphed.report()
    return lambda: graphed(pixels)


def refresh_calls(model: Any, pixels: torch.Tensor) -> list[Callable[[], Any]]:
    """What a graph of torch.compile runs to keep its weights fresh."""
    found = []

    class Finder(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if "refresh_folds" in str(target):
                found.append(lambda: target(*args, **kwargs))
            return super().call_function(target, args, kwargs)

    torch.compile(model, backend=lambda graph, _: Finder(graph).run)(pixels)
    torch.compiler.reset()
    assert found
    return found


# What stands in for a GPU


def _find(*names: str) -> Any:
    """The first module of fastseg of these names that there is."""
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"fastseg.{name}")
    raise ModuleNotFoundError(f"fastseg has none of {names}")


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


class _Kernel:
    """A compiled kernel, as Triton's launch uses it."""

    function, packed_metadata = 1, (4, 1, 1000)

    def launch_metadata(self, *arguments: Any) -> Any:
        return None

    def run(self, *arguments: Any) -> None:
        pass

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, stream: int) -> None:
            metadata = self.launch_metadata(grid, stream, *arguments)
            self.run(*grid, stream, 1, self.packed_metadata, metadata, None, None, *arguments)

        return launch


def pretend_gpu() -> None:
    """Send the ops of tensors on this CPU through the launchers of a GPU's kernels."""
    from triton.runtime import driver, jit

    def compile_nothing(self: Any, key: Any, signature: Any, device: int, *rest: Any) -> _Kernel:
        self.device_caches[device][0][key] = _Kernel()
        return self.device_caches[device][0][key]

    driver.set_active(_Driver())
    jit.JITFunction._do_compile = compile_nothing
    _find("kernels.core.dispatch", "kernels.backend")._device_reason = lambda *_: None
    configurations = _find("kernels.core.configurations", "kernels.configs")
    configurations.device_family = lambda device: "sm_90"
    registry = _find("kernels.core.registry", "kernels.library")
    importlib.import_module("fastseg")
    if hasattr(registry, "OPS"):
        fused = {name: op.flat(op.fused) for name, op in registry.OPS.items()}
    else:
        fused = registry.FUSED
    for name, launcher in fused.items():
        registry._LIBRARY.impl(name, launcher, "CPU", allow_override=True)


class _Capturer:
    """A capturer whose graphs do nothing."""

    output: Any = None
    held_bytes = 0

    def declines(self, device: torch.device) -> None:
        return None

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Any:
        yield

    def capture(self, device: torch.device, function: Callable[[], Any], inputs: Any) -> Any:
        capture = _Capturer()
        capture.output = function()
        return capture

    def replay(self, inputs: Any) -> None:
        pass

    def release(self) -> None:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])

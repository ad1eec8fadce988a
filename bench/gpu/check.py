"""`python -m bench.gpu.check`: what this machine has, and whether anything runs.

It prints what it finds. The status is 1 where something fails without which there is nothing to
measure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import time

from ..machine import version

# fastseg needs the first, the kernels triton; the rest are for some stages.
_DISTRIBUTIONS = (
    *("torch", "numpy", "safetensors", "pillow", "triton", "transformers", "tqdm", "pytest"),
    *("pytest-xdist", "hypothesis", "matplotlib", "pandas", "tabulate", "torch-tensorrt"),
)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    on_gpu = parser.parse_args().device == "cuda"
    print(f"Python {platform.python_version()}, {sys.executable}")
    print(f"{platform.platform()}, {os.cpu_count()} cores", flush=True)
    failures = []
    for check in (_smi, _cuda, _kernel, _fastseg) if on_gpu else (_fastseg,):
        name, began = check.__name__.strip("_"), time.monotonic()
        try:
            check()
        except Exception as error:  # of any library: what comes after it is told all the same
            failures.append(f"{name}: {type(error).__name__}: {error}".replace("\n", " "))
        print(f"{name} took {time.monotonic() - began:.1f} s", flush=True)
    versions = {name: version(name) or "not installed" for name in _DISTRIBUTIONS}
    print(", ".join(f"{name} {found}" for name, found in versions.items()))
    print("; ".join(failures), end="\n" if failures else "")
    return int(bool(failures))


def _smi() -> None:
    query = "driver_version,memory.free,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query},power.limit", "--format=csv"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # as of AMD: no failure
        subprocess.run(command, timeout=30, check=True)


def _cuda() -> None:
    import torch

    print(torch.cuda.get_device_properties(0), f"CUDA {torch.version.cuda or torch.version.hip}")
    x = torch.ones(256, 256, device="cuda")
    if (x @ x)[0, 0].item() != 256:
        raise RuntimeError("a matrix product is wrong")


def _kernel() -> None:
    import torch

    import fastseg

    x = torch.randn(100, 64, device="cuda")
    with fastseg.backend("triton"):
        result = fastseg.kernels.layer_norm(x)
    torch.testing.assert_close(result, torch.nn.functional.layer_norm(x, (64,)))


def _fastseg() -> None:
    import fastseg.cli

    if fastseg.cli.main(["info"]) != 0:  # it prints
        raise RuntimeError("`fastseg info` failed")


if __name__ == "__main__":
    sys.exit(main())

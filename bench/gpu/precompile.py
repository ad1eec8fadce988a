"""`python -m bench.gpu.precompile`: kernels of forwards, compiled in processes, before any stage.

Each stage after it finds them in Triton's cache. The status is 1 where one does not compile.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import as_completed

import torch

from fastseg.kernels.core.configurations import device_family
from fastseg.kernels.tune.precompile import Precompiler, present_target

from ..setting import DTYPES
from ..work import trace_model
from .forwards import FORWARDS

_QUICK = 16  # launches


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.precompile")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    target = family = "sm_90"  # to try the script itself
    if given.device == "cuda":
        target, family = present_target(), device_family(torch.device("cuda"))
    began, begun = time.monotonic(), set()
    with Precompiler(target) as pool:
        for variant, size, batch, dtype in FORWARDS[: 1 if given.quick else None]:
            launches = trace_model(variant, size, batch, DTYPES[dtype], family).launches
            begun |= {*pool.begin(launches[: _QUICK if given.quick else None])}
        done = [one.result() for one in as_completed(begun)]
    failures = [f"{one.kernel}: {one.error}" for one in done if one.error]
    print(*failures, sep="\n", end="\n" * bool(failures))
    print(
        f"{len(done)} kernels for {target} in {time.monotonic() - began:.0f} s, of "
        f"{sum(one.seconds for one in done):.0f} s of one process; {len(failures)} do not compile"
    )
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())

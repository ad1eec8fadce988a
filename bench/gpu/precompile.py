"""`python -m bench.gpu.precompile`: kernels of forwards, compiled in processes, before any stage.

Each stage after it finds them in Triton's cache. The status is 1 where one does not compile.
"""

from __future__ import annotations

import argparse
import sys
import time

from fastseg.kernels.core.configurations import FAMILIES
from fastseg.kernels.tune.precompile import precompile

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
    target = "sm_90"  # to try the script itself
    if given.device == "cuda":
        from fastseg.kernels.tune.precompile import present_target

        target = present_target()
    family = f"{target[:-1]}0" if f"{target[:-1]}0" in FAMILIES else "default"
    began, failures = time.monotonic(), []
    launches = [
        launch
        for variant, size, batch, dtype in FORWARDS[: 1 if given.quick else None]
        for launch in trace_model(variant, size, batch, DTYPES[dtype], family).launches
    ]
    launches = launches[: _QUICK if given.quick else None]
    seconds = []
    for done in precompile(launches, target):
        seconds.append(done.seconds)
        if done.error:
            failures.append(done)
            print(f"{done.kernel}: {done.error}", flush=True)
    print(
        f"{len(seconds)} kernels for {target} in {time.monotonic() - began:.0f} s, of "
        f"{sum(seconds):.0f} s of one process; {len(failures)} do not compile"
    )
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())

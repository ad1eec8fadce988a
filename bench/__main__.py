"""`fastseg bench` (`python -m bench`): times models, or with a name or `--compare` something else.

python -m bench                forwards, images to label maps, label maps alone, memory
python -m bench ops            each op of a forward
python -m bench hosts          other libraries' models before and after fastseg.accelerate
python -m bench seggpt         SegGPT: forwards, label maps by prompts, post-processing, memory
python -m bench training       training steps: time and memory
python -m bench predict        folders of photographs by `fastseg predict`
python -m bench engines        the same by Ray, with one and two actors, and by a plain loop
python -m bench numerics       each precision: mIoU, and errors against float64
python -m bench host-time      what a call costs before a GPU has anything to do
python -m bench --compare REV  is the code here slower than a commit?
python -m bench gpu            all that is to be known of a machine with a GPU
python -m bench compiles       what the kernels take, compiled for GPUs that are not here
python -m bench tables, plots  tables and pictures of the rows
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

_MODULES = {
    "compare": "compare",
    "compiles": "measure.compiles",
    "engines": "engines",
    "gpu": "gpu.__main__",
    "host-time": "host_time",
    "plots": "report.pictures",
    "predict": "predict",
    "tables": "report.documents",
}
_MEASURING = ("ops", "hosts", "seggpt", "training", "numerics")


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the command line to the module that it is for."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word.partition("=")[0] == "--compare" for word in argv):
        argv.insert(0, "compare")
    if argv and argv[0] in _MODULES:
        return int(importlib.import_module(f"bench.{_MODULES[argv[0]]}").main(argv[1:]))
    from .measure.run import main as measure

    command = argv.pop(0) if argv and argv[0] in _MEASURING else ""
    return measure(argv, command)


if __name__ == "__main__":
    sys.exit(main())

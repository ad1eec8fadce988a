"""`fastseg bench` (`python -m bench`): the grid, or with `--compare` or a name something else.

`fastseg bench ops ...` is `python -m bench.ops ...`, and so on for the names in COMMANDS.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# What they are for stands in their own docstrings.
COMMANDS = ("ops", "hosts", "gpu", "plots", "table", "roofline", "compiles")


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the command line to the module that it is for."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        name, argv = argv[0], argv[1:]
    elif any(word.partition("=")[0] == "--compare" for word in argv):
        name = "compare"  # it does without transformers
    else:
        name = "grid"
    module = importlib.import_module(f"bench.{name}")
    if name == "plots":
        module = importlib.import_module("bench.plots.__main__")
    return int(module.main(argv))


if __name__ == "__main__":
    sys.exit(main())

"""What the tuner tries for each configuration: of the ops, and of what several ops share."""

from __future__ import annotations

from ..blocks.linear import linear_candidates
from ..core.configurations import Candidates, Config, Query
from ..core.registry import OPS
from ..loss.op import CANDIDATES


def candidates(query: Query) -> list[Config]:
    """Configurations to try for `query`."""
    return by_kernel()[query.kernel](query.dtype == "half", dict(query.sizes))


def by_kernel() -> dict[str, Candidates]:
    """What to try, by the name that is looked up."""
    found: dict[str, Candidates] = {"linear": linear_candidates, **CANDIDATES}
    for op in OPS.values():
        found.update(op.candidates)
    return found

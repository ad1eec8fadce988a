"""What a forward is traced for."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return whether `torch.export` traces this, and not `torch.compile`.

    torch 2.11 traces `torch.compiler.is_exporting` itself as True in every graph.
    """
    return torch.compiler.is_exporting()

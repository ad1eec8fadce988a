"""Triton where it is installed; stand-ins elsewhere, so that files with kernels still import."""

from types import SimpleNamespace
from typing import Any

triton: Any
tl: Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=lambda value=None: value)
    HAS_TRITON = False
else:
    HAS_TRITON = True


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU: TRITON_INTERPRET=1 at import."""
    return HAS_TRITON and bool(triton.knobs.runtime.interpret)

"""Triton where it is installed; stand-ins elsewhere, so that files with kernels still import."""

from types import SimpleNamespace
from typing import Any

try:
    import triton as _triton
    import triton.language as _language
except ImportError:
    HAS_TRITON = False
    _triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda made: made))
    _language = SimpleNamespace(constexpr=lambda value=None: value)
else:
    HAS_TRITON = True

triton: Any = _triton
tl: Any = _language


# Asked once, as triton itself does: graphs of torch.compile cannot ask.
_INTERPRETING = HAS_TRITON and bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter, on a CPU: TRITON_INTERPRET=1."""
    return _INTERPRETING

"""Why something failed, in a line for people."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The reason an error gives, in one line; its class where that says more."""
    reason = getattr(error, "strerror", None) or str(error)  # without the number and the path
    reason = reason.strip().split("\n")[0]
    telling = (OSError, ValueError, TypeError, RuntimeError, SyntaxError, ImportError)
    if reason and isinstance(error, telling):
        return reason
    return ": ".join(filter(None, [type(error).__name__, reason]))

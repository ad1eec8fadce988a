"""Report of what a load did with each tensor; and the error of one that failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model."""


class CheckpointWarning(UserWarning):
    """A checkpoint was loaded, but not as it is: weights left out, or newly initialised."""


@dataclass(frozen=True)
class Mismatch:
    """A tensor of another shape (or kind of number) than the model's."""

    name: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.name}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class LoadReport:
    """Differences of file and model; on the model as `model.load_report`.

    missing: tensors of the model that the file does not have.
    unexpected: tensors of the file that the model has no use for.
    mismatched: tensors that are in both, with different shapes.
    reinitialized: tensors of the model that hold new values: the missing and mismatched ones, and
        what shares a layer's initialisation with them.
    notes: what else was decided, such as which of a file's two sets of weights was taken.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()
    reinitialized: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Return whether there is anything to report."""
        return any(dataclasses.astuple(self))

    def __str__(self) -> str:
        return "\n".join(
            [
                *(f"  {note}" for note in self.notes),
                *section("newly initialised, to be trained before use", self.reinitialized),
                *section("of another shape in the file", self.mismatched),
                *section("in the file, not used", self.unexpected),
            ]
        )


def section(title: str, lines: Iterable[object]) -> list[str]:
    """`title (count):` and the indented lines under it; nothing where there are none."""
    lines = list(lines)
    return [f"  {title} ({len(lines)}):", *(f"    {line}" for line in lines)] if lines else []

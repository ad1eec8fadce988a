"""Providers whose results passed their parity gate: the others are skipped, or fail, with why."""

from __future__ import annotations

import pytest

from bench import cases
from bench.cases import Built, Pipelines
from bench.context import Context


def build(context: Context, name: str) -> Built:
    """The provider `name`, checked; ends the test where it cannot run or is wrong."""
    skipped: list[str] = []
    red: list[str] = []
    found = cases.build(
        context, [name], lambda _, why: skipped.append(why), lambda _, why: red.append(why)
    )
    _end(name, skipped, red)
    return found[name]


def pipeline(context: Context, name: str, built: Built) -> Pipelines:
    """The way from images to label maps with that provider, checked."""
    skipped: list[str] = []
    red: list[str] = []
    found = cases.pipelines(
        context, {name: built}, lambda _, why: skipped.append(why), lambda _, why: red.append(why)
    )
    if not (found.steps or skipped or red):
        skipped.append("it has no image processor of its own")
    _end(name, skipped, red)
    return found


def _end(name: str, skipped: list[str], red: list[str]) -> None:
    if red:
        pytest.fail(f"{name}: no figure, {red[0]}", pytrace=False)
    if skipped:
        pytest.skip(f"{name}: {skipped[0]}")

"""What is told of a search for pictures, and the look at the output folder before it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from fastseg.images.formats import CONVERT, HEIF_SUFFIXES, INSTALL_HEIF
from fastseg.images.reasons import first_line

from .options import CommandError, note, say
from .search import ImageFiles


def tell(place: str, reason: str) -> None:
    tqdm.write(f"{place}: {reason}", file=sys.stderr)  # a progress bar stays whole


def report_search(images: ImageFiles) -> None:
    """Tell what was left out."""
    if images.own:
        note(f"{images.own} outputs of earlier runs left out")
    if images.unreadable:
        advice = CONVERT
        if HEIF_SUFFIXES & images.unreadable.keys():
            advice += f", or {INSTALL_HEIF}"
        say(f"{_counted(images.unreadable)}: fastseg cannot read these formats; {advice}")
    if images.skipped:
        note(
            f"files of other kinds left out: {_counted(images.skipped)} "
            "(a file that is named itself is read whatever its kind)"
        )


def _counted(suffixes: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))


def check_output(folder: Path) -> None:
    """Before hours of work, none of which could be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {folder}: {first_line(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"--output {folder}: no permission to write there")

"""An importable fastseg out of a checkout that is not installed.

A checkout on the path would show the top-level name `kernels` to transformers, which takes it for
Hugging Face's package; and where the checkout's own link fastseg/kernels became a text file on its
way, fastseg would not import. The layout is a folder of links that holds `fastseg`, `bench` and
`tests` and nothing else. It lies among the results: the checkout stays as it is, whatever becomes
of the run.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make(folder: Path, root: Path = ROOT) -> Path:
    """Make the layout of the checkout `root` in `folder`, anew where there is one; gives `folder`.

    Raises:
        FileNotFoundError: `root` is not a checkout.
    """
    for name in ("fastseg", "kernels", "bench", "tests"):
        if not (root / name / "__init__.py").is_file():
            raise FileNotFoundError(f"{root}: expected a checkout of fastseg with {name}/ in it")
    shutil.rmtree(folder, ignore_errors=True)  # of links: it does not follow them
    package = folder / "fastseg"
    package.mkdir(parents=True)
    for entry in (root / "fastseg").iterdir():
        if entry.name not in ("__pycache__", "kernels"):
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(root / "kernels")
    for name in ("bench", "tests"):
        (folder / name).symlink_to(root / name)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """The variables of processes that import from the layout, without a network."""
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }

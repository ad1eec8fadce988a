"""The documentation as pages: no warnings, every public name, nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_public_name_has_its_place():
    import fastseg

    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    names = [f"fastseg.{name}" for name in fastseg.__all__]
    names += [f"fastseg.kernels.{name}" for name in fastseg.kernels.__all__ if name != "backend"]
    assert sorted(shown) == sorted(names)


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert sorted(listed) == sorted(pages)


@pytest.mark.slow
def test_pages(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fastseg.accelerate" in (tmp_path / "api" / "accelerate.html").read_text()
    loads = re.compile(
        r"""(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href|<img[^>]*src)="(http[^"]*)"""
    )
    for page in tmp_path.rglob("*.html"):
        assert not loads.findall(page.read_text()), page

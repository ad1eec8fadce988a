"""What is built from the checkout: wheels and sdists with real files, with and without links."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# An op, folded models, the configurations of kernels, the embedded model.
USE = """
import sys, torch, fastseg
from fastseg.kernels.core.configurations import family_entries
assert fastseg.__file__.startswith(sys.argv[1]), fastseg.__file__
assert fastseg.kernels.__file__.startswith(sys.argv[1]), fastseg.kernels.__file__
assert torch.equal(fastseg.kernels.layer_norm(torch.eye(3)).argmax(1), torch.arange(3))
assert family_entries("sm_90")
from fastseg.cli import main
sys.exit(main(["demo", "--output", sys.argv[2]]))
"""


def modules() -> set[str]:
    """Files of the packages as an installation has them."""
    files = {
        *(ROOT / "fastseg").rglob("*.py"),
        *(ROOT / "fastseg" / "demo" / "assets").rglob("*.*"),
        *(ROOT / "fastseg" / "images").rglob("*.json"),
        *(ROOT / "kernels").rglob("*.py"),
        *(ROOT / "kernels").rglob("*.json"),
    }
    names = {path.relative_to(ROOT).as_posix() for path in files}
    names = {name for name in names if not name.startswith("fastseg/kernels/")}  # the link
    names = {f"fastseg/{name}" if name.startswith("kernels/") else name for name in names}
    return {*names, "fastseg/py.typed"}


def test_packages_are_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {name.rpartition("/")[0] for name in modules() if name.endswith("/__init__.py")}
    assert sorted(folder.replace("/", ".") for folder in folders) == listed


def test_the_link():
    assert os.readlink(ROOT / "fastseg" / "kernels") == "../kernels"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`build(kind, links)`: a "wheel" or "sdist" of a copy of what git would commit.

    Without `links` the link is a text file, as git on Windows and some archives have it.
    """

    def make(kind: str, links: bool) -> Path:
        folder = tmp_path_factory.mktemp(f"{kind}-{links}")
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        wanted = ("fastseg/", "kernels/", "pyproject.toml", "README.md", "LICENSE")
        for name in filter(None, names.split("\0")):
            source, target = ROOT / name, folder / "checkout" / name
            if not name.startswith(wanted) or not os.path.lexists(source):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if not source.is_symlink():
                target.write_bytes(source.read_bytes())
            elif links:
                target.symlink_to(os.readlink(source))
            else:
                target.write_text(os.readlink(source))
        # The build backend itself: no isolated environment, which would want a network.
        code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder / "checkout",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
        return built

    return make


@pytest.mark.every(2)
@pytest.mark.parametrize("links", [True, False])
def test_a_wheel_holds_all_files(build, links):
    with zipfile.ZipFile(build("wheel", links)) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert inside == modules()
        assert not [i.filename for i in wheel.infolist() if (i.external_attr >> 28) == 0xA]


@pytest.mark.parametrize("links", [True, False])
def test_an_sdist_holds_real_files(build, links):
    with tarfile.open(build("sdist", links)) as sdist:
        members = {m.name.partition("/")[2]: m for m in sdist.getmembers() if not m.isdir()}
        assert not [name for name, member in members.items() if not member.isfile()]
    wanted = {
        name.removeprefix("fastseg/") if name.startswith("fastseg/kernels/") else name
        for name in modules()
    }
    assert wanted <= members.keys()


def test_an_index_takes_the_metadata(build):
    from twine.commands.check import check

    assert not check([str(build("wheel", links=True))], strict=True)


@pytest.mark.slow
def test_an_installed_wheel_runs(build, tmp_path):
    """Outside of the checkout, and with no other fastseg; torch and the rest are this process'."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    wheel = str(build("wheel", links=True))
    subprocess.run([*install, "--target", str(site), wheel], check=True, capture_output=True)
    # Without the module site there are no .pth files, and so no editable installation.
    packages = [str(site), *(path for path in sys.path if path.endswith("-packages"))]
    done = subprocess.run(
        [sys.executable, "-S", "-c", USE, str(site), str(tmp_path / "output")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "scene_overlay.png").stat().st_size > 10_000

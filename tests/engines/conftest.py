"""A Ray cluster of this machine, pictures and a tiny model; skipped where Ray is not installed.

`make test-all` runs these with Ray, and with Dask, Daft and Spark, in folders of their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.cli_cases import photo, save_model

ROOT = Path(__file__).parents[2]
HAS_RAY = find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: `make test-all` does it")
TOKEN = "FASTSEG_TEST_CLUSTER"
BROKEN = ("cut.jpg", "empty.png", "text.png")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of processes with Ray that ask and tell nobody."""
    packages = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        **{"PYTHONPATH": os.pathsep.join(packages), "RAY_USAGE_STATS_ENABLED": "0"},
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", TOKEN: str(os.getpid())},
    }


@pytest.fixture(scope="session")
def cluster(environment) -> Iterator[None]:
    """Ray with three CPUs, in this process. On a busy machine its processes may be late."""
    if not HAS_RAY:
        pytest.skip("Ray is not installed: `make test-all` does it")
    import ray

    before = dict(os.environ)
    os.environ.update(environment)
    # Sockets lie in it, whose paths are short.
    folder = tempfile.mkdtemp(prefix="ray")
    options = {"num_cpus": 3, "include_dashboard": False, "object_store_memory": 100_000_000}
    options |= {"_temp_dir": folder, "_node_ip_address": "127.0.0.1", "logging_level": "ERROR"}
    for left in (2, 1, 0):
        try:
            ray.init(address="local", log_to_driver=False, **options)
            break
        except Exception:
            ray.shutdown()
            if not left:
                raise
            time.sleep(5)
    yield
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Forty pictures in two folders, of two shapes, three of which are broken."""
    folder = tmp_path / "in"
    for index in range(37):
        path = folder / f"{index % 2}" / f"{index:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        name = ("coffee", "astronaut", "chelsea")[index % 3]
        photo(name, ((160, 120), (120, 160))[index % 2]).save(path)
    (folder / BROKEN[0]).write_bytes((folder / "0" / "00.jpg").read_bytes()[:700])
    (folder / BROKEN[1]).touch()
    (folder / BROKEN[2]).write_text("no picture")
    return folder


def actors(name: str = "Segmenter") -> list[int]:
    """Process ids of the actors of clusters that these tests have begun."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not process.name.isdecimal():
                continue
            if TOKEN.encode() not in (process / "environ").read_bytes():
                continue
            command = (process / "cmdline").read_bytes().decode(errors="replace")
            if command.startswith("ray::") and "MapWorker" in command and name in command:
                found.append(int(process.name))
    return sorted(found)


def label_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*_labels.png"))
    }


def is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception:
        return False
    return True

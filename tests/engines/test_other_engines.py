"""`fastseg.Segmenter` under Ray Data, Spark, Dask and Daft: the rows of a plain loop.

What runs are the blocks of docs/distributed.md.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import fastseg
from tests.engines.conftest import ROOT, needs_ray

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def needs(name: str) -> pytest.MarkDecorator:
    reason = f"{name} is not installed: `make test-all` does it"
    return pytest.mark.skipif(find_spec(name) is None, reason=reason)


@pytest.fixture
def paths(pictures) -> list[str]:
    """Some of the pictures, the broken ones among them."""
    return sorted(str(path) for path in pictures.rglob("*") if path.is_file())[15:]


@pytest.fixture
def expected(model_folder, paths) -> list[dict[str, Any]]:
    """Of a plain loop without pyarrow."""
    segmenter = fastseg.Segmenter(model_folder, labels="rle")
    rows = []
    for path in paths:
        columns = segmenter({"path": [path]})
        rows.append({name: values[0] for name, values in columns.items()})
    assert sum(row["error"] is not None for row in rows) == 3
    return rows


@pytest.fixture
def run(model_folder, paths):
    """What the block under a heading of the page names `rows`, with a model that is there."""

    def run(heading: str) -> list[dict[str, Any]]:
        section = PAGE.split(f"\n### {heading}\n" if heading else "\n## In your own job\n")[1]
        block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
        assert block is not None
        # Not the key of a dictionary.
        code = re.sub(r'"model"(?!:)', repr(str(model_folder)), block[1])
        names: dict[str, Any] = {"paths": paths, "__name__": "block"}
        exec(compile(code, str(ROOT / "docs" / "distributed.md"), "exec"), names)
        return names["rows"]

    return run


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Python's own types."""
    found = {name: row[name] for name in fastseg.Segmenter.schema().names}
    for name in ("classes", "pixels"):
        found[name] = None if found[name] is None else [int(one) for one in found[name]]
    if found["labels"] is not None:
        found["labels"] = bytes(found["labels"])
    return found


def check(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    found = sorted(map(plain, rows), key=lambda row: row["path"])
    assert found == sorted(expected, key=lambda row: row["path"])


def test_a_plain_call(run, expected):
    check(run(""), expected)


@needs_ray
def test_ray_data(run, cluster, expected):
    check(run("Ray Data"), expected)


@needs("dask")
def test_dask(run, expected):
    check(run("Dask"), expected)


@needs("daft")
def test_daft(run, expected):
    check(run("Daft"), expected)


@pytest.fixture
def spark(tmp_path, monkeypatch):
    """The session that the block gets: of this machine, with two workers."""
    before = os.environ.get("PYTHONPATH", "")
    environment = {"PYSPARK_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{before}"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    for name in ("spark.driver.host", "spark.driver.bindAddress"):
        builder = builder.config(name, "127.0.0.1")
    builder = builder.config("spark.sql.warehouse.dir", str(tmp_path / "warehouse"))
    try:
        session = builder.getOrCreate()
    except PySparkException as error:
        if "JAVA" in str(error).upper():
            pytest.skip(f"Spark needs Java: {error}")
        raise
    yield session
    session.stop()


@needs("pyspark")
def test_spark(run, spark, expected, paths, model_folder):
    check(run("Spark"), expected)
    # Arrow's batches, without pandas between.
    from pyspark.sql.pandas.types import from_arrow_schema

    found = spark.createDataFrame([(path,) for path in paths], "path string").mapInArrow(
        arrow_of(model_folder), from_arrow_schema(fastseg.Segmenter.schema())
    )
    check([row.asDict() for row in found.collect()], expected)


def arrow_of(model: Path):
    def segment(batches):
        import pyarrow

        segmenter = fastseg.Segmenter(model, labels="rle")
        for batch in batches:
            yield from segmenter(pyarrow.table({"path": batch["path"]})).to_batches()

    return segment

"""`fastseg.Segmenter` under Dask, Daft and Spark: the rows of a plain loop, by ten lines each.

The same lines are in docs/distributed.md.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import pytest

import fastseg
from tests.engines.conftest import ROOT

pytestmark = pytest.mark.slow


def needs(name: str) -> pytest.MarkDecorator:
    reason = f"{name} is not installed: `make test-all` does it"
    return pytest.mark.skipif(find_spec(name) is None, reason=reason)


@pytest.fixture
def paths(pictures) -> list[str]:
    """Some of the pictures, broken ones among them."""
    return sorted(str(path) for path in pictures.rglob("*") if path.is_file())[15:]


@pytest.fixture
def expected(model_folder, paths) -> list[dict[str, Any]]:
    segmenter = fastseg.Segmenter(model_folder, labels="rle", device="cpu")
    rows: list[dict[str, Any]] = []
    for start in range(0, len(paths), 7):  # a plain loop
        columns = segmenter({"path": paths[start : start + 7]})
        rows += [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
    assert sum(row["error"] is not None for row in rows) == 3
    return rows


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Python's own types."""
    found = {}
    for name in fastseg.Segmenter.schema().names:
        value = row[name]
        if name in ("classes", "pixels") and value is not None:
            value = [int(one) for one in value]
        elif name in ("width", "height") and value is not None:
            value = int(value)
        elif name == "labels" and value is not None:
            value = bytes(value)
        found[name] = value
    return found


def check(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    found = sorted(map(plain, rows), key=lambda row: row["path"])
    assert found == sorted(expected, key=lambda row: row["path"])


@needs("pyspark")
def test_spark(model_folder, paths, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{before}")
    from pyspark.sql import SparkSession
    from pyspark.sql.pandas.types import from_arrow_schema

    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    for name in ("spark.driver.host", "spark.driver.bindAddress"):
        builder = builder.config(name, "127.0.0.1")
    builder = builder.config("spark.sql.warehouse.dir", str(tmp_path / "warehouse"))
    try:
        spark = builder.getOrCreate()
    except Exception as error:
        if "Java" in str(error) or "JAVA" in str(error):
            pytest.skip(f"Spark needs Java: {error}")
        raise
    model = str(model_folder)

    def segment(frames):
        segmenter = fastseg.Segmenter(model, labels="rle", device="cpu")
        for frame in frames:
            yield segmenter(frame)

    try:
        pictures = spark.createDataFrame([(path,) for path in paths], "path string").repartition(2)
        schema = from_arrow_schema(fastseg.Segmenter.schema())
        check([row.asDict() for row in pictures.mapInPandas(segment, schema).collect()], expected)
        # Arrow's batches, without pandas between.
        check(
            [row.asDict() for row in pictures.mapInArrow(arrow_of(model), schema).collect()],
            expected,
        )
    finally:
        spark.stop()


def arrow_of(model: str):
    def segment(batches):
        import pyarrow

        segmenter = fastseg.Segmenter(model, labels="rle", device="cpu")
        for batch in batches:
            yield from segmenter(pyarrow.table(batch)).to_batches()

    return segment


@needs("dask")
def test_dask(model_folder, paths, expected):
    import dask
    import dask.bag

    def segment(some, segmenter):
        return segmenter({"path": list(some)}).to_pylist()

    make = dask.delayed(fastseg.Segmenter)  # in the worker, where it stays
    segmenter = make(str(model_folder), labels="rle", device="cpu", arrow=True)
    bag = dask.bag.from_sequence(paths, partition_size=7)
    rows = bag.map_partitions(segment, segmenter).compute(scheduler="threads", num_workers=1)
    check(rows, expected)


@needs("daft")
def test_daft(model_folder, paths, expected):
    import daft

    schema = fastseg.Segmenter.schema()
    kinds = {name: daft.DataType.from_arrow_type(schema.field(name).type) for name in schema.names}

    @daft.cls
    class Segment:
        def __init__(self, model: str) -> None:
            self.segmenter = fastseg.Segmenter(model, labels="rle", device="cpu", arrow=True)

        @daft.method.batch(return_dtype=daft.DataType.struct(kinds), batch_size=7, unnest=True)
        def __call__(self, path):
            return self.segmenter({"path": path.to_pylist()}).to_pylist()

    pictures = daft.from_pydict({"path": paths})
    found = pictures.select(Segment(str(model_folder))(pictures["path"]))
    check(found.to_pylist(), expected)

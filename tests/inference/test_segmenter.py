"""`fastseg.Segmenter`: rows out for rows in, the same as `segment` and `fastseg predict` give."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.inference.receipts import Receipts
from fastseg.inference.steps import Steps
from tests.cli.cli_cases import photo, save_model, save_seggpt, segmented, tree

NAMES = ("coffee", "astronaut", "chelsea")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Of three sizes, one turned by its EXIF, one below; a broken one; and what is no picture."""
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    for index, name in enumerate(NAMES):
        exif = Image.Exif()
        exif[274] = 6 if index == 0 else 1
        photo(name, (60 + 8 * index, 48)).save(folder / f"{name}.jpg", exif=exif)
    photo("rocket").save(folder / "below" / "rocket.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


def paths_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]


def opened(path: str) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(Image.open(path))


def row_at(columns: dict, index: int) -> dict:
    return {name: values[index] for name, values in columns.items()}


@pytest.mark.parametrize("labels", ["png", "grey", "zlib", "rle"])
def test_rows(model_folder, pictures, labels):
    paths = [*paths_of(pictures), str(pictures / "absent.jpg")]
    segmenter = fastseg.Segmenter(model_folder, labels=labels, device="cpu", batch_size=2)
    found = segmenter({"path": paths})
    assert list(found) == fastseg.Segmenter.schema().names
    assert found["path"] == paths
    for index, path in enumerate(paths):
        row = row_at(found, index)
        if "broken" in path or "absent" in path:
            told = "no image that Pillow knows" if "broken" in path else "No such file"
            assert told in row["error"]
            assert all(
                value is None for name, value in row.items() if name not in ("path", "error")
            )
            continue
        expected = segmented(model_folder, opened(path))
        assert row["error"] is None
        assert (row["height"], row["width"]) == expected.shape
        assert (fastseg.Segmenter.label_map(row) == expected).all()
        assert dict(zip(row["classes"], row["pixels"], strict=True)) == dict(
            zip(*(one.tolist() for one in np.unique(expected, return_counts=True)), strict=True)
        )


def test_run_lengths_are_cocos(model_folder, pictures):
    import json

    from pycocotools import mask

    segmenter = fastseg.Segmenter(model_folder, labels="rle", device="cpu")
    path = str(pictures / "chelsea.jpg")
    found = segmenter({"path": [path]})
    expected = segmented(model_folder, opened(path))
    masks = json.loads(found["labels"][0])
    assert sorted(map(int, masks)) == found["classes"][0]
    for number, one in masks.items():
        assert (mask.decode(one) == (expected == int(number))).all()


def test_kinds_of_batches(model_folder, pictures):
    """The same rows of lists, NumPy, pandas, Arrow, bytes, and frame by frame as Spark has them."""
    paths = paths_of(pictures)
    segmenter = fastseg.Segmenter(model_folder, labels="rle", device="cpu")
    expected = segmenter({"path": paths})
    assert segmenter({"path": np.array(paths)}) == expected
    content = [Path(path).read_bytes() for path in paths]
    assert segmenter({"path": np.array(paths), "bytes": np.array(content, object)}) == expected
    table = segmenter(pa.table({"path": paths}))
    assert table.schema == fastseg.Segmenter.schema()
    assert table.to_pydict() == expected

    def over(frames):  # a function for mapInPandas
        for frame in frames:
            yield segmenter(frame)

    frames = [pd.DataFrame({"path": paths[:2]}), pd.DataFrame({"path": paths[2:]})]
    found = pd.concat(over(iter(frames)), ignore_index=True)
    assert pa.Table.from_pandas(found, fastseg.Segmenter.schema()).to_pydict() == expected
    whole = fastseg.Segmenter(model_folder, labels="rle", device="cpu", arrow=True)
    assert whole({"path": paths}).to_pydict() == expected


def test_what_is_missing_in_a_row(model_folder, pictures, tmp_path):
    path = str(pictures / "coffee.jpg")
    segmenter = fastseg.Segmenter(model_folder, device="cpu", output=tmp_path / "o", root=pictures)
    frame = pd.DataFrame({"path": [path, None], "file": [None, "x.png"], "bytes": [None, None]})
    found = segmenter(frame).to_dict("list")
    assert found["file"] == ["coffee.jpg_labels.png", None]
    assert found["error"] == [None, "path: expected a string, got None"]
    assert segmenter({"path": []}) == {name: [] for name in fastseg.Segmenter.schema().names}
    with pytest.raises(KeyError, match="path: expected a column"):
        segmenter({"image": [path]})


def test_files_are_those_of_predict(model_folder, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    where = ["--model", str(model_folder), "--device", "cpu", "--no-overlay"]
    main(["predict", str(pictures), "--output", str(out), *where])
    paths = paths_of(pictures)
    names = [Path(path).relative_to(pictures).with_suffix("") for path in paths]
    files = [f"{name}_labels.png" for name in names]
    ours = tmp_path / "ours"
    segmenter = fastseg.Segmenter(model_folder, output=ours, device="cpu")
    found = segmenter({"path": paths, "file": files})
    assert tree(ours) == tree(out)
    assert {name: (ours / name).read_bytes() for name in tree(out)} == {
        name: (out / name).read_bytes() for name in tree(out)
    }
    assert [name for name in found["file"] if name] == sorted(tree(out))
    assert found["labels"] == [None] * len(paths)


def test_names_below_a_root(model_folder, pictures, tmp_path):
    segmenter = fastseg.Segmenter(model_folder, output=tmp_path / "o", root=pictures, device="cpu")
    elsewhere = tmp_path / "elsewhere.png"
    photo("coffee").save(elsewhere)
    found = segmenter({"path": [*paths_of(pictures), str(elsewhere)]})
    assert tree(tmp_path / "o") == {
        "below/rocket.png_labels.png",
        *(f"{name}.jpg_labels.png" for name in NAMES),
    }
    assert found["error"][-1] == f"path: expected one below root, {pictures}, got {elsewhere}"
    without = fastseg.Segmenter(model_folder, output=tmp_path / "o", device="cpu")
    with pytest.raises(ValueError, match="root: expected a folder with output"):
        without({"path": [str(elsewhere)]})


@pytest.mark.parametrize("scheme", ["file://", "fsspec+file://"])
def test_other_filesystems(model_folder, pictures, tmp_path, scheme):
    """pyarrow's own, and fsspec's behind it, stand in for what is far away."""
    urls = [f"{scheme}{path}" for path in paths_of(pictures)]
    options = {"output": f"{scheme}{tmp_path}/far/out", "receipts": f"{scheme}{tmp_path}/far/rows"}
    root = f"{scheme}{pictures}"
    segmenter = fastseg.Segmenter(model_folder, device="cpu", root=root, **options)
    found = segmenter({"path": urls})
    assert [error is None for error in found["error"]] == ["broken" not in url for url in urls]
    written = tree(tmp_path / "far" / "out")
    assert written == {"below/rocket.png_labels.png", *(f"{n}.jpg_labels.png" for n in NAMES)}
    with Image.open(tmp_path / "far" / "out" / "coffee.jpg_labels.png") as image:
        expected = segmented(model_folder, opened(str(pictures / "coffee.jpg")))
        assert (np.asarray(image) == expected).all()
    assert len(tree(tmp_path / "far" / "rows")) == 1
    assert Receipts(options["receipts"]).settle(print) == {u for u in urls if "broken" not in u}


def test_receipts(model_folder, pictures, tmp_path):
    paths = paths_of(pictures)
    rows = tmp_path / "rows"
    segmenter = fastseg.Segmenter(model_folder, labels="zlib", receipts=rows, device="cpu")
    plain = fastseg.Segmenter(model_folder, labels="zlib", device="cpu")({"path": paths})
    for _ in range(2):  # the second replaces what the first wrote
        assert segmenter({"path": paths})["labels"] == [None] * len(paths)
        assert len(tree(rows)) == 1
    table = pq.read_table(rows)
    assert table.schema == fastseg.Segmenter.schema()
    assert table.to_pydict() == plain
    segmenter({"path": paths[:2]})
    assert len(tree(rows)) == 2


def write_rows(folder: Path, name: str, rows: dict[str, str | None], age: int) -> None:
    empty = dict.fromkeys(fastseg.Segmenter.schema().names)
    table = [{**empty, "path": path, "error": error} for path, error in rows.items()]
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.parquet"
    pq.write_table(pa.Table.from_pylist(table, schema=fastseg.Segmenter.schema()), path)
    os.utime(path, (1000 - age, 1000 - age))


def test_settled_receipts(tmp_path):
    """One row a path: without an error where there is one, else the newest."""
    write_rows(tmp_path, "a", {"1": None, "2": "old", "3": "old", "4": "alone", "5": None}, 9)
    write_rows(tmp_path, "b", {"2": None, "3": "new"}, 8)
    write_rows(tmp_path, "c", {"5": "later"}, 7)
    (tmp_path / "d.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    (tmp_path / "e.parquet").write_bytes(b"")
    told: list[str] = []
    assert Receipts(str(tmp_path)).settle(told.append) == {"1", "2", "5"}
    assert tree(tmp_path) == {"a.parquet", "b.parquet", "_d.parquet.broken", "_e.parquet.broken"}
    assert len(told) == 2
    assert all("no whole parquet file" in one for one in told)
    table = pq.read_table(tmp_path, schema=fastseg.Segmenter.schema())
    assert sorted(zip(table["path"].to_pylist(), table["error"].to_pylist(), strict=True)) == [
        *[("1", None), ("2", None), ("3", "new"), ("4", "alone"), ("5", None)]
    ]
    assert Receipts(str(tmp_path / "absent")).settle(told.append) == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk(model_folder, pictures, tmp_path, monkeypatch):
    """Label maps that cannot be written are rows, and so are receipts."""
    from fastseg.images import storage

    real = storage.write_whole

    def write_whole(path, write):
        if "chelsea" in path.name or (full_receipts and path.suffix == ".parquet"):
            with open("/dev/full", "wb", buffering=0) as file:
                write(file)
        real(path, write)

    monkeypatch.setattr(storage, "write_whole", write_whole)
    full_receipts = False
    options = {"root": pictures, "device": "cpu", "receipts": tmp_path / "rows"}
    segmenter = fastseg.Segmenter(model_folder, output=tmp_path / "out", **options)
    paths = paths_of(pictures)
    found = segmenter({"path": paths})
    failed = {Path(p).name: e for p, e in zip(paths, found["error"], strict=True) if e}
    assert failed.keys() == {"broken.png", "chelsea.jpg"}
    told = f"cannot write to {tmp_path / 'out'}: No space left on device"
    assert failed["chelsea.jpg"] == told
    assert pq.read_table(tmp_path / "rows").to_pydict() == found
    full_receipts = True
    failed = segmenter({"path": paths[:2]})["error"]
    assert all("rows: No space left on device" in e or "Pillow" in e for e in failed)
    assert len(tree(tmp_path / "rows")) == 1


def test_what_the_model_raises(model_folder, pictures, monkeypatch):
    """What is a picture's own fault is its row; a device that has failed ends the work."""
    from fastseg.inference import segmenter as module

    real = Steps.label_maps

    failures: list[Exception] = []

    def label_maps(self, inputs):
        if any(one.size == (48, 68) for one in inputs):  # of the astronaut
            raise failures[-1]
        return real(self, inputs)

    monkeypatch.setattr(Steps, "label_maps", label_maps)
    segmenter = fastseg.Segmenter(model_folder, device="cpu")
    paths = paths_of(pictures)
    for failure in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        ValueError("a picture of one kind"),
    ):
        failures.append(failure)
        errors = segmenter({"path": paths})["error"]
        assert [error is None for error in errors] == [
            "broken" not in path and "astronaut" not in path for path in paths
        ]
    failures.append(RuntimeError("CUDA error: an illegal memory access was encountered"))
    monkeypatch.setattr(module, "_works", lambda model: False)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        segmenter({"path": paths})


def test_works():
    from fastseg.inference.segmenter import _works

    assert _works(torch.nn.Linear(1, 1))
    assert not _works(torch.nn.Linear(1, 1, device="meta"))  # nothing can be had from it


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode there")
def test_names_that_are_no_utf_8(model_folder, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    photo("coffee").save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", name)
    path = os.fsdecode(name)
    options = {"device": "cpu", "receipts": tmp_path / "rows"}
    segmenter = fastseg.Segmenter(model_folder, output=tmp_path / "out", **options)
    found = segmenter({"path": [path, path + "absent"], "file": ["a.png", "b.png"]})
    assert found["path"][0] == path
    assert found["error"][0] is None
    assert "No such file" in found["error"][1]
    table = pq.read_table(tmp_path / "rows")
    assert table["path"][0].as_py() == f"{tmp_path}/caf\N{REPLACEMENT CHARACTER}.png"


def test_options_are_those_of_segment(model_folder, pictures):
    path = str(pictures / "chelsea.jpg")
    for options in ({"slide": (32, 24)}, {"tta": ("flip", 0.75)}, {"threshold": 0.4}):
        segmenter = fastseg.Segmenter(model_folder, device="cpu", labels="zlib", **options)
        found = row_at(segmenter({"path": [path]}), 0)
        expected = segmented(model_folder, opened(path), **options)
        assert (fastseg.Segmenter.label_map(found) == expected).all()


def test_a_ready_model_and_many_classes(tmp_path, pictures):
    folder = save_model(tmp_path / "many", num_labels=300)
    model = fastseg.from_pretrained(folder, device="cpu")
    path = str(pictures / "chelsea.jpg")
    expected = segmented(folder, opened(path))
    for labels in ("png", "zlib", "rle"):
        found = row_at(fastseg.Segmenter(model, labels=labels)({"path": [path]}), 0)
        assert (fastseg.Segmenter.label_map(found) == expected).all()
    with pytest.raises(ValueError, match="expected None with a model"):
        fastseg.Segmenter(model, device="cpu")


def test_kept_prompts(tmp_path, pictures):
    folder = save_seggpt(tmp_path / "seggpt")
    mask = np.zeros((48, 60), np.uint8)
    mask[:, 20:40], mask[30:] = 1, 2
    photo("coffee").save(tmp_path / "prompt.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    pair = (str(tmp_path / "prompt.png"), str(tmp_path / "mask.png"))
    path = str(pictures / "chelsea.jpg")
    segmenter = fastseg.Segmenter(folder, device="cpu", labels="zlib", prompts=[pair])
    found = row_at(segmenter({"path": [path]}), 0)
    model = fastseg.from_pretrained(folder)
    expected = fastseg.segment(model, [opened(path)], prompts=[(photo("coffee"), mask)])[0]
    assert (fastseg.Segmenter.label_map(found) == expected.numpy()).all()
    with pytest.raises(ValueError, match="prompts: expected"):
        fastseg.Segmenter(folder, device="cpu")
    with pytest.raises(ValueError, match="tta: expected None with prompts"):
        fastseg.Segmenter(folder, device="cpu", prompts=[pair], tta=("flip",))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"labels": "jpg"}, "labels: expected one of png, grey, zlib, rle, got 'jpg'"),
        ({"labels": "rle", "output": "x"}, "labels: expected png or grey with an output"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"threads": 1.5}, "threads: expected an integer of at least 1, got 1.5"),
    ],
)
def test_wrong_arguments(model_folder, options, told):
    with pytest.raises(ValueError, match=told):
        fastseg.Segmenter(model_folder, device="cpu", **options)


def test_pickles_and_missing_weights(model_folder, tmp_path):
    with pytest.raises(TypeError, match="make it in the worker"):
        pickle.dumps(fastseg.Segmenter(model_folder, device="cpu"))
    with pytest.raises((FileNotFoundError, ImportError)):
        fastseg.Segmenter(tmp_path / "absent", device="cpu")
    with pytest.raises(ValueError, match="row: expected one with labels"):
        fastseg.Segmenter.label_map({"path": "a.jpg", "labels": None})

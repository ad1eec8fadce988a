"""Tables as Hugging Face datasets stores them: Arrow files of `save_to_disk`, and parquet."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from fastseg.datasets.pictures import open_dataset

from .test_layouts import SIZE, labels_of


def encoded(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def pixels_of(seed):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def table(seeds, columns=("image", "annotation"), nested=True):
    def files(values):
        found = [encoded(value) for value in values]
        return [{"bytes": file, "path": "x.png"} for file in found] if nested else found

    return pyarrow.table(
        {
            "id": list(seeds),
            columns[0]: files(pixels_of(seed) for seed in seeds),
            columns[1]: files(labels_of(seed).astype(np.uint8) for seed in seeds),
        }
    )


def save_to_disk(folder, parts):
    """What `Dataset.save_to_disk` writes, as far as rows and their files go."""
    folder.mkdir(parents=True)
    names = [f"data-{index:05d}-of-{len(parts):05d}.arrow" for index in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        file = str(folder / name)
        with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, part.schema) as out:
            out.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))


def check(data, seeds):
    assert len(data) == len(seeds)
    for seed, (image, labels) in zip(seeds, data, strict=True):
        assert np.array_equal(np.asarray(image), pixels_of(seed))
        assert np.array_equal(labels, labels_of(seed))
    assert np.array_equal(data[-1][1], labels_of(seeds[-1]))


def test_saved_to_disk(tmp_path):
    save_to_disk(tmp_path / "train", [table([0, 1])])
    save_to_disk(tmp_path / "validation", [table([2, 3, 4]), table([5])])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    check(open_dataset(tmp_path), [2, 3, 4, 5])
    check(open_dataset(tmp_path, "train"), [0, 1])
    check(open_dataset(tmp_path / "train"), [0, 1])  # one data set by itself
    with pytest.raises(FileNotFoundError, match="no split 'test'; there are train, validation"):
        open_dataset(tmp_path, "test")
    assert open_dataset(tmp_path).kind == "Hugging Face datasets (arrow)"


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_as_on_the_hub(tmp_path, nested):
    (tmp_path / "data").mkdir()
    for name, seeds in (
        ("train-00000-of-00001", [0]),
        ("validation-00000-of-00002", [1, 2, 3, 4, 5]),
        ("validation-00001-of-00002", [6]),
    ):
        path = tmp_path / "data" / f"{name}.parquet"
        part = table(seeds, ("pixel_values", "label"), nested)
        pyarrow.parquet.write_table(part, path, row_group_size=2)
    check(open_dataset(tmp_path), [1, 2, 3, 4, 5, 6])
    data = open_dataset(tmp_path / "data" / "train-00000-of-00001.parquet")
    check(data, [0])
    assert data.kind == "a table (parquet)"
    assert data.names[0][1].endswith("train-00000-of-00001.parquet, row 0, label")


def test_parquet_in_a_folder_of_its_split(tmp_path):
    (tmp_path / "validation").mkdir()
    (tmp_path / "train").mkdir()
    pyarrow.parquet.write_table(table([1]), tmp_path / "validation" / "0000.parquet")
    pyarrow.parquet.write_table(table([2]), tmp_path / "train" / "0000.parquet")
    check(open_dataset(tmp_path), [1])


def test_columns(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table([1], ("photo", "seg")), path)
    check(open_dataset(path, image_column="photo", label_column="seg"), [1])
    with pytest.raises(
        ValueError, match="no column 'image' or .*; it has id, photo, seg: name one"
    ):
        open_dataset(path)
    with pytest.raises(ValueError, match="label_column: .*no column x; .*--label-column"):
        open_dataset(path, image_column="photo", label_column="x")
    data = open_dataset(path, image_column="id", label_column="seg")
    with pytest.raises(
        ValueError, match="row 0, id: expected a picture as a file in bytes, got int"
    ):
        data[0]


def test_pictures_beside_the_table(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels_of(1)))
    row = {
        "image": [{"bytes": None, "path": "a.png"}],
        "label": [{"bytes": encoded(labels_of(1).astype(np.uint8)), "path": None}],
    }
    pyarrow.parquet.write_table(pyarrow.table(row), tmp_path / "t.parquet")
    check(open_dataset(tmp_path / "t.parquet"), [1])


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"t.parquet needs pyarrow: pip install .*\[datasets\]"):
        open_dataset(tmp_path / "t.parquet")

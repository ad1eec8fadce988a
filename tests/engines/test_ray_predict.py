"""`fastseg predict --engine ray` on a cluster of this machine: the results of a run without it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import fastseg
from fastseg.cli import main
from tests.cli.cli_cases import photo, save_seggpt, segmented, tree
from tests.engines.conftest import BROKEN, label_files, needs_ray

pytestmark = [pytest.mark.slow, needs_ray]


@pytest.fixture
def predict(model_folder, tmp_path, cluster):
    """Runs the command with two actors and the folder `out`."""

    def run(*arguments, output: object = None, model: object = None) -> int:
        where = ["--model", model or model_folder, "--output", output or tmp_path / "out"]
        engine = ["--engine", "ray", "--num-actors", 2, "--device", "cpu"]
        return main(["predict", *map(str, [*arguments, *where, *engine])])

    return run


def receipts_of(folder: Path) -> dict[str, list]:
    return pq.read_table(folder / "receipts").to_pydict()


def test_results_are_those_of_one_process(predict, model_folder, pictures, tmp_path, capsys):
    plain = tmp_path / "plain"
    where = ["--model", str(model_folder), "--output", str(plain), "--device", "cpu"]
    assert main(["predict", str(pictures), *where, "--no-overlay"]) == 1
    expected = capsys.readouterr()
    assert predict(pictures) == 1
    printed = capsys.readouterr()
    assert label_files(tmp_path / "out") == label_files(plain)
    assert "37 of 40 images segmented, in " in printed.out
    assert "images/s by 2 actors of 1 CPU; rows in " in printed.out

    def failures(text: str) -> set[str]:
        return {line for line in text.splitlines() if line.startswith(str(pictures))}

    assert failures(printed.err) == failures(expected.err)
    assert len(failures(printed.err)) == 3

    rows = receipts_of(tmp_path / "out")
    assert Counter(rows["path"]) == Counter(str(p) for p in pictures.rglob("*") if p.is_file())
    assert len(tree(tmp_path / "out" / "receipts")) > 2
    failed = [path for path, error in zip(rows["path"], rows["error"], strict=True) if error]
    assert {Path(path).name for path in failed} == set(BROKEN)
    for path, file, width, height in zip(
        *(rows[name] for name in ("path", "file", "width", "height")), strict=True
    ):
        if file is not None:
            with Image.open(tmp_path / "out" / file) as image:
                assert image.size == (width, height)
            assert file == str(Path(path).relative_to(pictures).with_suffix("")) + "_labels.png"


def test_resume(predict, pictures, tmp_path, capsys):
    predict(pictures, "--limit", 15)
    assert len(receipts_of(tmp_path / "out")["path"]) == 15
    capsys.readouterr()
    assert predict(pictures) == 2
    assert "has the rows of an earlier run: pass --resume" in capsys.readouterr().err
    # A file cut off by a full disk counts as absent, with a note.
    receipts = sorted((tmp_path / "out" / "receipts").glob("*.parquet"))
    receipts[0].write_bytes(receipts[0].read_bytes()[:-10])
    assert predict(pictures, "--resume") == 1
    printed = capsys.readouterr()
    assert "no whole parquet file" in printed.err
    rows = receipts_of(tmp_path / "out")
    assert len(set(rows["path"])) == len(rows["path"]) == 40
    assert len(label_files(tmp_path / "out")) == 37
    # What failed is tried again, and what is mended is done, in the place of the older row.
    photo("coffee").save(pictures / "empty.png")
    assert predict(pictures, "--resume") == 1
    printed = capsys.readouterr()
    assert "37 images left out, as receipts tell that they are done" in printed.err
    assert "1 of 3 images segmented" in printed.out
    rows = receipts_of(tmp_path / "out")
    assert len(set(rows["path"])) == len(rows["path"]) == 40
    assert sum(error is not None for error in rows["error"]) == 2
    (pictures / "cut.jpg").unlink()
    (pictures / "text.png").unlink()
    assert predict(pictures, "--resume") == 0
    assert "0 of 0 images segmented" in capsys.readouterr().out


@pytest.mark.parametrize("labels", ["zlib", "rle"])
def test_labels_in_parquet(predict, model_folder, pictures, tmp_path, labels):
    assert predict(pictures / "0", "--labels", labels) == 0
    assert not label_files(tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "receipts").to_pylist()
    assert len(rows) == 19
    for row in rows[:5]:
        with Image.open(row["path"]) as image:
            expected = segmented(model_folder, image)
        assert (fastseg.Segmenter.label_map(row) == expected).all()


def test_far_away(predict, model_folder, pictures, tmp_path, capsys):
    """By URLs, behind which fsspec's filesystem stands in for a cloud's."""
    out = f"fsspec+file://{tmp_path}/far"
    assert predict(f"fsspec+file://{pictures}", output=out) == 1
    printed = capsys.readouterr()
    assert "37 of 40 images segmented" in printed.out
    far = label_files(tmp_path / "far")
    assert len(far) == 37
    with Image.open(tmp_path / "far" / "0" / "00_labels.png") as image:
        expected = segmented(model_folder, Image.open(pictures / "0" / "00.jpg"))
        assert (np.asarray(image) == expected).all()
    rows = receipts_of(tmp_path / "far")
    assert all(path.startswith("fsspec+file://") for path in rows["path"])
    assert predict(f"fsspec+file://{pictures}", "--resume", output=out) == 1
    assert "0 of 3 images segmented" in capsys.readouterr().out
    # From here to there, and names that meet.
    photo("coffee").save(pictures / "0" / "00.png")
    assert predict(pictures / "0", output=f"fsspec+file://{tmp_path}/there") == 0
    assert {"00.jpg_labels.png", "00.png_labels.png"} <= set(label_files(tmp_path / "there"))


def test_prompts(predict, pictures, tmp_path):
    folder = save_seggpt(tmp_path / "seggpt")
    mask = np.zeros((48, 60), np.uint8)
    mask[:, 20:40] = 1
    photo("coffee").save(tmp_path / "prompt.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    prompt = ["--prompt", tmp_path / "prompt.png", tmp_path / "mask.png"]
    assert predict(pictures / "0", *prompt, "--limit", 4, model=folder) == 0
    plain = ["--model", folder, "--output", tmp_path / "plain", "--device", "cpu", "--no-overlay"]
    command = ["predict", pictures / "0", *prompt, "--limit", 4, *plain]
    assert main([str(word) for word in command]) == 0
    assert label_files(tmp_path / "out") == label_files(tmp_path / "plain")
    assert len(label_files(tmp_path / "out")) == 4


def test_an_actor_that_fails_ends_the_run(predict, pictures, tmp_path, monkeypatch, capsys):
    """Weights that are gone when the actors begin: an error and its reason, no waiting."""
    from fastseg.cli import engine_predict

    real = engine_predict._options

    def options(*arguments):
        return {**real(*arguments), "model": str(tmp_path / "gone")}

    monkeypatch.setattr(engine_predict, "_options", options)
    assert predict(pictures) == 1
    said = capsys.readouterr().err
    assert "--engine ray: an actor failed: " in said
    assert str(tmp_path / "gone") in said

"""`python -m bench training`: the gate, what rows say, and the table."""

from __future__ import annotations

import pytest
import torch

from bench import options
from bench.measure import training
from bench.providers.training import PROVIDERS, smp_model, transformers_model
from bench.report import tables
from bench.rows import UNITS, read_rows
from bench.setting import draw_weights
from tests.bench.cases import row

HOST = "transformers 5"


def tiny_model(variant, classes, dropout=True):
    import transformers

    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 40, 64],
        decoder_hidden_size=24,
        num_labels=classes,
        **({} if dropout else {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}),
    )
    model = transformers.SegformerForSemanticSegmentation(config)
    draw_weights(model)
    return model.train()


def wrong(model):
    trained, loss = PROVIDERS[HOST][1]["transformers eager"](model)
    return trained, lambda pixels, labels: 1.001 * loss(pixels, labels)


@pytest.mark.slow
def test_rows_and_what_is_wrong(tmp_path, monkeypatch):
    _, known = PROVIDERS[HOST]
    names = ["transformers eager", "fastseg accelerate", "fastseg"]
    providers = {name: known[name] for name in names} | {"wrong": wrong}
    monkeypatch.setitem(training.PROVIDERS, HOST, (tiny_model, providers))
    path = tmp_path / "rows.jsonl"
    line = "--quick --sizes 64x96 --repeats 2 --threads 1 --classes 70 --device cpu --commit abc "
    given = options.parse([*line.split(), "--output", str(path)], "training")
    given.providers = [*names, "wrong"]
    rows, notes, bad = training.measure_host(given, HOST)
    assert bad
    assert "parity gate is red: wrong: RMS of the relative errors of loss" in notes[0]
    assert rows == read_rows(path)
    assert [one.provider for one in rows] == names
    for one in rows:
        assert (one.kind, one.case, one.host, one.mode) == ("training", "b0", HOST, "70 classes")
        assert (one.size, one.batch, one.dtype, one.unit) == ((64, 96), 2, "float32", "ms")
        assert 0 < one.parity_error <= one.parity_gate < 1e-4
        assert one.peak_mb > 0.1
    peaks = {one.provider: one.peak_mb for one in rows}
    assert peaks["fastseg accelerate"] < 0.8 * peaks["transformers eager"]


def test_labels_have_all_sizes_and_ignored_pixels():
    setting = training.Setting("b0", (70, 33), 3, "bfloat16")
    batch = training.draw_batch(setting, 5, torch.device("cpu"))
    assert batch.labels.shape == (3, 70, 33)
    assert set(batch.labels.unique().tolist()) == {0, 1, 2, 3, 4, 255}
    assert batch.dtype == torch.bfloat16


def test_wrong_options_are_named(capsys):
    for line in ("--hosts NVlabs", "--classes 1", "--providers keras"):
        with pytest.raises(SystemExit, match="2"):
            options.parse(line.split(), "training")
        assert line.split()[0] in capsys.readouterr().err


def test_table():
    what = {"kind": "training", "host": HOST, "mode": "150 classes", "unit": UNITS["training"]}
    what |= {"size": (512, 512), "batch": 2}
    found = [
        row(2000.0, peak_mb=1616.0, **what),
        row(500.0, "fastseg accelerate", ratio=4.0, peak_mb=404.0, **what),
    ]
    what |= {"host": "smp", "baseline": "smp"}
    found.append(row(1500.0, "smp", peak_mb=1300.0, **what))
    text = tables.training(found[::-1])
    assert text.startswith("512x512, batch 2, float32, 150 classes:")
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["transformers B0", "transformers eager", "2000", "1.00x", "1616", "100%"],
        ["transformers B0", "fastseg accelerate", "500", "4.00x", "404", "25%"],
        ["smp B0", "smp", "1500", "1.00x", "1300", "100%"],
    ]
    assert "abc1234" in text


def test_plain_models_without_dropout_draw_nothing():
    model = transformers_model("b0", 3, dropout=False)
    rates = [one.p for one in model.modules() if isinstance(one, torch.nn.Dropout)]
    rates += [one.drop_prob for one in model.modules() if hasattr(one, "drop_prob")]
    assert len(rates) > 8
    assert not any(rates)
    assert callable(smp_model)

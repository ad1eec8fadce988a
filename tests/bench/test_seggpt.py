"""`python -m bench seggpt`: cases on a small model, counts, table; memory at the real widths."""

from __future__ import annotations

import re

import pytest
import torch

import fastseg
from bench import options, work
from bench.measure import run, seggpt
from bench.report import tables
from bench.rows import read_rows
from bench.work import H200, counted_flops, seggpt_work, total
from tests.bench.cases import KNOWN, row

CASES = ("forward", "kept prompt", "4 prompts")
ONE = ("--threads", "1", "--device", "cpu", "--repeats", "1")


def small_config(layers):
    return fastseg.SegGptConfig(
        hidden_size=48,
        num_hidden_layers=layers,
        num_attention_heads=3,
        image_size=[128, 64],
        patch_size=8,
        pretrain_image_size=24,
        decoder_hidden_size=8,
        merge_index=0,
        intermediate_hidden_state_indices=list(range(4)),
    )


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(work, "ceilings", lambda device, dtype: KNOWN)
    for module in (work, seggpt):
        monkeypatch.setattr(module, "seggpt_config", small_config)
    monkeypatch.setattr(seggpt, "LABEL_MAP_SIZE", (90, 110))
    return tmp_path / "rows.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_cases(small, dtype, capsys):
    names = [name.replace(" ", "-") for name in (*CASES, "post-processing")]
    command = ["--cases", ",".join(names), "--layers", "4", "--dtypes", dtype, *ONE]
    assert run.main([*command, "--output", str(small)], "seggpt") == 0
    found = read_rows(small)
    cases = [*(f"{name}, 4 layers" for name in CASES), "post-processing, 150 labels"]
    providers = [seggpt.BASELINE, seggpt.OURS]
    assert [(one.case, one.provider) for one in found] == [
        (case, name) for case in cases for name in providers
    ]
    for one in found:
        assert 0 <= one.parity_error <= one.parity_gate
        assert (one.kind, one.dtype, one.repeats) == ("seggpt", dtype, 1)
    assert found[0].floor_ms == pytest.approx(KNOWN.floor_ms(seggpt_work(4, dtype)))
    assert all(one.parity_error == 0 for one in found[-2:])
    assert "picture to label map, a kept prompt, 4 layers" in capsys.readouterr().out
    assert run.main([*command, "--output", str(small), "--resume"], "seggpt") == 0
    assert read_rows(small) == found


@pytest.mark.slow
def test_what_is_wrong_gets_no_figure(small, monkeypatch):
    build = seggpt.build

    def a_little_wrong(*arguments):
        models = build(*arguments)
        ours = models[seggpt.OURS]
        ours.decoder.decoder_pred.head.bias = torch.nn.Parameter(
            ours.decoder.decoder_pred.head.bias + 1e-3, requires_grad=False
        )
        return models

    monkeypatch.setattr(seggpt, "build", a_little_wrong)
    command = ["--cases", "forward,kept-prompt", "--layers", "4", *ONE, "--output", str(small)]
    assert run.main(command, "seggpt") == 1
    assert {one.provider for one in read_rows(small)} == {seggpt.BASELINE}


@pytest.mark.slow
def test_a_wrong_prompt_gets_no_figure_in_half_precision(small, monkeypatch):
    keep = fastseg.keep_prompt
    monkeypatch.setattr(
        fastseg,
        "keep_prompt",
        lambda model, image, mask, **rest: keep(model, image, 1 - mask, **rest),
    )
    command = ["--cases", "kept-prompt", "--layers", "4", "--dtypes", "bfloat16", *ONE]
    assert run.main([*command, "--output", str(small)], "seggpt") == 1
    assert {one.provider for one in read_rows(small)} == {seggpt.BASELINE}


@pytest.mark.parametrize("layers", [4, 24])
def test_counts_of_a_forward(layers):
    """Twice the multiply-adds that torch counts of the plain path; on an H200 2.0 ms at least."""
    works = seggpt_work(layers, "bfloat16")
    with torch.device("meta"):
        model = fastseg.SegGptForImageSegmentation(work.seggpt_config(layers)).eval()
        pixels = [torch.empty(1, 3, 448, 448)] * 3
        with fastseg.plain_path():
            assert total(works).flops == counted_flops(lambda: model(*pixels))
        attention = counted_flops(lambda: model.model.encoder.layers[0].attention)
    assert attention == 0
    if layers == 24:
        weights = sum(one.numel() for one in model.parameters())
        assert 2 * weights < total(works).bytes
        assert H200.floor_ms(works) == pytest.approx(2.01, abs=0.01)


def test_table():
    what = {"kind": "seggpt", "size": (896, 448), "case": "forward, 24 layers"}
    memory = {**what, "kind": "seggpt memory", "case": "memory, 4 layers", "unit": "MB"}
    rows = [
        *(
            row(100.0 / gain, name, ratio=gain, **one)
            for one in (what, memory)
            for name, gain in ((seggpt.BASELINE, 1.0), (seggpt.OURS, 2.0))
        )
    ]
    text = tables.seggpt(rows)
    assert "| pixel values to painted masks, 24 layers | float32 |" in text
    lines = [line.split("|") for line in text.splitlines() if re.search(r"layers +\|", line)]
    assert [[cell.strip() for cell in line[3:6]] for line in lines] == [
        ["100", "50.0", "2.00x"]
    ] * 2
    assert "nothing has run there: 2.0 ms, 1590 GFLOP" in text


def test_layers_are_a_multiple_of_four(capsys):
    with pytest.raises(SystemExit, match="2"):
        options.parse(["--layers", "6"], "seggpt")
    assert "expected a multiple of 4, got '6'" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_at_the_published_widths(tmp_path):
    """Above the weights: at most 300 MiB, where transformers takes three times as much."""
    path = tmp_path / "rows.jsonl"
    assert run.main(["--cases", "memory", *ONE, "--output", str(path)], "seggpt") == 0
    theirs, ours = (one.p50 * 1e6 / 2**20 for one in read_rows(path))
    assert ours < 300 < theirs / 2

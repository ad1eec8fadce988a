"""bench/: the method, the rows, the table and the gates. No test here depends on a time taken."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastseg
from bench import cases, gates, memory, models, options, pairs, rows, table, timing

ROOT = Path(__file__).parent.parent
BEGIN, END = table.markers("cpu")

ROW = {
    "schema": 1,
    "date": "2026-01-02T03:04:05+00:00",
    "kind": "forward",
    "case": "b0",
    "size": [512, 512],
    "batch": 1,
    "dtype": "float32",
    "threads": 2,
    "provider": "transformers eager",
    "baseline": "transformers eager",
    "unit": "ms",
    "p20": 190.0,
    "p50": 200.0,
    "p80": 210.0,
    "repeats": 11,
    "ratio": 1.0,
    "paired_ratio": 1.0,
    "parity": "relative RMS error",
    "parity_error": 3e-7,
    "parity_gate": 2e-6,
    "cpu": "A CPU",
    "python": "3.11.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "fastseg": "0.1.0",
    "commit": "abc1234",
    "command": "python -m bench.models",
}
FAST = {
    **ROW,
    "provider": "fastseg",
    "p20": 49.0,
    "p50": 50.0,
    "p80": 52.0,
    "ratio": 4.0,
    "paired_ratio": 4.1,
}


@pytest.fixture(autouse=True)
def one_thread():
    """What else runs here would make two threads wait for each other at every small operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Method


def test_functions_run_in_turn():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "AB"}
    samples = timing.interleave(functions, repeats=3)
    assert "".join(calls) == "AB" * (timing.WARM_UP_ROUNDS + 3)
    assert {name: len(taken) for name, taken in samples.items()} == {"A": 3, "B": 3}
    assert min(samples["A"] + samples["B"]) >= 0


def test_quantiles_and_ratios():
    taken = [float(number) for number in range(11)]
    assert timing.quantiles(taken[::-1]) == pytest.approx({"p20": 2, "p50": 5, "p80": 8})
    # Medians 20 and 10; single rounds 2, 1 and 4 times.
    assert timing.ratios([20, 10, 40], [10, 10, 10]) == {"ratio": 2, "paired_ratio": 2}
    # Medians 7 and 1; single rounds 2, 6 and 7 times.
    assert timing.ratios([8, 6, 7], [4, 1, 1]) == {"ratio": 7, "paired_ratio": 6}


def test_activations_keep_their_scale(tmp_path):
    pairs.write_checkpoint(tmp_path, "b0")
    model = pairs.load_transformers(tmp_path)
    pixel_values = pairs.draw_pixels((64, 64))
    pairs.check_scale(model, pixel_values)
    with torch.no_grad():
        model.decode_head.classifier.weight *= 1e-38
        model.decode_head.classifier.bias *= 0
    with pytest.raises(RuntimeError, match="no denormal number, got"):
        pairs.check_scale(model, pixel_values)


# Gates


def test_logits_gate():
    reference = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    gate = gates.logits_gate(reference)
    assert gate.error(torch.tensor([[3.0, 4.5]])) == pytest.approx(0.1)  # 0.5 / 5
    assert gate.check("one", reference.float()) == 0
    for wrong in (reference * (1 + 3e-6), reference * math.nan, reference.T):
        with pytest.raises(gates.RedGate, match=r"^one: relative RMS error"):
            gate.check("one", wrong)


def test_labels_gate_allows_near_ties_alone():
    logits = torch.tensor([1.0, 1.0 - 1e-7, 0.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    gate = gates.labels_gate(logits, (4, 4))
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    assert gate.check("one", labels) == 0
    labels[0, 1, 1] = 1
    assert gate.check("one", labels) == pytest.approx(1e-7, rel=0.5)
    wrong = labels.clone()
    wrong[0, 2, 3] = 2
    assert gate.error(wrong) == pytest.approx(0.5)
    for result in (wrong, labels.int(), labels[:, :2]):
        with pytest.raises(gates.RedGate, match="shortfall"):
            gate.check("one", result)


# Rows


def test_rows_are_only_added(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows.append_rows(path, [ROW, FAST])
    before = path.read_bytes()
    rows.append_rows(path, [dict(reversed(FAST.items()))])
    assert path.read_bytes().startswith(before)
    assert rows.read_rows(path) == [ROW, FAST, FAST]
    assert list(json.loads(path.read_text().splitlines()[2])) == list(rows.FIELDS)

    with pytest.raises(ValueError, match="p50"):
        rows.append_rows(path, [ROW, {**ROW, "p50": 1.0}])
    assert len(rows.read_rows(path)) == 3
    path.write_bytes(before[:-1])
    with pytest.raises(ValueError, match="cut off"):
        rows.append_rows(path, [ROW])
    assert path.read_bytes() == before[:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parity_error": 1e-3}, "above its gate"),
        ({"parity_error": math.nan}, "above its gate"),
        ({"p80": 1.0}, "p20 <= p50 <= p80"),
        ({"p20": 0.0}, "0 < p20"),
        ({"threads": True, "cpu": None}, "threads: .*; cpu: "),
        ({"extra": 1}, "extra is not a field"),
        ({"kind": "backward"}, "kind"),
        ({"unit": "s"}, "unit"),
        ({"size": [512]}, "size"),
        ({"ratio": 2.0}, "baseline itself"),
        ({"date": "2026-01-02T03:04:05"}, "time zone"),
        ({"date": "yesterday"}, "ISO 8601"),
        ({"schema": 2}, "schema"),
    ],
)
def test_row_that_does_not_fit_the_schema(change, message):
    rows.check_row(ROW)
    with pytest.raises(ValueError, match=message):
        rows.check_row({**ROW, **change})


def test_missing_fields_and_bad_lines_are_named(tmp_path):
    with pytest.raises(ValueError, match="torch is missing"):
        rows.check_row({name: value for name, value in ROW.items() if name != "torch"})
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n{\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: "):
        rows.read_rows(path)


def test_committed_rows_fit_the_schema():
    assert rows.read_rows(ROOT / "bench" / "results" / "cpu.jsonl")


# Table


def test_newest_run_of_each_case_counts():
    later = "2026-01-03T00:00:00+00:00"
    small = {**ROW, "size": [64, 64]}
    new = {**ROW, "date": later, "p50": 205.0}
    assert rows.newest([ROW, FAST, small, new]) == [[new], [small]]


def test_table():
    b1 = [{**row, "case": "b1"} for row in (ROW, FAST)]
    b1[1].update(p20=180.0, p50=200.0, p80=201.4)
    labels = [{**row, "kind": "labels", "case": "random logits"} for row in (ROW, FAST)]
    other = {**ROW, "threads": 1}
    text = table.markdown([*labels, *b1, ROW, FAST, other, {**FAST, "threads": 1}])
    first, caption, second, other_caption = text.split("\n\n")
    assert first.splitlines() == [
        "| measured | against | | fastseg | ratio |",
        "|---|---|---:|---:|---:|",
        "| forward, B0, 512x512 | transformers eager | 200 ms (190 to 210) "
        "| 50.0 ms (49.0 to 52.0) | 4.00x |",
        "| forward, B1, 512x512 | transformers eager | 200 ms (190 to 210) "
        "| 200 ms (180 to 201) | 1.00x |",
        "| forward, geometric mean of these 2, 512x512 | transformers eager |  |  | **2.00x** |",
        "| upsample + argmax, random logits, 512x512 | transformers eager | 200 ms (190 to 210) "
        "| 50.0 ms (49.0 to 52.0) | 4.00x |",
    ]
    assert len(second.splitlines()) == 3
    for said in ("A CPU", "2 threads", "float32", "torch 2.13.0", "at abc1234", "2026-01-02"):
        assert said in caption
    assert "1 thread," in other_caption


def test_readme_is_rewritten_in_place(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "rows.jsonl"
    rows.append_rows(results, [ROW, FAST])
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    for _ in range(2):
        assert models.main(["--readme", str(readme), "--output", str(results)]) == 0
        expected = table.markdown([ROW, FAST])
        assert readme.read_text() == f"above\n{BEGIN}\n{expected}\n{END}\nbelow\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "rows.jsonl"]

    readme.write_text(f"{END} {BEGIN}")
    with pytest.raises(ValueError, match="in order"):
        table.rewrite(readme, "new")
    assert readme.read_text() == f"{END} {BEGIN}"


def test_table_of_a_file_is_printed(tmp_path, capsys):
    rows.append_rows(tmp_path / "rows.jsonl", [ROW, FAST])
    assert models.main(["--table", str(tmp_path / "rows.jsonl")]) == 0
    assert capsys.readouterr().out == table.markdown([ROW, FAST]) + "\n"


def test_table_in_the_readme_is_the_one_of_the_rows():
    path = ROOT / "README.md"
    _, found = table.split(path.read_text(encoding="utf-8"), path)
    expected = table.markdown(rows.read_rows(options.RESULTS))
    assert found == expected, "run: python -m bench.models --readme README.md"


# The command

TINY = ("--quick", "--size", "64", "64", "--repeats", "2", "--threads", "1")


def test_models_end_to_end(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert models.main([*TINY, "--only", "models", "--output", str(path)]) == 0
    theirs, ours = rows.read_rows(path)
    assert (theirs["provider"], ours["provider"]) == ("transformers eager", "fastseg")
    assert ours["ratio"] == pytest.approx(theirs["p50"] / ours["p50"])
    for row in (theirs, ours):
        assert (row["kind"], row["case"]) == ("forward", "b0")
        assert (row["size"], row["repeats"], row["threads"]) == ([64, 64], 2, 1)
        assert 0 < row["parity_error"] <= row["parity_gate"] == 2e-6
        assert row["torch"] == torch.__version__
        assert row["fastseg"] == fastseg.__version__
        assert row["command"].startswith("python -m bench.models --quick --size 64 64")
    assert capsys.readouterr().out == table.markdown([theirs, ours]) + "\n"


def test_labels_end_to_end(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert models.main([*TINY, "--only", "labels", "--output", str(path)]) == 0
    names = {row["case"] for row in rows.read_rows(path)}
    skipped = "demo model, 150 classes"
    if not (cases.DEMO_MODEL / "config.json").exists():
        assert f"labels, {skipped}: skipped, no model" in capsys.readouterr().err
        names.add(skipped)
    assert names == set(cases.LABEL_CASES)


def test_added_classes_never_win():
    if not (cases.DEMO_MODEL / "config.json").exists():
        pytest.skip("no demo model in this checkout")
    with torch.inference_mode():
        logits = cases.LABEL_CASES["demo model, 150 classes"]((64, 64))
    assert logits.shape == (1, 150, 16, 16)
    classes = fastseg.from_pretrained(cases.DEMO_MODEL).config.num_labels
    assert logits[:, classes:].amax() < logits[:, :classes].amin()


def test_wrong_model_gets_no_figure(tmp_path, capsys, monkeypatch):
    load = pairs.load_fastseg

    def perturbed(folder):
        model = load(folder)
        with torch.no_grad():
            model.decode_head.classifier.bias[0] += 1e-3
        return model

    monkeypatch.setattr(pairs, "load_fastseg", perturbed)
    path = tmp_path / "rows.jsonl"
    assert models.main([*TINY, "--only", "models", "--output", str(path)]) == 1
    assert not path.exists()
    output = capsys.readouterr().out
    assert "forward b0: no figure, parity gate is red: fastseg: relative RMS error" in output
    assert "ms" not in output


def test_wrong_label_map_gets_no_figure(tmp_path, capsys, monkeypatch):
    def blank(logits, size):
        return torch.zeros(logits.shape[0], *size, dtype=torch.int64)

    monkeypatch.setattr(fastseg.kernels, "upsample_argmax", blank)
    path = tmp_path / "rows.jsonl"
    assert models.main([*TINY, "--only", "labels", "--output", str(path)]) == 1
    assert not path.exists()
    assert capsys.readouterr().out.count("parity gate is red: fastseg: shortfall") >= 3


def test_memory_is_that_of_the_forward():
    size = (256, 256)
    samples, errors, gate = memory.measure("b0", size, threads=1, repeats=1)
    logits_megabytes = 4 * 150 * 64 * 64 / 1e6
    for provider in memory.PROVIDERS:
        assert logits_megabytes < samples[provider][0] < 1000  # all maps of all layers: 700
        assert 0 < errors[provider] <= gate.bound


def test_memory_of_a_wrong_model_is_no_figure(monkeypatch):
    def run_child(provider, folder, size, threads):
        save_file({"logits": torch.zeros(1, 150, 16, 16)}, folder / "logits.safetensors")
        return 1.0

    monkeypatch.setattr(memory, "_run_child", run_child)
    with pytest.raises(gates.RedGate, match="transformers eager"):
        memory.measure("b0", (64, 64), threads=1, repeats=1)


def test_size_too_small_for_a_figure_of_memory(tmp_path):
    pairs.write_checkpoint(tmp_path, "b0")
    with pytest.raises(cases.SkippedCase, match="less memory than loading"):
        memory._run_child("fastseg", tmp_path, (64, 64), threads=1)


@pytest.mark.parametrize(
    "argv",
    [
        ["--models", "b6"],
        ["--size", "65", "64"],
        ["--size", "32", "64"],
        ["--threads", "0"],
        ["--repeats", "-1"],
        ["--only", "all"],
    ],
)
def test_wrong_options(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        options.parse(argv)
    assert argv[0] in capsys.readouterr().err


def test_quick_adds_no_rows_unless_told_to(tmp_path):
    assert options.parse(["--quick"]).output is None
    assert options.parse(["--quick"]).models == ("b0",)
    assert options.parse([]).output == options.RESULTS
    assert options.parse(["--quick", "--output", str(tmp_path)]).output == tmp_path
    assert options.parse(["--models", "B2,b0"]).models == ("b2", "b0")

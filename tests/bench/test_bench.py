"""bench.grid: the method, the gates, the command. No test here depends on a time taken."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fastseg
from bench import (
    cases,
    gates,
    grid,
    label_cases,
    machine,
    memory,
    options,
    pairs,
    providers,
    rows,
    timing,
)
from bench.context import Setting, SkippedCase, context

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """What else runs here would make two threads wait for each other at every small operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_grad_enabled(True)


# Method


def test_functions_run_in_turn():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "AB"}
    samples = timing.interleave(functions, repeats=3)
    assert "".join(calls) == "AB" * (timing.WARM_UP_ROUNDS + 3)
    assert {name: len(taken) for name, taken in samples.items()} == {"A": 3, "B": 3}
    assert min(samples["A"] + samples["B"]) >= 0


def test_steps_pass_on_what_they_made_and_wait_for_the_device():
    calls = []

    def step(name):
        def run(value):
            calls.append(name)
            return value + name

        return run

    pipelines = {name: {s: step(name + s) for s in ("1", "2")} for name in "AB"}
    pipelines["B"]["3"] = lambda value: calls.append(value)
    samples = timing.interleave_steps(
        pipelines, "source ", repeats=2, wait=lambda: calls.append("wait")
    )
    a_round = ["A1", "wait", "A2", "wait", "B1", "wait", "B2", "wait", "source B1B2", "wait"]
    assert calls == a_round * (timing.WARM_UP_ROUNDS + 2)
    assert {name: list(steps) for name, steps in samples.items()} == {
        "A": ["1", "2"],
        "B": ["1", "2", "3"],
    }
    assert all(len(taken) == 2 for steps in samples.values() for taken in steps.values())


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


def test_of_a_batch_the_first_and_the_last_image_are_compared():
    with torch.no_grad(), context(Setting("b0", (64, 64), 3, "float32"), CPU, 1) as where:
        gate = cases.LogitsGates(where)
        logits = where.fastseg()(where.pixel_values).logits
        for image, is_seen in ((0, True), (1, False), (2, True)):
            wrong = logits.clone()
            wrong[image] += 1
            found = gate.of(lambda: None).error(wrong)
            assert (found > 1e-2) == is_seen


def test_half_precision_is_measured_by_what_transformers_makes_of_it():
    with torch.no_grad(), context(Setting("b0", (64, 64), 1, "bfloat16"), CPU, 1) as where:
        theirs = where.transformers()(where.pixel_values).logits
        gate = cases.LogitsGates(where).of(lambda: None)
        assert gate.bound == pytest.approx(1.25 * gate.error(theirs))
        assert 1e-3 < gate.error(theirs) < 1e-1
        # Who computes a float32 model in bfloat16 is measured alike.
        where.setting = where.setting._replace(dtype="float32")
        where.pixel_values = pairs.draw_pixels((64, 64))
        forward = type("", (), {"dtype": torch.bfloat16})()
        assert cases.LogitsGates(where).of(forward).bound == pytest.approx(gate.bound, rel=0.2)
        assert cases.LogitsGates(where).of(lambda: None).bound == 2e-6


# The command

TINY = ("--quick", "--sizes", "64", "--repeats", "2", "--threads", "1")
FEW = ("--providers", "fastseg-eager,fastseg-accelerate,fastseg-triton")


def test_forward_and_the_way_from_an_image(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    command = [*TINY, "--kinds", "forward,end-to-end", *FEW, "--output", str(path)]
    assert grid.main(command) == 0
    found = rows.read_rows(path)
    names = ["transformers eager", "fastseg eager", "fastseg accelerate"]
    forward = [row for row in found if row["kind"] == "forward"]
    assert [row["provider"] for row in forward] == names
    for row in forward:
        assert (row["part"], row["case"], row["size"], row["threads"]) == (
            "whole",
            "b0",
            [64, 64],
            1,
        )
        assert 0 < row["parity_error"] <= row["parity_gate"] == 2e-6
        assert row["ratio"] == pytest.approx(forward[0]["p50"] / row["p50"])
        assert (row["torch"], row["fastseg"]) == (torch.__version__, fastseg.__version__)
        assert row["command"].startswith("python -m bench --quick --sizes 64 --repeats 2")
        assert row["setup_s"] > 0
        assert row["floor_ms"] == forward[0]["floor_ms"] > 0
    images = [row for row in found if row["kind"] == "end to end"]
    assert [(row["part"], row["provider"]) for row in images] == [
        (part, name) for part in rows.PARTS for name in names
    ]
    assert len({row["date"] for row in images}) == 1
    by_part = {row["part"]: row["p50"] for row in images if row["provider"] == names[1]}
    # With two rounds medians are means, which add up.
    assert by_part["whole"] == pytest.approx(sum(by_part[p] for p in rows.PARTS[1:]))
    output = capsys.readouterr()
    assert "fastseg Triton skipped, the kernels need a GPU" in output.out
    assert "fastseg Triton skipped, the kernels need a GPU" in output.err


def test_resume_leaves_out_what_the_same_command_has_measured(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    command = [*TINY, "--kinds", "labels", "--output", str(path)]
    assert grid.main(command) == 0
    before = path.read_bytes()
    assert {row["case"] for row in rows.read_rows(path)} == set(label_cases.LABEL_CASES)
    assert grid.main([*command, "--resume", "--minutes=5"]) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().err.count("measured before") == len(label_cases.LABEL_CASES)
    assert grid.main([*command, "--cache", "cold", "--resume", "--minutes", "0"]) == 0
    assert path.read_bytes() == before
    assert capsys.readouterr().out.count("not begun, the time is up") == len(
        label_cases.LABEL_CASES
    )


def test_added_classes_never_win():
    with torch.inference_mode():
        logits = label_cases.LABEL_CASES["demo model, 150 classes"]((64, 64))
    assert logits.shape == (1, 150, 16, 16)
    classes = fastseg.from_pretrained(cases.DEMO_MODEL).config.num_labels
    assert logits[:, classes:].amax() < logits[:, :classes].amin()


def test_wrong_model_gets_no_figure(tmp_path, capsys, monkeypatch):
    load = fastseg.from_pretrained

    def perturbed(folder):
        model = load(folder)
        with torch.no_grad():
            model.decode_head.classifier.bias[0] += 1e-3
        return model

    monkeypatch.setattr(fastseg, "from_pretrained", perturbed)
    path = tmp_path / "rows.jsonl"
    command = [*TINY, "--kinds", "forward", "--providers", "fastseg-eager", "--output", str(path)]
    assert grid.main(command) == 1
    assert {row["provider"] for row in rows.read_rows(path)} == {"transformers eager"}
    output = capsys.readouterr().out
    assert "fastseg eager: no figure, parity gate is red: fastseg eager: relative RMS" in output


def test_wrong_label_maps_get_no_figure(tmp_path, capsys, monkeypatch):
    def blank(logits, size):
        return torch.zeros(logits.shape[0], *size, dtype=torch.int64)

    monkeypatch.setattr(fastseg.kernels, "upsample_argmax", blank)
    path = tmp_path / "rows.jsonl"
    kinds = ("--kinds", "labels,end-to-end", "--providers", "fastseg-eager")
    assert grid.main([*TINY, *kinds, "--output", str(path)]) == 1
    found = rows.read_rows(path)
    assert {row["kind"] for row in found} == {"labels", "end to end"}
    assert not [row for row in found if row["provider"].startswith("fastseg")]
    assert capsys.readouterr().out.count("red: fastseg: shortfall") == len(label_cases.LABEL_CASES)


def test_a_model_off_its_fast_path_is_not_timed(monkeypatch):
    load = fastseg.from_pretrained

    def hooked(folder):
        model = load(folder)
        model.decode_head.linear_fuse.register_forward_hook(lambda *arguments: None)
        return model

    monkeypatch.setattr(fastseg, "from_pretrained", hooked)
    reasons = {}
    with torch.no_grad(), context(Setting("b0", (64, 64), 1, "float32"), CPU, 1) as where:
        built = cases.build(where, ["fastseg eager"], reasons.__setitem__, reasons.__setitem__)
    assert not built
    assert "decode_head: plain: " in reasons["fastseg eager"]


def test_a_provider_that_fails_costs_no_other(monkeypatch):
    def explode(context):
        raise ZeroDivisionError("inside\na compiler")

    broken = providers.Provider(explode, lambda: "1")
    for name in ("smp", "fastseg accelerate"):
        monkeypatch.setitem(providers.PROVIDERS, name, broken)
    skipped, bad = {}, {}
    names = ["smp", "fastseg accelerate", "fastseg eager"]
    with torch.no_grad(), context(Setting("b0", (64, 64), 1, "float32"), CPU, 1) as where:
        built = cases.build(where, names, skipped.__setitem__, bad.__setitem__)
    assert list(built) == ["fastseg eager"]
    # Of others it is a limit; of fastseg a defect, and no reason to pass.
    assert skipped == {"smp": "ZeroDivisionError: inside"}
    assert bad == {"fastseg accelerate": "ZeroDivisionError: inside"}


def test_label_maps_that_fail_cost_no_other(tmp_path, capsys, monkeypatch):
    def explode(logits, size):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fastseg.kernels, "upsample_argmax", explode)
    path = tmp_path / "rows.jsonl"
    kinds = ("--kinds", "labels,forward", "--providers", "fastseg-eager")
    assert grid.main([*TINY, *kinds, "--output", str(path)]) == 1
    found = [(row["kind"], row["provider"]) for row in rows.read_rows(path)]
    assert ("forward", "fastseg eager") in found
    assert ("labels", "interpolate + argmax") in found
    assert ("labels", "fastseg") not in found
    assert "fastseg: no figure, RuntimeError: no such kernel" in capsys.readouterr().out


def test_threads_are_pinned_meanwhile():
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with machine.pinned_threads(1, CPU):
        assert os.sched_getaffinity(0) == {min(cores)}
        assert torch.get_num_threads() == 1
    assert os.sched_getaffinity(0) == cores
    assert torch.get_num_threads() == threads
    with machine.pinned_threads(1, torch.device("cuda")):
        assert os.sched_getaffinity(0) == cores


def test_providers_are_listed_with_reasons(capsys):
    assert grid.main(["--list", "--threads", "1", *FEW]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(providers.PROVIDERS)
    assert f"fastseg eager: {fastseg.__version__}" in lines
    assert "fastseg Triton: skipped, the kernels need a GPU" in lines
    assert "smp: only where --providers names it" in lines


@pytest.mark.slow
def test_memory_is_that_of_the_forward():
    samples, errors, gate = memory.measure("b0", (256, 256), threads=1, repeats=1)
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


def test_size_too_small_for_a_figure_of_memory(tmp_path, monkeypatch):
    """A child answers 0 where a forward stays below the peak of what came before it."""
    done = subprocess.CompletedProcess([], 0, stdout="0\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(SkippedCase, match="less memory than loading"):
        memory._run_child("fastseg eager", tmp_path, (64, 64), threads=1)


@pytest.mark.parametrize(
    "argv",
    [
        ["--variants", "b6"],
        ["--sizes", "65"],
        ["--sizes", "32x64"],
        ["--threads", "0"],
        ["--repeats", "-1"],
        ["--kinds", "all"],
        ["--providers", "keras"],
        ["--dtypes", "float8"],
        ["--cache", "hot"],
        ["--device", "mps"],
        ["--kinds", "memory", "--device", "cuda"],
    ],
)
def test_wrong_options(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        options.parse(argv)
    assert argv[0] in capsys.readouterr().err


def test_options(tmp_path):
    quick = options.parse(["--quick", "--device", "cpu"])
    assert quick.output is None
    assert [setting.variant for setting in quick.settings] == ["b0"]
    assert options.parse(["--quick", "--output", str(tmp_path)]).output == tmp_path
    whole = options.parse(["--device", "cpu"])
    assert whole.output == options.RESULTS / "cpu.jsonl"
    assert [setting.variant for setting in whole.settings[:2]] == ["b0", "b2"]
    assert "transformers max-autotune" not in whole.providers
    many = ["--variants", "B2,b0", "--sizes", "512,1024x2048", "--batches", "8,1"]
    given = options.parse([*many, "--dtypes", "bfloat16", "--providers", "ONNX-Runtime"])
    assert given.providers == ["transformers eager", "ONNX Runtime"]
    assert given.settings[0] == ("b2", (512, 512), 1, "bfloat16")
    assert len(given.settings) == 8
    assert {setting.size for setting in given.settings} == {(512, 512), (1024, 2048)}


def test_fastseg_bench_runs_them_from_anywhere(tmp_path):
    (tmp_path / "bench").mkdir()  # not this one
    (tmp_path / "bench" / "__main__.py").write_text("print('wrong')")
    command = [sys.executable, "-m", "fastseg", "bench", "--threads", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "fastseg bench: error: argument --threads: expected an integer" in done.stderr

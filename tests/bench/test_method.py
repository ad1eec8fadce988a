"""How benchmarks measure: timing in turn, gates, options. No test depends on a time taken."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from bench import gates, options, setting, timing
from bench.measure.models import logits_gates
from bench.rows import STEPS, WHOLE
from bench.setting import Setting, context
from tests.bench.cases import CPU


def test_functions_run_in_turn():
    made = []
    functions = {name: lambda name=name: made.append(name) for name in "AB"}
    samples = timing.interleave(functions, repeats=3)
    assert "".join(made) == "AB" * (timing.WARM_UP_ROUNDS + 3)
    assert {name: len(taken) for name, taken in samples.items()} == {"A": 3, "B": 3}


def test_steps_pass_on_what_they_made_and_wait_for_the_device():
    made = []
    pipelines = {
        name: [lambda value, step=name + n: made.append(value) or value + step for n in "123"]
        for name in "AB"
    }
    samples = timing.interleave_steps(
        pipelines, "from ", repeats=2, wait=lambda: made.append("wait")
    )
    a_round = ["from ", "wait", "from A1", "wait", "from A1A2", "wait"]
    a_round += [said.replace("A", "B") for said in a_round]
    assert made == a_round * (timing.WARM_UP_ROUNDS + 2)
    assert list(samples) == [WHOLE, *STEPS]
    for name in "AB":
        whole, *steps = (samples[part][name] for part in samples)
        assert whole == pytest.approx([sum(taken) for taken in zip(*steps, strict=True)])
        assert len(whole) == 2


def test_quantiles_and_ratios():
    taken = [float(number) for number in range(11)]
    assert timing.quantiles(taken[::-1]) == pytest.approx({"p20": 2, "p50": 5, "p80": 8})
    # Medians 7 and 1; single rounds 2, 6 and 7 times.
    assert timing.ratios([8, 6, 7], [4, 1, 1]) == {"ratio": 7, "paired_ratio": 6}


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


@torch.no_grad()
def test_of_a_batch_the_first_and_the_last_image_are_compared():
    with context(Setting("b0", (64, 64), 3, "float32"), CPU, 1) as where:
        gate = logits_gates(where)(lambda: None)
        logits = where.fastseg()(where.pixel_values).logits
    assert gate.check("fastseg", logits) <= gate.bound == 2e-6
    for image, is_seen in ((0, True), (1, False), (2, True)):
        wrong = logits.clone()
        wrong[image] += 1
        assert (gate.error(wrong) > 1e-2) == is_seen


@torch.no_grad()
def test_half_precision_is_measured_by_what_transformers_makes_of_it():
    with context(Setting("b0", (64, 64), 1, "bfloat16"), CPU, 1) as where:
        theirs = where.transformers()(where.pixel_values).logits
        gate = logits_gates(where)(lambda: None)
        assert gate.bound == pytest.approx(1.25 * gate.error(theirs))
        assert 1e-3 < gate.error(theirs) < 1e-1
        # Who computes a float32 model in bfloat16 is measured alike.
        where.setting = where.setting._replace(dtype="float32")
        where.pixel_values = setting.draw_pixels((64, 64))
        forward = type("", (), {"dtype": torch.bfloat16})()
        assert logits_gates(where)(forward).bound == pytest.approx(gate.bound, rel=0.2)
        assert logits_gates(where)(lambda: None).bound == 2e-6


@torch.no_grad()
def test_activations_keep_their_scale():
    """Those of the deepest variant: on denormal numbers a CPU would be slow."""
    model = setting.build_model("b5", CPU, torch.float32)
    output = model(setting.draw_pixels((64, 64)), output_hidden_states=True)
    for activations in (*output.hidden_states, output.logits):
        size = activations.abs()
        assert 0.1 < activations.std() < 10
        assert not ((size > 0) & (size < torch.finfo(size.dtype).tiny)).any()


# Options

WRONG = (
    *("--variants b6", "--sizes 65", "--sizes 32x64", "--sizes 64x64x64", "--threads 0"),
    *("--repeats -1", "--kinds all", "--providers keras", "--dtypes float8", "--cache hot"),
    *("--device mps", "--kinds memory --device cuda", "ops --batches 0", "ops --ops softmax"),
    *("ops --providers onnx", "hosts --hosts tensorflow", "hosts --modes fast"),
    "numerics --images 0",
)


@pytest.mark.parametrize("line", WRONG)
def test_wrong_options_are_named(line, capsys):
    command, dashes, rest = line.partition("--")
    with pytest.raises(SystemExit, match="2"):
        options.parse((dashes + rest).split(), command.strip())
    assert dashes + rest.split()[0] in capsys.readouterr().err


def test_defaults(tmp_path):
    for command in ("", "ops", "hosts", "numerics"):
        name = {"": "cpu", "ops": "ops_cpu"}.get(command, command)
        device = [] if command == "hosts" else ["--device", "cpu"]
        usual = options.parse([*device, "--commit", "abc"], command)
        assert usual.output == options.RESULTS / f"{name}.jsonl"
        assert (usual.threads, usual.commit, usual.resume) == (2, "abc", False)
        everything = {(variant, (512, 512), 1, "float32") for variant in setting.VARIANTS}
        assert set(usual.settings) == everything
    on_gpu = options.parse(["--device", "cuda"])
    assert on_gpu.output == options.RESULTS / "gpu.jsonl"
    assert (on_gpu.settings[0].dtype, "memory" in on_gpu.kinds) == ("bfloat16", False)
    # It takes many minutes to compile on a CPU.
    slow = "transformers max-autotune"
    assert slow in on_gpu.providers
    assert slow not in options.parse(["--device", "cpu"]).providers
    # A quick run adds no rows unless told to.
    quick = options.parse(["--quick", "--device", "cpu"])
    assert (quick.output, quick.settings) == (None, [("b0", (512, 512), 1, "float32")])
    assert options.parse(["--quick", "--output", str(tmp_path)]).output == tmp_path


def test_settings_that_tell_most_come_first():
    given = ["--sizes", "1024,512x768", "--batches", "8,1", "--variants", "b0,b1,B2"]
    found = options.parse([*given, "--device", "cpu", "--providers", "ONNX-Runtime"])
    assert found.providers == ["transformers eager", "ONNX Runtime"]  # with the baseline
    order = [(one.variant, one.size, one.batch) for one in found.settings]
    small = [("b0", (512, 768), batch) for batch in (1, 8)]
    assert order[:4:2] == small
    assert order[1:4:2] == [("b2", *one[1:]) for one in small]
    assert order[4] == ("b1", (512, 768), 1)
    assert len(order) == 12


def test_the_recorded_line_is_without_how_far_a_run_gets():
    given = ["--quick", "--resume", "--minutes", "5", "--hosts", "NVlabs structure"]
    line = "python -m bench hosts --quick --hosts 'NVlabs structure'"
    assert options.parse(given, "hosts").line == line
    assert options.parse(["--minutes=5"]).line == "python -m bench"


@pytest.mark.slow
def test_fastseg_bench_runs_them_from_anywhere(tmp_path):
    (tmp_path / "bench").mkdir()  # not this one
    (tmp_path / "bench" / "__main__.py").write_text("print('wrong')")
    command = [sys.executable, "-m", "fastseg", "bench", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: python -m bench")
    assert "--providers" in done.stdout

"""bench.ops: the calls of a forward, their gates, rows. No test depends on a time taken."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastseg
from bench import floors, gates, op_cases, op_options, op_rows, op_timing, ops
from fastseg.kernels.core import registry
from tests.bench.call_cases import BATCH, CPU, DEPTHS, SIZE, eager, recorded, tiny_model

ROOT = Path(__file__).parents[2]
STAGES = ["1", "2", "3", "4"]


@pytest.fixture(scope="module")
def calls():
    return recorded()


@pytest.fixture(autouse=True)
def one_thread():
    """What else runs here would make two threads wait for each other at every small operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


# Calls


def test_counts_add_up_to_a_forward(calls):
    counts = Counter()
    for call in calls:
        counts[call.op, call.stage] += call.count
    for stage, depth in zip(STAGES, DEPTHS, strict=True):
        assert counts["patch_embed", stage] == 1
        assert counts["sr_attention", stage] == depth
        assert counts["mix_ffn", stage] == depth
    assert not op_cases.missing(calls).keys() & {"patch_embed", "sr_attention", "mix_ffn"}
    for op, stage in (("decode_head", "head"), ("upsample_argmax", "labels")):
        if op in registry.FUSED:
            assert counts[op, stage] == 1
        else:
            assert op_cases.missing(calls)[op] == "it is no op of torch.ops.fastseg"


def test_layers_of_a_stage_are_one_call(calls):
    attention = [call for call in calls if call.op == "sr_attention"]
    assert [(call.stage, call.count) for call in attention] == list(
        zip(STAGES, DEPTHS, strict=True)
    )
    assert [call.arguments["num_heads"] for call in attention] == [1, 2, 2, 4]
    assert all(call.batch == BATCH and call.device == CPU for call in calls)


def test_arguments_are_those_of_the_forward(calls):
    pixels = op_cases.build_pixels(SIZE, BATCH, CPU, torch.float32)
    first = calls[0]
    assert first.op == "patch_embed"
    assert torch.equal(first.arguments["feature_map"], pixels)
    assert torch.equal(eager(first), next(c for c in calls if "x" in c.arguments).arguments["x"])
    labels = fastseg.kernels.upsample_argmax(tiny_model()(pixels).logits, SIZE)
    final = next((call for call in calls if call.op == "upsample_argmax"), None)
    if final is not None:
        assert torch.equal(eager(final), labels)


def test_recording_leaves_the_dispatch_as_it_was(calls):
    assert fastseg.kernels.select_backend("cpu")[0] == "eager"


def test_images_of_a_batch_are_calls(calls):
    for call in calls:
        if call.op == "upsample_argmax":
            continue  # ties may be decided otherwise in a batch
        images = torch.cat([eager(image) for image in call.images()])
        assert torch.allclose(images, eager(call), rtol=1e-4, atol=1e-5), call.op


def test_copies_keep_strides(calls):
    for call in calls:
        copy = call.map(torch.clone)
        assert copy.key() == call.key()
        mine, theirs = (
            {t.data_ptr() for value in c.arguments.values() for t in op_cases.tensors(value)}
            for c in (call, copy)
        )
        assert not mine & theirs


def test_no_other_library_is_needed():
    """It runs where transformers is not installed."""
    code = "import sys, bench.ops; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


# Timing on a GPU


def test_cold_copies_are_larger_than_the_cache(calls, monkeypatch):
    cache = SimpleNamespace(L2_cache_size=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)
    for call in calls[:3]:
        copies = op_timing.cold_copies(call)
        assert {copy.key() for copy in copies} == {call.key()}
        sizes = {
            tensor.data_ptr(): tensor.nbytes
            for copy in copies
            for value in copy.arguments.values()
            for tensor in op_cases.tensors(value)
        }
        assert sum(sizes.values()) >= 3 << 20
        assert sum(sizes.values()) <= (3 << 20) + 2 * sum(sizes.values()) / len(copies)


def test_a_graph_holds_enough_calls(monkeypatch):
    class Graph(op_timing._Graph):
        @classmethod
        def _capture(cls, functions, calls):
            return cls(None, calls)

        def microseconds(self):
            return 4.0

    assert Graph.of([print]).calls == 250  # a millisecond
    assert Graph.of([print] * 300).calls == 300  # each of them
    monkeypatch.setattr(Graph, "microseconds", lambda graph: 5000.0)
    assert Graph.of([print]).calls == 10
    monkeypatch.setattr(Graph, "microseconds", lambda graph: 0.1)
    assert Graph.of([print]).calls == 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("_tiny")
def test_ops_on_a_gpu(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert ops.main([*TINY, "--providers", "kernels", "--output", str(path)]) == 0
    rows = op_rows.read_rows(path)
    assert {(row["provider"], row["cache"]) for row in rows} == {
        (provider, cache) for provider in ("eager", "kernels") for cache in ("warm", "cold")
    }
    assert {row["method"] for row in rows} == {"CUDA graphs"}


# Gates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_is_red_on_a_wrong_result(dtype):
    for call in recorded(dtype):
        result = eager(call)
        gate = op_cases.gate(call, result)
        assert 0 <= gate.check("eager", result) <= gate.bound
        if call.op == "upsample_argmax":
            # The class that is lowest there: no near-tie.
            grid = call.arguments["logits"].float()
            wide = torch.nn.functional.interpolate(grid, size=SIZE, mode="bilinear")
            wrong = result.clone()
            wrong[-1, 0, 0] = wide[-1, :, 0, 0].argmin()
        else:
            assert gate.bound == (
                5e-6 if dtype == torch.float32 else pytest.approx(1.25 * gate.error(result))
            )
            wrong = result.clone()
            wrong[-1] *= 1.02
        for bad in (wrong, result * math.nan, result[:1], result.double()):
            with pytest.raises(gates.RedGate, match="^kernels: "):
                gate.check("kernels", bad)


# The command

TINY = (
    "--variants",
    "b0",
    "--sizes",
    "64x96",
    "--batches",
    "2",
    "--repeats",
    "2",
    "--threads",
    "1",
)


@pytest.fixture
def _tiny(monkeypatch):
    monkeypatch.setattr(op_cases, "build_model", tiny_model)
    known = floors.Ceilings(bytes_per_second=1e10, flops_per_second=1e11, source="told by a test")
    monkeypatch.setattr(ops, "ceilings", lambda device, dtype: known)


@pytest.mark.usefixtures("_tiny")
def test_ops_end_to_end(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    given = [*TINY, "--providers", "kernels", "--device", "cpu", "--output", str(path)]
    assert ops.main(given) == 0
    rows = op_rows.read_rows(path)
    assert list(json.loads(path.read_text().splitlines()[0])) == list(op_rows.FIELDS)
    assert sum(row["count"] for row in rows if row["op"] == "sr_attention") == sum(DEPTHS)
    for row in rows:
        assert (row["provider"], row["baseline"], row["ratio"]) == ("eager", "eager", 1)
        assert (row["variant"], row["size"], row["batch"]) == ("b0", [64, 96], 2)
        assert (row["cache"], row["method"]) == ("warm", "calls")
        assert (row["repeats"], row["calls"]) == (2, 1)
        assert row["parity_error"] <= row["parity_gate"]
        assert row["torch"] == torch.__version__
        assert row["command"].startswith("python -m bench.ops --variants b0")
    output = capsys.readouterr().out
    assert "kernels: skipped, kernels run on a GPU" in output
    assert output.startswith("b0, 64x96, batch 2, float32, warm, us by calls; floors by 0.01 TB/s")
    assert output.startswith(ops.table(rows))
    total = sum(row["count"] * row["p50"] for row in rows)
    assert f"{total:.1f}" in next(line for line in output.splitlines() if line.startswith("sum"))


@pytest.mark.usefixtures("_tiny")
def test_wrong_provider_gets_no_figure(tmp_path, capsys, monkeypatch):
    def provider(name, call):
        twin = registry.EAGER[call.op]
        if name == "kernels" and call.op == "mix_ffn":
            return lambda *args, **kwargs: twin(*args, **kwargs) * (1 + 1e-3)
        if name == "compiled":
            raise NotImplementedError("no compiler\nhere")
        return twin

    monkeypatch.setattr(op_cases, "provider", provider)
    path = tmp_path / "rows.jsonl"
    chosen = ("--ops", "mix_ffn,sr_attention", "--device", "cpu", "--output", str(path))
    assert ops.main([*TINY, *chosen]) == 1
    providers = {op: set() for op in ("mix_ffn", "sr_attention")}
    for row in op_rows.read_rows(path):
        providers[row["op"]].add(row["provider"])
    assert providers == {"mix_ffn": {"eager"}, "sr_attention": {"eager", "kernels"}}
    output = capsys.readouterr().out
    assert "mix_ffn (1): no figure, parity gate is red: kernels: relative RMS error" in output
    assert "mix_ffn (1): compiled failed, NotImplementedError: no compiler\n" in output
    total = next(line for line in output.splitlines() if line.startswith("sum"))
    assert total.split()[-3:] == ["-", "-", "-"]


@pytest.mark.usefixtures("_tiny")
def test_wrong_baseline_gives_no_row(tmp_path, monkeypatch):
    twin = registry.EAGER["sr_attention"]
    monkeypatch.setattr(
        op_cases, "provider", lambda name, call: lambda *args, **kwargs: twin(*args, **kwargs) * 1.1
    )
    path = tmp_path / "rows.jsonl"
    given = ("--ops", "sr_attention", "--device", "cpu", "--output", str(path))
    assert ops.main([*TINY, *given]) == 1
    assert not path.exists() or not path.read_text()


@pytest.mark.usefixtures("_tiny")
def test_calls_that_variants_share_are_measured_once(tmp_path, monkeypatch):
    timed = []
    time_call = op_timing.time_call

    def noting(call, *rest):
        timed.append(call.op)
        return time_call(call, *rest)

    monkeypatch.setattr(ops, "time_call", noting)
    path = tmp_path / "rows.jsonl"
    given = ("--variants", "b2,b3", "--ops", "patch_embed", "--providers", "eager")
    assert ops.main([*TINY, *given, "--device", "cpu", "--output", str(path)]) == 0
    assert len(timed) == len(STAGES)
    assert [(row["variant"], row["stage"]) for row in op_rows.read_rows(path)] == [
        (variant, stage) for variant in ("b2", "b3") for stage in STAGES
    ]


@pytest.mark.usefixtures("_tiny")
def test_nothing_is_begun_after_the_time(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert ops.main([*TINY, "--minutes", "0", "--device", "cpu", "--output", str(path)]) == 0
    assert not path.exists()
    assert capsys.readouterr().out == "b0, 64x96, batch 2, float32: not begun, the time is up\n"


@pytest.mark.slow
def test_resume_leaves_out_what_the_same_command_has_measured(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    given = ["--providers", "eager", "--device", "cpu", "--output", str(path)]
    chosen = [*TINY, "--ops", "mix_ffn,layer_norm", *given]
    assert ops.main(chosen) == 0
    measured = op_rows.read_rows(path)
    assert ops.main([*chosen, "--resume", "--minutes", "5"]) == 0
    assert op_rows.read_rows(path) == measured
    assert capsys.readouterr().out.count("measured before") == 4
    # The last call of a stage was not measured when the time was up.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert ops.main([*chosen, "--resume"]) == 0
    again = op_rows.read_rows(path)[len(measured) - 1 :]
    assert {(row["op"], row["stage"]) for row in again} == {("mix_ffn", measured[-1]["stage"])}
    # Another command's rows are no reason to leave anything out.
    assert ops.main([*TINY, "--ops", "mix_ffn", "--repeats", "3", *given, "--resume"]) == 0
    assert len(op_rows.read_rows(path)) > len(measured) + len(again)


def test_telling_settings_come_first():
    given = ["--sizes", "1024,512", "--batches", "8,1", "--variants", "b0,b1,b2"]
    settings = op_options.parse([*given, "--device", "cpu", "--commit", "abc"]).settings
    assert [(s.variant, s.size[0], s.batch) for s in settings[:5]] == [
        ("b0", 512, 1),
        ("b2", 512, 1),
        ("b0", 512, 8),
        ("b2", 512, 8),
        ("b0", 1024, 1),
    ]
    assert [s.variant for s in settings[8:]] == ["b1"] * 4
    assert len(settings) == 12


def test_quick_adds_no_rows_unless_told_to(tmp_path):
    quick = op_options.parse(["--quick", "--device", "cpu"])
    assert quick.output is None
    assert quick.settings == [op_options.Setting("b0", (512, 512), 1, "float32")]
    assert op_options.parse(["--quick", "--output", str(tmp_path)]).output == tmp_path
    for device, name in (("cpu", "ops_cpu.jsonl"), ("cuda", "ops_gpu.jsonl")):
        assert op_options.parse(["--device", device]).output == op_options.RESULTS / name
    assert op_options.parse(["--device", "cuda:0"]).settings[0].dtype == "bfloat16"


@pytest.mark.parametrize(
    "argv",
    [
        ["--variants", "b6"],
        ["--sizes", "65"],
        ["--sizes", "64x64x64"],
        ["--batches", "0"],
        ["--dtypes", "float64"],
        ["--ops", "softmax"],
        ["--providers", "onnx"],
    ],
)
def test_wrong_options(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        op_options.parse(argv)
    assert argv[0] in capsys.readouterr().err


# Rows


@pytest.fixture
def row(_tiny, tmp_path):
    path = tmp_path / "one.jsonl"
    given = ("--ops", "patch_embed", "--providers", "eager", "--device", "cpu")
    assert ops.main([*TINY, *given, "--output", str(path)]) == 0
    return op_rows.read_rows(path)[0]


def test_rows_that_do_not_fit_the_schema(row):
    op_rows.check_row(row)
    for change, message in (
        ({"schema": 2}, "schema"),
        ({"provider": "onnx"}, "provider"),
        ({"cache": "hot"}, "cache"),
        ({"count": 0}, "count"),
        ({"floor_us": 2 * row["floor_us"]}, "floor_us: expected .*; share: expected"),
        ({"share": 2 * row["share"]}, "share"),
        ({"parity_error": 1.0}, "above its gate"),
        ({"p20": 0.0}, "0 < p20"),
        ({"ratio": 2.0}, "baseline itself"),
        ({"device": None}, "device"),
        ({"extra": 1}, "extra is not a field"),
    ):
        with pytest.raises(ValueError, match=message):
            op_rows.check_row({**row, **change})


def test_committed_rows_fit_the_schema():
    for path in (ROOT / "bench" / "results").glob("ops_*.jsonl"):
        assert op_rows.read_rows(path)

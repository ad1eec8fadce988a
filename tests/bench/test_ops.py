"""`python -m bench ops`: the calls of a forward, their gates, rows. No test depends on a time."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

import fastseg
from bench import gates, work
from bench.measure import calls, ops, run
from bench.options import OPS
from bench.report import tables
from bench.rows import read_rows
from bench.setting import draw_pixels
from fastseg.kernels.core import registry
from tests.bench.cases import BATCH, DEPTHS, KNOWN, SIZE, recorded, tiny_model

TINY = ("--variants=b0", "--sizes=64x96", "--batches=2", "--repeats=2", "--threads=1")
STAGES = ("1", "2", "3", "4")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def eager(call):
    return call.bind(registry.eager_twin(call.op))()


# Calls


def test_counts_add_up_to_a_forward():
    found = recorded()
    counts = Counter()
    for call in found:
        counts[call.part.partition(",")[0]] += call.count
    for stage, depth in zip(STAGES, DEPTHS, strict=True):
        assert counts[f"patch_embed {stage}"] == 1
        assert counts[f"sr_attention {stage}"] == counts[f"mix_ffn {stage}"] == depth
    assert counts["decode_head head"] == counts["upsample_argmax labels"] == 1
    assert {part.split()[0] for part in counts} | set(calls.missing(found)) == set(OPS)
    # Layers of a stage are one call.
    attention = [call for call in found if call.op == "sr_attention"]
    assert [call.count for call in attention] == list(DEPTHS)
    assert [call.arguments["num_heads"] for call in attention] == [1, 2, 2, 4]
    assert torch.equal(found[0].arguments["feature_map"], draw_pixels(SIZE, BATCH))
    labels = fastseg.kernels.upsample_argmax(tiny_model()(draw_pixels(SIZE, BATCH)).logits, SIZE)
    assert torch.equal(eager(found[-1]), labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_is_red_on_a_wrong_result(dtype):
    for call in recorded(dtype):
        result = eager(call)
        gate = calls.gate(call, result)
        assert 0 <= gate.check("eager", result) <= gate.bound
        wrong = result.clone()
        if call.op == "upsample_argmax":
            # The class that is lowest there: no near-tie.
            grid = call.arguments["logits"].float()
            wide = torch.nn.functional.interpolate(grid, size=SIZE, mode="bilinear")
            wrong[-1, 0, 0] = wide[-1, :, 0, 0].argmin()
        else:
            half = pytest.approx(1.25 * gate.error(result))
            assert gate.bound == (5e-6 if dtype == torch.float32 else half)
            wrong[-1] *= 1.02
        for bad in (wrong, result * math.nan, result[:1], result.double()):
            with pytest.raises(gates.RedGate, match="^kernels: "):
                gate.check("kernels", bad)


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(*options)` runs it on tiny models; `command.rows()` are what it has added."""
    monkeypatch.setattr(ops, "build_model", tiny_model)
    monkeypatch.setattr(work, "ceilings", lambda device, dtype: KNOWN)
    path = tmp_path / "rows.jsonl"

    def command(*given):
        return run.main([*TINY, "--device", "cpu", *given, "--output", str(path)], "ops")

    command.rows = lambda: read_rows(path) if path.exists() else []
    return command


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ops_on_a_gpu(command):
    assert command("--providers", "kernels", "--device", "cuda") == 0
    methods = {"warm": "CUDA graphs", "cold": "CUDA events"}
    found = {(row.provider, row.cache, row.method) for row in command.rows()}
    assert found == {(p, *one) for p in ("eager", "kernels") for one in methods.items()}


def test_ops_of_a_forward(command, capsys):
    assert command("--providers", "kernels", "--batches", "1,2") == 0
    rows = [row for row in command.rows() if row.batch == 2]
    assert len(command.rows()) == 2 * len(rows)
    assert sum(row.count for row in rows if row.part.startswith("sr_attention")) == sum(DEPTHS)
    least = {call.part: work.work(call) for call in recorded()}
    assert {row.part: (row.bytes, row.flops) for row in rows} == least
    for row in rows:
        assert (row.provider, row.baseline, row.ratio) == ("eager", "eager", 1)
        assert (row.case, row.size, row.cache, row.method) == ("b0", SIZE, "warm", "calls")
        assert row.floor_ms == pytest.approx(KNOWN.floor_ms([least[row.part]]))
        assert row.parity_error <= row.parity_gate
        assert row.command.startswith("python -m bench ops --variants=b0")
    said = capsys.readouterr().out
    assert said.count("kernels: skipped, they run on a GPU") == 1
    assert said.startswith(tables.markdown(command.rows()))
    total = sum(1000 * row.count * row.p50 for row in rows)
    assert f" {total:.0f} " in [line for line in said.splitlines() if "B0 sum" in line][1]


def test_a_wrong_result_gets_no_figure(command, capsys, monkeypatch):
    def provider(name, call):
        twin = registry.eager_twin(call.op)
        if name == "compiled" and call.op == "patch_embed":
            raise NotImplementedError("no compiler\nhere")
        factor = 1 + 1e-3 * (name == "compiled" and call.op == "mix_ffn")
        return lambda *args, **kwargs: twin(*args, **kwargs) * factor

    monkeypatch.setattr(calls, "provider", provider)
    assert command("--ops", "mix_ffn,sr_attention,patch_embed", "--providers", "compiled") == 1
    providers = {}
    for row in command.rows():
        providers.setdefault(row.part.split()[0], set()).add(row.provider)
    assert providers.pop("sr_attention") == {"eager", "compiled"}
    assert providers == {"mix_ffn": {"eager"}, "patch_embed": {"eager"}}
    said = capsys.readouterr().out
    assert "mix_ffn 1: no figure, parity gate is red: compiled: relative RMS error" in said
    assert ": compiled skipped, NotImplementedError: no compiler\n" in said
    (total,) = (line for line in said.splitlines() if "B0 sum" in line)
    assert [cell.strip() for cell in total.split("|")[-4:]] == ["-", "-", "-", ""]


def test_a_wrong_baseline_gives_no_row(command, monkeypatch):
    twin = registry.eager_twin("sr_attention")
    wrong = lambda *args, **kwargs: twin(*args, **kwargs) * 1.1  # noqa: E731
    monkeypatch.setattr(calls, "provider", lambda name, call: wrong)
    assert command("--ops", "sr_attention") == 1
    assert command.rows() == []


def test_calls_that_variants_share_are_measured_once(command, monkeypatch):
    asked, provider = [], calls.provider
    monkeypatch.setattr(calls, "provider", lambda *given: asked.append(given) or provider(*given))
    assert command("--variants", "b2,b3", "--ops", "patch_embed", "--providers", "eager") == 0
    assert [(name, call.part) for name, call in asked] == [
        ("eager", f"patch_embed {stage}") for stage in STAGES
    ]
    assert [(row.case, row.part) for row in command.rows()] == [
        (variant, f"patch_embed {stage}") for variant in ("b2", "b3") for stage in STAGES
    ]

"""The tuner: it rejects wrong answers, picks the quickest, and writes a file that look-ups use."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from fastseg.kernels import layer_norm
from fastseg.kernels.core import configurations
from fastseg.kernels.tune import candidates
from fastseg.kernels.tune import tuner as tuning


@pytest.fixture
def counted(device):
    x = torch.randn(3, 50, 64, device=device)
    return tuning.record_calls(lambda: [layer_norm(x), layer_norm(x), layer_norm(x[:, :2])])


@pytest.fixture
def calls(counted):
    return [call for call, _ in counted]


def microseconds(quickest):
    """A stand-in for a clock: `quickest` is the configuration that it favours."""

    def measure(function):
        with configurations.record_queries() as queries:
            function()
        config = configurations.answer(queries[0], torch.device("cpu"))
        return 1.0 if config == quickest else 2.0

    return measure


def test_calls_of_one_kind_are_counted(counted):
    found = [(call.op, tuple(call.arguments["x"].shape), count) for call, count in counted]
    assert found == [("layer_norm", (3, 50, 64), 2), ("layer_norm", (3, 2, 64), 1)]


def test_what_takes_most_time_in_all_comes_first(counted):
    times = iter([2.0, 5.0, 3.0])
    ordered = tuning.most_time_first(counted, lambda function: next(times))
    assert [tuple(call.arguments["x"].shape) for call in ordered] == [(3, 2, 64), (3, 50, 64)]


def test_a_tuner_stops_at_its_time(calls):
    assert tuning.tune(calls, microseconds({}), seconds=0) == []
    taken = []

    def slow(function):
        taken.append(time.sleep(0.2))
        return 1.0

    (result,) = tuning.tune(calls, slow, seconds=0.3)
    assert result.tried == len(taken) < 5


def test_the_quickest_right_candidate_wins(calls, tmp_path, monkeypatch):
    quickest = {"BLOCK_M": 16, "num_warps": 8}
    results = tuning.tune(calls, measure=microseconds(quickest))
    assert [result.config for result in results] == [quickest, quickest]
    assert results[0].microseconds == 1.0
    assert results[0].before_microseconds == 2.0
    assert results[0].rejected == 0

    path = tmp_path / "tuned.json"
    tuning.write_configs(path, "sm_90", "a test", results)
    written = json.loads(path.read_text())["kernels"]["layer_norm"]
    assert {"dtype": "float32", "sizes": {"channels": 64, "rows": 150}}.items() <= written[
        -2
    ].items()
    monkeypatch.setenv("FASTSEG_CONFIGS", str(path))
    sizes = {"channels": 64, "rows": 150}
    found = configurations.look_up("layer_norm", torch.device("cpu"), torch.float32, sizes)
    assert found == quickest


def test_wrong_answers_are_rejected(calls, monkeypatch):
    # A block of rows that the kernel would leave out: only the first 32 are written.
    wrong = {"BLOCK_M": 32, "num_warps": 1}
    op = tuning.registry.OPS["layer_norm"]
    real = op.fused

    def fused(*arguments):
        with configurations.record_queries() as queries:
            result = real(*arguments)
        if configurations.answer(queries[0], torch.device("cpu")) == wrong:
            result[:, 32:] = float("nan")
        return result

    monkeypatch.setitem(tuning.registry.OPS, "layer_norm", replace(op, fused=fused))
    monkeypatch.setattr(tuning, "candidates", lambda query: [wrong])
    (result,) = tuning.tune(calls[:1], measure=microseconds(wrong))
    assert result.rejected == 1
    assert result.config != wrong


def committed() -> list[tuple[str, str, dict]]:
    """Kernel, dtype and sizes of every committed entry."""
    found = []
    for path in sorted(configurations.FOLDER.glob("*.json")):
        for kernel, entries in json.loads(path.read_text())["kernels"].items():
            found += [(kernel, entry["dtype"], entry) for entry in entries]
    return found


def test_every_kernel_that_is_looked_up_has_candidates():
    sizes = {"channels": 64, "out_channels": 64}
    for kernel, dtype, entry in committed():
        for one in ("half", "float32") if dtype == "any" else (dtype,):
            query = configurations.Query(
                kernel, one, tuple({**sizes, **entry["sizes"]}.items()), ()
            )
            options = candidates.candidates(query)
            assert 2 <= len(options) <= 80
            # They speak of the same things as what is committed for the same form.
            form = entry["config"].get("form")
            names = [set(option) for option in options if option.get("form") == form]
            assert set(entry["config"]) - {"maxnreg"} in names, (kernel, entry, options[0])


def test_a_measured_entry_wins_against_one_as_near(tmp_path, monkeypatch):
    """Committed entries that name fewer sizes stay in a tuned file, and are at distance 0 too."""
    sizes = {"channels": 64, "tokens": 16384, "keys": 256}
    config = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3}
    query = configurations.Query("one_head_attention", "half", tuple(sizes.items()), ())
    path = tmp_path / "tuned.json"
    tuning.write_configs(path, "sm_90", "a test", [tuning.Tuned(query, config, 1.0, 2.0, 3, 0)])
    other = query._replace(dtype="float32")
    tuning.write_configs(path, "sm_90", "a test", [tuning.Tuned(other, config, 1.0, 2.0, 3, 0)])
    monkeypatch.setenv("FASTSEG_CONFIGS", str(path))
    for dtype in (torch.bfloat16, torch.float32):  # the second run keeps what the first found
        found = configurations.look_up("one_head_attention", torch.device("cpu"), dtype, sizes)
        assert found == config


def test_a_branch_left_out_is_wrong_and_not_rounded(device):
    x = torch.randn(1, 64, 32, device=device)
    branch = 0.05 * torch.randn_like(x)
    exact = (x + branch).double()
    twin = exact.bfloat16()
    assert tuning._agree(twin, twin, exact)
    assert not tuning._agree(x.bfloat16(), twin, exact)
    unwritten = twin.clone()
    unwritten[:, -1] = float("nan")
    assert not tuning._agree(unwritten, twin, exact)

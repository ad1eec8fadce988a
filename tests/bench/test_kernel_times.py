"""Kernel times of `bench gpu`: counts and times from the profiler, a line file that goes on."""

from __future__ import annotations

import torch

from bench.gpu import kernel_times, summary


def test_kernels_are_counted_and_timed():
    x = torch.randn(64, 64)
    found = kernel_times.profiled(lambda: x.mm(x).mm(x).relu(), torch.device("cpu"))
    counts = {one["kernel"]: one["count"] for one in found}
    assert counts["aten::mm"] == 2
    assert counts["aten::relu"] == 1
    assert all(one["us"] > 0 for one in found)


def test_a_forward_that_is_in_the_file_is_not_timed_again(tmp_path, monkeypatch):
    output = tmp_path / "kernels.jsonl"
    line = ["--device", "cpu", "--quick", "--output", str(output)]
    taken = []
    monkeypatch.setattr(kernel_times, "_times", lambda *given: taken.append(given) or [{"us": 1}])
    for _ in range(2):
        assert kernel_times.main(line) == 0
    assert len(taken) == 1
    assert [one["case"] for one in summary.read_lines(output)] == [str(taken[0][0])]


def test_a_forward_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    output = tmp_path / "kernels.jsonl"
    monkeypatch.setattr(kernel_times, "QUICK", kernel_times.FORWARDS[:2])

    def times(setting, device):
        if setting.batch == 1:
            raise RuntimeError("no capture")
        return [{"kernel": "", "us": 1.0}]

    monkeypatch.setattr(kernel_times, "_times", times)
    assert kernel_times.main(["--device", "cpu", "--quick", "--output", str(output)]) == 1
    assert "batch 1, bfloat16: RuntimeError: no capture" in capsys.readouterr().out
    (line,) = summary.read_lines(output)
    assert "batch 8" in line["case"]

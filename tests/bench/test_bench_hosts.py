"""bench.hosts: its rows, its table, its command line. No test here depends on a time taken."""

from __future__ import annotations

import json

import pytest
import torch

import fastseg
from bench import host_models, host_options, host_rows, host_table, hosts, table

BEGIN, END = table.markers("hosts")

ROW = {
    "schema": 1,
    "date": "2026-01-02T03:04:05+00:00",
    "host": "transformers 5",
    "host_version": "5.23.0",
    "mode": "eager",
    "variant": "b0",
    "size": [512, 512],
    "batch": 1,
    "dtype": "float32",
    "threads": 2,
    "provider": "host",
    "baseline": "host",
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
    "fastseg": "0.1.0",
    "commit": "abc1234",
    "command": "python -m bench.hosts",
}


def other(row=ROW, **changes):
    return {**row, **changes}


FAST = other(provider="accelerated", p20=49.0, p50=50.0, p80=52.0, ratio=4.0, paired_ratio=4.1)
OWN = other(FAST, provider="own", p50=50.5)
CHECK = other(FAST, provider="check", p20=0.4, p50=0.5, p80=0.6, ratio=400.0, paired_ratio=400.0)
ROWS = [ROW, FAST, OWN, CHECK]


def test_rows_are_checked(tmp_path):
    path = tmp_path / "new" / "hosts.jsonl"
    host_rows.append_rows(path, ROWS)
    host_rows.append_rows(path, [ROW])
    assert host_rows.read_rows(path) == [*ROWS, ROW]
    for wrong, named in (
        (other(mode="fast"), "mode: expected"),
        (other(provider="transformers"), "provider: expected"),
        (other(unit="s"), "unit: expected"),
        (other(p50="200"), "p50: expected"),
        (other(parity_error=1e-5), "above its gate"),
        ({name: value for name, value in ROW.items() if name != "host"}, "host is missing"),
    ):
        with pytest.raises(ValueError, match=named):
            host_rows.append_rows(path, [wrong])
    assert len(path.read_text().splitlines()) == 5


def test_newest_run_of_a_case_counts():
    later = [other(row, date="2026-02-02T03:04:05+00:00", p50=195.0) for row in (ROW, FAST)]
    b2 = [other(row, variant="b2") for row in (ROW, FAST)]
    groups = host_rows.newest([*ROWS, *b2, *later])
    assert [set(group) for group in groups] == [{"host", "accelerated"}] * 2
    assert groups[0]["host"]["p50"] == 195.0
    assert groups[1]["host"]["variant"] == "b2"


def test_table():
    compiled = [other(row, mode="compiled", p50=row["p50"] / 2, p20=1.0) for row in (ROW, FAST)]
    compiled[1]["p50"] = 40.0
    b1 = [other(row, variant="b1") for row in (ROW, other(FAST, p50=60.0, p80=61.0))]
    smp = [other(row, host="smp", host_version="0.6.0") for row in (ROW, FAST)]
    lines = host_table.markdown([*smp, *compiled, *b1, *ROWS]).splitlines()
    assert lines[2:8] == [
        "| transformers 5.23.0, B0, 512x512 | eager | 200 ms (190 to 210) "
        "| 50.0 ms (49.0 to 52.0) | 4.00x | 50.5 ms (49.0 to 52.0) |",
        "| transformers 5.23.0, B1, 512x512 | eager | 200 ms (190 to 210) "
        "| 60.0 ms (49.0 to 61.0) | 3.33x |  |",
        "| transformers 5.23.0, geometric mean of these 2, 512x512 | eager |  |  | **3.65x** |  |",
        "| transformers 5.23.0, B0, 512x512 | compiled | 100 ms (1 to 210) "
        "| 40.0 ms (1.0 to 52.0) | 2.50x |  |",
        "| smp 0.6.0, B0, 512x512 | eager | 200 ms (190 to 210) "
        "| 50.0 ms (49.0 to 52.0) | 4.00x |  |",
        "",
    ]
    for said in ("A CPU", "torch 2.13.0", "at abc1234", "takes 500 us, 1.0%, of transformers 5.23"):
        assert said in lines[-1]
    assert host_table.markdown([]) == ""


def test_readme_and_table_from_rows(tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "rows.jsonl"
    host_rows.append_rows(results, ROWS)
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    assert hosts.main(["--readme", str(readme), "--output", str(results)]) == 0
    expected = host_table.markdown(ROWS)
    assert readme.read_text() == f"above\n{BEGIN}\n{expected}\n{END}\nbelow\n"
    assert hosts.main(["--table", str(results)]) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    "argv",
    [["--hosts", "tensorflow"], ["--variants", "b9"], ["--mode", "fast"], ["--size", "70x64"]],
)
def test_wrong_options(argv, capsys):
    with pytest.raises(SystemExit):
        host_options.parse(argv)
    assert argv[0] in capsys.readouterr().err


def test_command_of_a_process_is_the_users():
    options = host_options.parse(["--quick", "--hosts", "smp", "--process", "smp"])
    assert options.command == "python -m bench.hosts --quick --hosts smp"
    assert options.variants == ("b0",)
    assert options.output is None


@pytest.mark.parametrize("host", ["transformers 5", "NVlabs structure"])
def test_providers_compute_the_same(host):
    plain = host_models.HOSTS[host].build("b0").requires_grad_(False)
    pixel_values = torch.randn(1, 3, 64, 64)
    model = fastseg.accelerate(host_models.HOSTS[host].build("b0").requires_grad_(False))
    with torch.no_grad():
        expected = host_models.logits_of(plain, pixel_values)
        result = host_models.logits_of(model, pixel_values)
        check = hosts.freshness_check(model)()
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    assert len(check) == {"transformers 5": 5, "NVlabs structure": 2}[host]
    assert set(check) == {None}


def test_red_gate_gives_no_figure(monkeypatch, capsys):
    def wrong(model):
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        return model

    monkeypatch.setattr(hosts.fastseg, "accelerate", wrong)
    argv = ["--variants", "b0", "--size", "64", "--threads", "1", "--repeats", "1"]
    argv += ["--mode", "eager", "--process", "transformers 5"]
    assert hosts.main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no figure, parity gate is red: accelerated" in captured.err


def test_one_host_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "hosts.jsonl"
    argv = ["--hosts", "NVlabs structure", "--quick", "--size", "64", "--threads", "1"]
    assert hosts.main([*argv, "--mode", "eager", "--output", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["provider"] for row in rows] == ["host", "accelerated", "check"]
    assert rows[0]["command"].startswith("python -m bench.hosts --hosts 'NVlabs structure' --quick")
    assert capsys.readouterr().out == host_table.markdown(rows) + "\n"


def test_committed_rows_fit_the_schema():
    assert host_rows.read_rows(host_options.RESULTS)

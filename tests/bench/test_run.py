"""`python -m bench` and its gates, and `hosts`. No test depends on a time taken."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import fastseg
from bench import gates, options, setting, work
from bench.measure import hosts, labels, memory, run
from bench.providers import PROVIDERS
from bench.rows import STEPS, read_rows
from bench.setting import Setting
from tests.bench.cases import KNOWN

TINY = ("--quick", "--sizes", "64", "--repeats", "2", "--threads", "1", "--device", "cpu")
BASELINE = "transformers eager"


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Those of the machine take seconds."""
    monkeypatch.setattr(work, "ceilings", lambda device, dtype: KNOWN)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def explode(where):
    raise ZeroDivisionError("inside\na compiler")


@pytest.mark.slow
def test_forwards_and_the_ways_to_label_maps(path, capsys, monkeypatch):
    # What others cannot do is a limit of theirs, and the status is 0.
    name = "OpenVINO fp32"
    monkeypatch.setitem(PROVIDERS, name, replace(PROVIDERS[name], build=explode))
    kinds = ("--kinds", "forward,end-to-end,labels")
    names = ("--providers", "openvino-fp32,fastseg-eager,fastseg-accelerate,fastseg-triton")
    command = [*TINY, *kinds, *names, "--output", str(path)]
    assert run.main(command) == 0
    found = read_rows(path)
    for row in found:
        assert 0 <= row.parity_error <= row.parity_gate
        assert (row.size, row.batch, row.threads, row.repeats) == ((64, 64), 1, 1, 2)
        assert (row.torch, row.fastseg) == (torch.__version__, fastseg.__version__)
        assert row.command.startswith("python -m bench --quick --sizes 64 --repeats 2")

    forward = [row for row in found if row.kind == "forward"]
    names = [BASELINE, "fastseg eager", "fastseg accelerate"]
    assert [row.provider for row in forward] == names
    works = work.forward_work("b0", (64, 64), 1, "float32")
    for row in forward:
        assert (row.case, row.parity_gate) == ("b0", 2e-6)
        assert row.ratio == pytest.approx(forward[0].p50 / row.p50)
        assert row.setup_s > 0
        assert (row.bytes, row.flops) == work.total(works)
        assert row.floor_ms == pytest.approx(KNOWN.floor_ms(works))

    images = [row for row in found if row.kind == "end to end"]
    assert [(row.part, row.provider) for row in images] == [
        (part, name) for part in ("whole", *STEPS) for name in names
    ]
    assert len({row.date for row in images}) == 1
    by_part = {row.part: row.p50 for row in images if row.provider == names[1]}
    # With two rounds medians are means, which add up.
    assert by_part["whole"] == pytest.approx(sum(by_part[part] for part in STEPS))

    maps = [row for row in found if row.kind == "labels"]
    assert {row.case for row in maps} == set(labels.LABEL_CASES)
    assert {row.provider for row in maps} == {
        *("interpolate + argmax", "interpolate + argmax, channels-last", "fastseg")
    }
    assert {row.bytes for row in maps if "19" in row.case} == {4 * 19 * 16**2 + 8 * 64**2}

    said = capsys.readouterr()
    theirs = "OpenVINO fp32 skipped, ZeroDivisionError: inside\n"
    for skipped in ("fastseg Triton skipped, it runs on cuda only\n", theirs):
        assert f"b0, 64x64, batch 1, float32: {skipped}" in said.out
        assert f"b0, 64x64, batch 1, float32: {skipped}" in said.err

    before = path.read_bytes()
    assert run.main([*command, "--resume", "--minutes=5"]) == 0
    assert capsys.readouterr().out.count("measured before") == 2 + len(labels.LABEL_CASES)
    # Rows of another command are no reason to leave anything out; that the time is up is one.
    assert run.main([*command, "--repeats", "3", "--resume", "--minutes", "0"]) == 0
    assert capsys.readouterr().out.count("not begun, the time is up") == 2 + len(labels.LABEL_CASES)
    assert path.read_bytes() == before


def a_little_wrong(where):
    model = where.fastseg()
    model.decode_head.classifier.bias.data[0] += 1e-3
    return lambda pixel_values: model(pixel_values).logits


def off_the_fast_path(where):
    load = where.fastseg

    def hooked():
        model = load()
        model.decode_head.linear_fuse.register_forward_hook(lambda *arguments: None)
        return model

    where.fastseg = hooked
    return PROVIDERS["fastseg eager"].build(where)


def test_what_is_wrong_gets_no_figure_and_costs_no_other(path, capsys, monkeypatch):
    builders = {"fastseg Triton": explode, "fastseg compiled": a_little_wrong}
    builders |= {"fastseg CUDA graph": off_the_fast_path}
    for name, build in builders.items():
        monkeypatch.setitem(PROVIDERS, name, replace(PROVIDERS[name], build=build, device=""))
    names = ",".join([*builders, "fastseg-eager", "fastseg-accelerate"])
    command = [*TINY, "--kinds", "forward", "--providers", names, "--output", str(path)]
    assert run.main(command) == 1
    found = [row.provider for row in read_rows(path)]
    assert found == [BASELINE, "fastseg eager", "fastseg accelerate"]
    said = capsys.readouterr().out
    assert "fastseg Triton no figure, ZeroDivisionError: inside\n" in said
    assert "no figure, parity gate is red: fastseg compiled: relative RMS error" in said
    assert "fastseg CUDA graph no figure, RuntimeError: not on the fast path: decode_head: " in said


def test_wrong_label_maps_get_no_figure(path, capsys, monkeypatch):
    def blank(logits, size):
        return torch.zeros(logits.shape[0], *size, dtype=torch.int64)

    monkeypatch.setattr(fastseg.kernels, "upsample_argmax", blank)
    kinds = ("--kinds", "labels,end-to-end", "--providers", "fastseg-eager")
    assert run.main([*TINY, *kinds, "--output", str(path)]) == 1
    found = read_rows(path)
    assert {row.kind for row in found} == {"labels", "end to end"}
    assert not [row for row in found if row.provider.startswith("fastseg")]
    said = capsys.readouterr().out
    assert said.count("red: fastseg: shortfall") == len(labels.LABEL_CASES)
    assert said.count("red: fastseg eager: shortfall") == 1


def test_providers_are_listed_with_reasons(capsys):
    names = ("--providers", "fastseg-eager,fastseg-triton")
    assert run.main(["--list", "--threads", "1", "--device", "cpu", *names]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PROVIDERS)
    assert f"fastseg eager: {fastseg.__version__}" in lines
    assert "ONNX Runtime: only where --providers names it" in lines
    assert lines[-1].endswith("fastseg Triton skipped, it runs on cuda only")


# Memory


@pytest.mark.slow
def test_memory_is_that_of_the_forward():
    samples, checked = memory.peaks(Setting("b0", (256, 256), 1, "float32"), 1, repeats=1)
    # transformers' head has four maps of 256 channels and their concatenation at once.
    maps = 2 * 4 * 4 * 256 * 64 * 64 / 1e6
    logits = 4 * 150 * 64 * 64 / 1e6
    assert maps < samples[BASELINE][0] < 1000  # all maps of all layers: 700
    assert logits < samples["fastseg eager"][0] < samples[BASELINE][0]
    for one in checked.values():
        assert 0 < one.error <= one.gate.bound == gates.FLOAT32_BOUND


@pytest.mark.slow
def test_memory_of_a_wrong_model_is_no_figure(path, capsys, monkeypatch):
    """Wrong beside the reference, which is of other pixels here."""
    draw = setting.draw_pixels
    monkeypatch.setattr(setting, "draw_pixels", lambda size, batch=1: draw(size, batch).flip(3))
    command = [*TINY, "--sizes", "256", "--kinds", "memory", "--output", str(path)]
    assert run.main(command) == 1
    assert not path.exists()
    assert f"parity gate is red: {BASELINE}: relative RMS error" in capsys.readouterr().out


# Hosts


@pytest.mark.parametrize(
    ("host", "parts"),
    [
        ("transformers 5", 5),
        ("NVlabs structure", 2),
        ("KerasCV structure", 2),
        ("transformers GLPN", 1),
        ("transformers PVT v2", 1),
    ],
)
def test_a_host_computes_the_same_accelerated(host, parts):
    plain = hosts.HOSTS[host].build("b0").requires_grad_(False)
    accelerate = hosts.HOSTS[host].accelerate or fastseg.accelerate
    model = accelerate(hosts.HOSTS[host].build("b0").requires_grad_(False))
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = hosts.logits_of(plain, pixel_values)
        result = hosts.logits_of(model, pixel_values)
        check = hosts.freshness_check(model)()
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    assert len(check) == parts
    assert set(check) == {None}


HOST = ("--quick", "--sizes", "64", "--modes", "eager", "--threads", "1", "--repeats", "1")


def test_a_red_gate_of_a_host_gives_no_figure(monkeypatch):
    def wrong(model):
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        return model

    monkeypatch.setattr(hosts.fastseg, "accelerate", wrong)
    given = options.parse(HOST, "hosts")
    rows, notes, bad = hosts.measure_host(given, "transformers 5")
    assert (rows, bad) == ([], True)
    assert "no figure, parity gate is red: accelerated: " in notes[0]


@pytest.mark.slow
def test_one_host_from_the_command_line(path):
    command = [*HOST, "--hosts", "nvlabs-structure", "--output", str(path)]
    assert run.main(command, "hosts") == 0
    found = read_rows(path)
    assert [row.provider for row in found] == ["host", "accelerated", "check"]
    for row in found:
        assert (row.kind, row.host, row.mode) == ("host", "NVlabs structure", "eager")
        assert row.parity_error <= row.parity_gate == 2e-6


def test_the_help_names_all_commands(capsys):
    from bench.__main__ import _MEASURING, _MODULES, main

    with pytest.raises(SystemExit):
        main(["--help"])
    told = re.split(r"[\s,;]+", capsys.readouterr().out.partition("Other benchmarks")[2])
    assert {*_MEASURING, *_MODULES} - {*told} == {"compare"}  # which is an option

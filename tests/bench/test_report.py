"""bench.report: figures land in the right cells, bars and files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib as mpl
import pytest

from bench.machine import ROOT
from bench.options import RESULTS
from bench.providers import PROVIDERS
from bench.report import documents, draw, pictures, tables
from bench.report.numerics import numerics
from bench.report.threads import by_threads
from bench.rows import append_rows, read_rows
from tests.bench import cases
from tests.bench.cases import BASE_MS, CPU_SPEED, GPU_NAME, row

CPU_ROWS, GPU_ROWS = cases.cpu_rows(), cases.gpu_rows()
BEST = "**best of fastseg**, times as fast"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def body(text):
    """The rows of the first table in `text`, each a list of cells."""
    found = next(part for part in text.split("\n\n") if part.startswith("|"))
    return [cells(line) for line in found.splitlines()[2:]]


# Tables


def test_forward_has_a_line_a_provider_and_a_column_a_variant():
    title, drawn, caption = tables.forward(CPU_ROWS).split("\n\n")
    assert title == "512x512, batch 1, float32:"
    assert cells(drawn.splitlines()[0]) == ["", "B0", "B1", "times as fast, mean", "of the floor"]
    found = {line[0]: line[1:] for line in body(drawn)}
    assert found["transformers eager"] == ["266", "436", "1.00x", "11%"]
    assert found["fastseg eager"] == ["63.3", "104", "4.20x", "47%"]
    # In another precision it would have another floor.
    assert found["OpenVINO default \\*"] == ["57.8", "94.8", "4.60x", "-"]
    assert [name.removesuffix(" \\*") for name in found] == [*CPU_SPEED, BEST]
    # 7.50 is of a lower precision.
    assert found[BEST][:3] == ["**6.70x**", "**6.70x**", "**6.70x**"]
    star = "\\* computes in a lower precision, and is not taken as best: OpenVINO default (error "
    for said in (star + "0.0031)", "AVX512; 2 threads", "torch 2.13.0", "at abc1234"):
        assert said in caption
    assert "2026-01-02; by `python -m bench`." in caption


def test_a_mean_needs_all_variants():
    b0 = [row(), row(50.0, "fastseg eager", ratio=4.0), row(10.0, "OpenVINO fp32", ratio=20.0)]
    b1 = [row(100.0, case="b1"), row(200.0, "fastseg eager", case="b1", ratio=0.5)]
    _, *found = body(tables.forward([*b0, *b1]))
    assert found[0] == ["OpenVINO fp32", "10.0", "-", "-"]
    assert found[1:] == [["fastseg eager", "50.0", "200", "1.41x"]]  # the root of 4 and 1/2


def test_newest_rows_of_the_last_cpu_count_and_each_setting_has_its_table():
    old = {"device": "Old CPU", "cpu": "Old CPU", "date": "2025-01-01T00:00:00+00:00"}
    new = {"date": "2026-02-01T00:00:00+00:00"}
    text = tables.forward([row(9.0, **old), row(300.0), row(201.0, **new), row(5.0, **old)])
    assert body(text) == [["transformers eager", "201", "1.00x"]]
    assert "Old CPU" not in text
    text = tables.forward([row(batch=8), row(dtype="bfloat16"), row(device=GPU_NAME, cache="cold")])
    assert [part for part in text.split("\n\n") if part.endswith(":")] == [
        *("512x512, batch 8, float32:", "512x512, batch 1, bfloat16:"),
        "512x512, batch 1, float32, cold cache:",
    ]


def test_end_to_end_has_the_steps():
    long = body(tables.end_to_end(CPU_ROWS))
    assert long[0] == ["B0", "transformers eager", "9.00", "266", "87.0", "362", "1.00x"]
    assert long[1] == ["B0", "fastseg eager", "9.00", "63.3", "5.00", "77.3", "4.68x"]
    assert len(long) == 7
    ratios = [(base + 96) / (base / 4.2 + 14) for base in BASE_MS.values()]
    mean = f"**{(ratios[0] * ratios[1]) ** 0.5:.2f}x**"
    assert long[-1] == ["", "best of fastseg, geometric mean", *[""] * 4, mean]


def test_labels_memory_and_numerics():
    random, smooth = body(tables.labels(CPU_ROWS))
    assert random == ["random logits", "94.0 (2.47x)", "38.0"]
    assert smooth == ["smooth logits", "94.0 (23.50x)", "4.00"]
    theirs, ours = body(tables.memory(CPU_ROWS))
    assert theirs == ["transformers eager", "1857", "1.00x"]
    assert ours == ["fastseg eager", "212", "8.76x"]

    what = {"kind": "numerics", "case": "scenes-b0", "unit": "share", "baseline": "float64"}
    figures = {"error": 2.5e-7, "differing": 1e-6, "shortfall": 0.0}
    found = [row(v, "fastseg eager", part=part, **what) for part, v in figures.items()]
    line = ["float32", "fastseg eager", "CPU", "-", "0.0001%", "2.5e-07", "0.0e+00"]
    assert body(numerics(found)) == [line]  # of rows from before there was a mIoU
    found.append(row(0.91904, "fastseg eager", part="mIoU", **what))
    exact = [row(v, dtype="float64", part=part, **what) for part, v in figures.items()]
    text = numerics([*found, *exact, row(0.92, dtype="float64", part="mIoU", **what)])
    first, second = body(text)
    assert first[:4] == ["float64", "transformers eager", "CPU", "92.00%"]
    assert second == [*line[:3], "91.90%", *line[4:]]
    assert "11 scenes of 512x512." in text


def test_threads_beside_openvino_on_the_same_weights():
    theirs = {"float32": "fastseg OpenVINO fp32", "bfloat16": "fastseg OpenVINO default"}
    rows = [row(1.0, "fastseg eager", batch=8), row(2.0, "fastseg compiled")]
    for threads, slower in ((1, 2.0), (2, 1.0)):
        for case, ours, openvino in (("b0", 60.0, 50.0), ("b2", 250.0, 300.0)):
            of_case = {"case": case, "threads": threads}
            rows.append(row(8 * ours * slower, **of_case))
            rows.append(row(ours * slower, "fastseg eager", **of_case))
            rows.append(row(openvino * slower, theirs["float32"], **of_case))
            rows.append(row(openvino * slower / 2, theirs["bfloat16"], **of_case))
            rows.append(row(8 * ours, dtype="bfloat16", **of_case))
            rows.append(row(ours, "fastseg eager", dtype="bfloat16", **of_case))
    assert body(by_threads(rows)) == [
        ["1", "float32", "fastseg", "120", "500", "1.00x"],
        ["1", "float32", "fastseg in OpenVINO", "100", "600", "1.00x"],
        ["1", "bfloat16", "fastseg", "60.0", "250", "1.00x"],
        ["1", "bfloat16", "fastseg in OpenVINO", "50.0", "300", "1.00x"],
        ["2", "float32", "fastseg", "60.0", "250", "1.00x"],
        ["2", "float32", "fastseg in OpenVINO", "50.0", "300", "1.00x"],
        ["2", "bfloat16", "fastseg", "60.0", "250", "2.00x"],
        ["2", "bfloat16", "fastseg in OpenVINO", "25.0", "150", "1.00x"],
    ]
    assert by_threads(rows[:2]) == tables.NO_ROWS


def test_hosts():
    def of(p50, provider, **changes):
        host = {"kind": "host", "host": "transformers 5", "mode": "eager", "baseline": "host"}
        return row(p50, provider, ratio=200 / p50, **{**host, **changes})

    b0 = [of(200.0, "host"), of(50.0, "accelerated"), of(48.0, "own"), of(0.5, "check")]
    b1 = [of(200.0, "host", case="b1"), of(60.0, "accelerated", case="b1")]
    smp = {"host": "smp", "provider_version": "0.6.0"}
    text = tables.hosts([*b1, of(200.0, "host", **smp), of(40.0, "accelerated", **smp), *b0])
    first, second, mean, other = body(text)
    name, common = "transformers 5.23.0", ["eager", "512x512, batch 1, float32"]
    plain, own = "200 (190 to 210)", "48.0 (45.6 to 50.4)"
    assert first == [f"{name}, B0", *common, plain, "50.0 (47.5 to 52.5)", "4.00x", own]
    assert second == [f"{name}, B1", *common, plain, "60.0 (57.0 to 63.0)", "3.33x", ""]
    assert mean == [f"{name}, geometric mean of these 2", *common, "", "", "**3.65x**", ""]
    assert other == ["smp 0.6.0, B0", *common, plain, "40.0 (38.0 to 42.0)", "5.00x", ""]
    assert "takes 500 us, 1.0%, of transformers 5.23.0 B0" in text


def test_ways_to_run_a_model_on_a_cpu():
    """In bfloat16 they are compared with float32 too; OpenVINO's own choice is bfloat16."""
    rows = []
    for (provider, dtype), figures in {
        ("transformers eager", "float32"): (200, 400),
        ("fastseg accelerate", "float32"): (50, 100),
        ("OpenVINO default", "float32"): (40, 40),
        ("ONNX Runtime", "float32"): (70, 70),
        ("transformers eager", "bfloat16"): (100, 200),
        ("fastseg accelerate", "bfloat16"): (20, 40),
    }.items():
        for case, p50 in zip(("b0", "b2"), figures, strict=True):
            gate = 1e-2 if provider == "OpenVINO default" else 1e-5
            options = {"provider": provider, "dtype": dtype, "parity_gate": gate}
            rows.append(
                row(case=case, **dict.fromkeys(("p20", "p50", "p80"), float(p50)), **options)
            )
    lines = [line.split("|")[1:-1] for line in tables.by_dtype(rows).splitlines()[2:7]]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["transformers", "float32", "200", "400", "1.00x"],
        ["fastseg", "float32", "50.0", "100", "**4.00x**"],
        ["transformers", "bfloat16", "100", "200", "2.00x"],
        ["transformers' model in OpenVINO", "bfloat16", "40.0", "40.0", "7.07x"],
        ["fastseg", "bfloat16", "20.0", "40.0", "**10.00x**"],
    ]
    assert tables.by_dtype([]) == tables.NO_ROWS


# Documents


@pytest.fixture
def page(tmp_path):
    """A document, beside a file of the rows on a CPU."""
    append_rows(tmp_path / "rows.jsonl", CPU_ROWS)
    return tmp_path / "page.md"


def rewritten(page):
    given = ["--rows", str(page.parent / "rows.jsonl"), "--rewrite", str(page)]
    return documents.main(given)


def test_tables_are_rewritten(page):
    # What the README has: of B0 and B2.
    made = {"cpu": tables.by_dtype([r for r in CPU_ROWS if r.case == "b0"])}
    made |= {"forward": tables.forward(CPU_ROWS), "labels": tables.labels(CPU_ROWS)}
    links = [f"![{one.title}](plots/{one.name}.svg)" for one in pictures.all_pictures(CPU_ROWS)]
    made |= {"gpu": tables.NO_ROWS, "plots": "\n\n".join(links)}
    texts = [
        "\nbetween\n".join(
            f"<!-- bench:{name} -->\n{table}\n<!-- /bench:{name} -->" for name, table in one.items()
        )
        for one in (dict.fromkeys(made, "old"), made)
    ]
    page.write_text(f"above\n{texts[0]}\nbelow\n")
    assert rewritten(page) == 0
    assert page.read_text() == f"above\n{texts[1]}\nbelow\n"
    assert documents.renewed(texts[1].replace("| 266 |", "| 265 |"), page, CPU_ROWS) == texts[1]
    assert {path.name for path in page.parent.iterdir()} == {"page.md", "rows.jsonl"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no table", "expected markers as"),
        ("<!-- bench:gpus -->\n<!-- /bench:gpus -->", "expected markers as .*'gpus'"),
        ("<!-- /bench:cpu -->\n<!-- bench:cpu -->", "bench:cpu --> once each, in order"),
        ("<!-- bench:cpu -->\n", "bench:cpu --> once each, in order"),
    ],
)
def test_wrong_markers_are_named(page, text, message):
    page.write_text(text)
    with pytest.raises(ValueError, match=rf"page.md: .*{message}"):
        rewritten(page)
    assert page.read_text() == text


def test_no_rows_is_said(page, capsys):
    assert all(table([]) == tables.NO_ROWS for table in documents.TABLES.values())
    assert pictures.all_pictures([]) == []
    for command in (documents, pictures):
        with pytest.raises(SystemExit, match="2"):
            command.main(["--rows", str(page.parent / "none.jsonl")])
        assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        *(
            "README.md",
            "docs/benchmarks.md",
            "docs/cpu.md",
            "docs/distributed.md",
            "docs/numerics.md",
        ),
        "docs/seggpt.md",
    ],
)
def test_committed_tables_are_those_of_the_rows(name):
    rows = [one for path in sorted(RESULTS.glob("*.jsonl")) for one in read_rows(path)]
    text = (ROOT / name).read_text(encoding="utf-8")
    assert documents.renewed(text, ROOT / name, rows) == text, "run: python -m bench tables"


# Pictures


def named(*rows):
    return {one.name: one for one in pictures.all_pictures(rows)}


def data_of(path):
    """What `Picture.data` gave when the SVG was written."""
    name = "{http://purl.org/dc/elements/1.1/}description"
    return json.loads(ElementTree.parse(path).find(f".//{name}").text)


def bars_of(picture, panel="B0"):
    return picture.panels[panel].set_index("name").to_dict("index")


def test_latency_and_share_of_the_roofline():
    found = named(*CPU_ROWS)
    latency = found["latency-cpu-float32-512x512-batch1"]
    assert list(latency.panels) == ["B0", "B1"]
    bars = bars_of(latency, "B1")
    assert len(bars) == len(CPU_SPEED)
    for name, speed in CPU_SPEED.items():
        bar, expected = bars[f"{name} *" if name.endswith("default") else name], 436 / speed
        given = [bar[which] for which in ("value", "low", "high")]
        assert given == pytest.approx([expected, 0.95 * expected, 1.05 * expected])
    assert bars["fastseg eager"]["text"] == "104"
    assert "lower precision than asked for: OpenVINO default (error 0.0031)" in latency.note
    assert "fastseg 0.1.0 at abc1234; 2026-01-02" in latency.note
    assert latency.machine == "A CPU, 2 cores, AVX512; 2 threads"
    share = found["roofline-cpu-float32-512x512-batch1"]
    bar = bars_of(share)["fastseg eager"]
    assert bar["value"] == pytest.approx(100 * 4.2 / 9)
    assert bar["low"] < bar["value"] < bar["high"]
    assert (bar["text"], share.limit) == ("47%", 100)
    assert not [name for name in bars_of(share) if "default" in name]


def test_throughput_and_memory():
    found, here = named(*GPU_ROWS, *CPU_ROWS), "nvidia-h200-bfloat16"
    points = found[f"throughput-{here}-512x512"].panels["B0"]
    points = points[points["name"] == "fastseg CUDA graph"]
    assert list(points["at"]) == [1, 8]
    for column, rate in (("value", 1000), ("low", 1000 / 1.05), ("high", 1000 / 0.95)):
        assert list(points[column]) == pytest.approx([rate, rate])
    memory = bars_of(found[f"memory-{here}-1024x2048-batch1"])
    texts = {name: bar["text"] for name, bar in memory.items()}
    assert texts == {"transformers eager": "900", "fastseg Triton": "300"}
    memory = bars_of(found["memory-cpu-float32-1024x2048-batch1"])
    assert memory["fastseg eager"]["text"] == "212"


def test_a_picture_for_each_setting_that_has_what_it_shows():
    cold = row(device=GPU_NAME, cache="cold", dtype="bfloat16")
    forwards = [replace(one, floor_ms=None, flops=None) for one in CPU_ROWS if one.floor_ms]
    assert list(named(*forwards, cold, row(batch=4, case="b2"))) == [
        "latency-cpu-float32-512x512-batch1",
        "latency-cpu-float32-512x512-batch4",
        "latency-nvidia-h200-bfloat16-512x512-batch1-cold",
    ]


def test_every_provider_has_a_colour_of_its_own():
    assert len({one.colour for one in PROVIDERS.values()}) == len(PROVIDERS)


def test_bars_are_as_long_as_their_figures_and_what_is_missing_is_said():
    few = [row(200.0), row(50.0, "fastseg eager"), row(60.0, case="b1")]
    (picture,) = named(*few).values()
    b0, b1 = draw.figure_of(picture).axes
    assert [patch.get_width() for patch in b0.patches] == [200.0, 50.0]
    assert [patch.get_width() for patch in b1.patches] == [60.0]
    said = [[text.get_text().strip() for text in axes.texts] for axes in (b0, b1)]
    assert [texts.count("not measured") for texts in said] == [0, 1]


def test_same_rows_give_the_same_file(page):
    out, rows = page.parent / "one", str(page.parent / "rows.jsonl")
    assert pictures.main(["--rows", rows, "--out", str(out)]) == 0
    assert {path.stem for path in out.iterdir()} == set(named(*CPU_ROWS))
    picture = named(*CPU_ROWS)["latency-cpu-float32-512x512-batch1"]
    with mpl.rc_context({"font.size": 20, "svg.fonttype": "path", "svg.hashsalt": "other"}):
        path = draw.save(picture, page.parent / "two")
    assert path.read_bytes() == (out / path.name).read_bytes()
    assert data_of(path) == json.loads(json.dumps(picture.data()))
    assert not any(word in path.read_text() for word in ("<dc:date>", "/work", "/home", "/tmp"))
    drawn = {element.text for element in ElementTree.parse(path).iter() if element.text}
    assert {"B1", "104", "fastseg eager", "OpenVINO default *"} <= drawn


def test_committed_pictures_are_those_of_the_rows():
    """By their figures: another matplotlib may write other bytes."""
    rows = [one for path in sorted(RESULTS.glob("*.jsonl")) for one in read_rows(path)]
    made = pictures.all_pictures(rows)
    expected = {one.name: json.loads(json.dumps(one.data())) for one in made}
    kept = {path.stem: data_of(path) for path in pictures.OUT.glob("*.svg")}
    assert kept == expected, "run: python -m bench plots"

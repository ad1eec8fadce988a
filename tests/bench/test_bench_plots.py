"""bench.plots: the figures in the pictures, how they are drawn, and the committed files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib as mpl
import pytest

from bench import roofline, rows, shown, table
from bench.plots import __main__ as command
from bench.plots import draw, files, latency, memory, pictures, share, style, throughput, waterfall
from bench.plots.model import Picture, Skipped
from tests.bench import row_cases
from tests.bench.row_cases import BASE_MS, CPU_SPEED, GPU_SPEED, row

CPU_ROWS = row_cases.cpu_rows()
GPU_ROWS = row_cases.gpu_rows()
COMMITTED = command.OUT


def bars_of(picture, panel=0):
    return {bar.name: bar for bar in picture.panels[panel].bars}


# What is in them


def test_latency():
    (picture,) = latency.pictures(CPU_ROWS)
    assert picture.name == "latency-cpu-float32-512x512-batch1"
    assert [panel.title for panel in picture.panels] == ["B0", "B1", "B2", "B3", "B4", "B5"]
    bars = bars_of(picture, panel=2)
    assert len(bars) == len(CPU_SPEED)
    for name, speed in CPU_SPEED.items():
        bar = bars[f"{name} *" if name.endswith("default") else name]
        expected = BASE_MS["b2"] / speed
        assert bar.parts == pytest.approx((expected,))
        assert (bar.low, bar.high) == pytest.approx((0.95 * expected, 1.05 * expected))
    assert bars["transformers eager"].text == "1408"
    assert bars["fastseg OpenVINO fp32"].text == "210"
    assert "lower precision than asked for: OpenVINO default (error 0.0031)" in picture.notes[0]
    assert "fastseg 0.1.0 at abc1234; 2026-01-02" in picture.notes[1]
    assert picture.machine == "A CPU, 2 cores, AVX512; 2 threads"


def test_a_picture_for_each_setting():
    cold = row(100.0, device="NVIDIA H200", cache="cold", dtype="bfloat16")
    names = [picture.name for picture in latency.pictures([*GPU_ROWS, *CPU_ROWS, cold])]
    assert names == [
        "latency-cpu-float32-512x512-batch1",
        "latency-nvidia-h200-bfloat16-512x512-batch1",
        "latency-nvidia-h200-bfloat16-512x512-batch1-cold",
        "latency-nvidia-h200-bfloat16-512x512-batch8",
        "latency-nvidia-h200-bfloat16-512x512-batch32",
        "latency-nvidia-h200-bfloat16-1024x2048-batch1",
    ]


def test_throughput():
    picture, skipped = throughput.pictures(GPU_ROWS)
    assert picture.name == "throughput-nvidia-h200-bfloat16-512x512"
    assert "batch" not in picture.title.replace("over the batch", "")
    points = [bar for bar in picture.panels[0].bars if bar.name == "fastseg CUDA graph"]
    assert [point.at for point in points] == [1, 8, 32]
    seconds = (BASE_MS["b0"] * 8 / 400 + 3.0) / GPU_SPEED["fastseg CUDA graph"] / 1000
    assert points[1].parts == pytest.approx((8 / seconds,))
    assert (points[1].low, points[1].high) == pytest.approx(
        (8 / seconds / 1.05, 8 / seconds / 0.95)
    )
    assert skipped == Skipped(
        "throughput-nvidia-h200-bfloat16-1024x2048", "no variant has several batches, only 1"
    )


def test_share_of_the_roofline():
    (picture,) = share.pictures(CPU_ROWS)
    bars = bars_of(picture)
    assert bars["transformers eager"].parts == pytest.approx((100 / 9,))
    assert bars["fastseg eager"].parts == pytest.approx((100 * 4.2 / 9,))
    assert bars["fastseg eager"].text == "47%"
    assert bars["fastseg eager"].low < bars["fastseg eager"].parts[0] < bars["fastseg eager"].high
    # In another precision it would have another floor.
    assert not [name for name in bars if "default" in name]
    assert "0.21 TFLOP/s, 19 GB/s" in picture.notes[0]
    assert picture.limit == 100


def test_memory():
    cpu, gpu = memory.pictures([*CPU_ROWS, *GPU_ROWS])
    assert {name: bar.text for name, bar in bars_of(cpu).items()} == {
        "transformers eager": "1857",
        "fastseg eager": "212",
    }
    assert gpu.name == "memory-nvidia-h200-bfloat16-1024x2048-batch1"
    bars = bars_of(gpu)
    assert set(bars) == {name for name in GPU_SPEED if "graph" not in name}
    assert bars["fastseg Triton"].parts == pytest.approx((7200 / 3.1,))
    assert bars["fastseg Triton"].low is None


def test_waterfall():
    (picture,) = waterfall.pictures(CPU_ROWS)
    bars = list(bars_of(picture).values())
    assert [bar.name for bar in bars] == [
        "transformers eager",
        "transformers compiled",
        "fastseg eager",
        "fused label map",
    ]
    assert bars[0].parts == pytest.approx((266.0, 87.0))
    assert bars[2].parts == pytest.approx((266.0 / 4.2, 87.0))
    assert bars[3].parts == pytest.approx((266.0 / 4.2, 5.0))
    assert bars[3].text == f"68.3  {353 / (266 / 4.2 + 5):.1f}x"
    assert picture.parts == ("forward", "upsampling and argmax")
    assert "No rows of fastseg Triton, fastseg CUDA graph." in picture.notes[0]
    cold = [{**one, "cache": "cold"} for one in CPU_ROWS]
    assert [one.name[-4:] for one in waterfall.pictures([*CPU_ROWS, *cold])] == ["tch1", "cold"]
    (skipped,) = waterfall.pictures([one for one in CPU_ROWS if one["part"] != "forward"])
    assert skipped.reason == "no variant has two steps"


def test_what_there_is_not_is_skipped_with_a_reason():
    found, skipped = pictures.all_pictures([])
    assert found == []
    assert sorted(one.name for one in skipped) == [
        "latency",
        "memory",
        "roofline",
        "throughput",
        "waterfall",
    ]
    assert all(one.reason for one in skipped)
    forwards = [one for one in CPU_ROWS if one["kind"] == "forward"]
    without_floor = [{**one, "floor_ms": None} for one in forwards]
    found, skipped = pictures.all_pictures(without_floor)
    assert [one.name for one in found] == ["latency-cpu-float32-512x512-batch1"]
    assert (
        "no floor"
        in dict((one.name, one.reason) for one in skipped)["roofline-cpu-float32-512x512-batch1"]
    )


# How they are drawn


def test_every_provider_has_a_colour_of_its_own():
    assert tuple(style.COLOURS) == shown.PROVIDERS
    assert len(set(style.COLOURS.values())) == len(shown.PROVIDERS)
    assert style.FUSED == roofline.FUSED


def all_kinds():
    found, _ = pictures.all_pictures([*CPU_ROWS, *GPU_ROWS])
    large = {p.name.split("-")[0] + p.kind: p for p in found}
    few = [row(200.0), row(50.0, "fastseg eager"), row(60.0, "fastseg eager", case="b1")]
    return [*large.values(), *latency.pictures(few)]


@pytest.mark.parametrize("picture", all_kinds(), ids=lambda picture: picture.name)
def test_texts_are_inside_and_apart(picture):
    with style.settings():
        figure = draw.figure_of(picture)
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        legends = [text for legend in figure.legends for text in legend.get_texts()]
        texts = [text for text in figure.findobj(mpl.text.Text) if text.get_text()]
        axes = [one.get_window_extent(renderer) for one in figure.axes]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        page = figure.bbox
        for said, box in boxes:
            assert page.x0 <= box.x0 < box.x1 <= page.x1, said
            assert page.y0 <= box.y0 < box.y1 <= page.y1, said
        for index, (said, box) in enumerate(boxes):
            for other, other_box in boxes[index + 1 :]:
                assert not overlap(box, other_box), (said, other)
        for text in legends:
            box = text.get_window_extent(renderer)
            assert not any(overlap(box, one) for one in axes), text.get_text()


def overlap(one, other):
    """By more than a pixel: rows of text stand close."""
    return (
        min(one.x1, other.x1) - max(one.x0, other.x0) > 1
        and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
    )


def test_bars_are_as_long_as_their_figures():
    (picture,) = latency.pictures(CPU_ROWS)
    with style.settings():
        axes = draw.figure_of(picture).axes[1]
    assert axes.get_title(loc="left") == "B1"
    assert [patch.get_width() for patch in axes.patches] == pytest.approx(
        [BASE_MS["b1"] / speed for speed in CPU_SPEED.values()]
    )


def test_missing_bar_is_named():
    few = [row(200.0), row(50.0, "fastseg eager"), row(60.0, case="b1")]
    (picture,) = latency.pictures(few)
    with style.settings():
        axes = draw.figure_of(picture).axes[1]
    assert "not measured" in [text.get_text().strip() for text in axes.texts]


def test_same_rows_give_the_same_file(tmp_path):
    (picture,) = memory.pictures(CPU_ROWS)
    (first,) = files.save(picture, tmp_path / "one")
    with mpl.rc_context({"font.size": 20, "svg.fonttype": "path", "svg.hashsalt": "other"}):
        second, image = files.save(picture, tmp_path / "two", png=True)
    assert first.read_bytes() == second.read_bytes()
    assert image.read_bytes().startswith(b"\x89PNG")
    text = first.read_text()
    assert "<dc:date>" not in text
    assert not any(word in text for word in ("/work", "/home", "/tmp"))


def test_file_says_what_it_shows(tmp_path):
    (picture,) = waterfall.pictures(CPU_ROWS)
    (path,) = files.save(picture, tmp_path)
    assert files.data_of(path) == json.loads(json.dumps(picture.data()))
    drawn = {element.text for element in ElementTree.parse(path).iter() if element.text}
    for said in (picture.title, *picture.parts, "fused label map", "B5", "68.3  5.2x"):
        assert said in drawn
    other = tmp_path / "other.svg"
    other.write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    with pytest.raises(ValueError, match="figures in its description"):
        files.data_of(other)


# The command


def test_command(tmp_path, capsys):
    results, out = tmp_path / "rows.jsonl", tmp_path / "pictures"
    forwards = [one for one in row_cases.cpu_rows(("b0",)) if one["kind"] == "forward"]
    rows.append_rows(results, forwards)
    out.mkdir()
    (out / "latency-old.svg").write_text("")
    assert command.main(["--rows", str(results), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    setting = "cpu-float32-512x512"
    assert {path.name for path in out.iterdir()} == {
        f"latency-{setting}-batch1.svg",
        f"roofline-{setting}-batch1.svg",
        "latency-old.svg",
    }
    assert f"{out / 'latency-old.svg'}: old, these rows do not give it" in printed
    assert "memory: skipped, there are no rows of memory" in printed
    assert f"throughput-{setting}: skipped, no variant has several batches" in printed


def test_no_rows_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--rows", str(tmp_path / "none.jsonl")])
    assert "none.jsonl" in capsys.readouterr().err


def test_committed_pictures_are_those_of_the_rows():
    """By their figures: another matplotlib may write other bytes."""
    found, _ = pictures.all_pictures(table.read_files(table.default_files()))
    expected = {picture.name: json.loads(json.dumps(picture.data())) for picture in found}
    kept = {path.stem: files.data_of(path) for path in Path(COMMITTED).glob("*.svg")}
    assert kept == expected, "run: python -m bench.plots"
    assert all(isinstance(picture, Picture) for picture in found)

"""Counts of whole forwards against torch's counter and the paper; shares and waterfalls of rows."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import fastseg
from bench import floors, flops, op_cases, roofline
from bench.forward_counts import count_forward, forward_work
from fastseg.models.segformer.presets import preset_config
from tests.bench import row_cases
from tests.bench.call_cases import counted_flops, recorded, tiny_model

ROOT = Path(__file__).parents[2]
# The table of the paper: where each variant was counted, and its G.
PAPER = {
    "b0": (512, "8.4"),
    "b1": (512, "15.9"),
    "b2": (512, "62.4"),
    "b3": (512, "79.0"),
    "b4": (512, "95.7"),
    "b5": (640, "183.3"),
}
SIZES = [((512, 512), 1), ((517, 389), 2), ((33, 97), 3)]
FIELDS = ("depths", "hidden_sizes", "decoder_hidden_size", "num_labels")
KNOWN = floors.Ceilings(bytes_per_second=1e10, flops_per_second=1e11, source="told by a test")


def preset(variant):
    return preset_config(f"segformer_{variant}", num_classes=150)


def transformers_model(config):
    fields = {name: getattr(config, name) for name in FIELDS}
    settings = transformers.SegformerConfig(**fields, attn_implementation="eager")
    with torch.device("meta"):
        return transformers.SegformerForSemanticSegmentation(settings).eval()


# FLOPs


@pytest.mark.parametrize("variant", PAPER)
def test_published_counts(variant):
    side, expected = PAPER[variant]
    terms = flops.published(preset(variant), (side, side))
    assert f"{flops.total(terms) / 1e9:.1f}" == expected


@pytest.mark.parametrize("variant", ["b0", "b2"])
@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_usual_is_what_torch_counts_in_transformers(variant, size, batch):
    config = preset(variant)
    model = transformers_model(config)
    pixels = torch.empty(batch, 3, *size, device="meta")
    expected = counted_flops(lambda: model(pixels))
    assert 2 * flops.total(flops.usual(config, size, batch)) == expected


@pytest.mark.parametrize("variant", ["b0", "b2"])
@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_folded_is_what_torch_counts_in_fastseg(variant, size, batch):
    config = preset(variant)
    with torch.device("meta"):
        model = fastseg.SegformerForSemanticSegmentation(config).eval()
    pixels = torch.empty(batch, 3, *size, device="meta")
    with torch.no_grad():
        model(pixels)  # folds the weights, which takes products too
    expected = counted_flops(lambda: model(pixels))
    assert 2 * flops.total(flops.folded(config, size, batch)) == expected


@pytest.mark.parametrize(("variant", "expected"), [("b0", 4.09), ("b2", 23.7), ("b5", 72.9)])
def test_the_head_alone_folded(variant, expected):
    """Figures of a study that folded the decode head and left the attention as it was."""
    config = preset(variant)
    usual, folded = (
        [t for t in form(config, (512, 512)) if (t.kind == "decode head") == in_head]
        for form, in_head in ((flops.usual, False), (flops.folded, True))
    )
    assert flops.total([*usual, *folded]) / 1e9 == pytest.approx(expected, abs=0.06)


# Least work


@pytest.mark.parametrize("variant", ["b0", "b2"])
@pytest.mark.parametrize(("size", "batch"), SIZES)
def test_forward_work_has_the_folded_flops(variant, size, batch):
    expected = 2 * flops.total(flops.folded(preset(variant), size, batch))
    assert forward_work(variant, size, batch, torch.bfloat16).sum.flops == expected


def test_forward_work_is_that_of_the_launches_without_the_label_map():
    least = forward_work("b0", (512, 512), 1, torch.bfloat16)
    _, total, _ = count_forward("b0", (512, 512), 1, torch.bfloat16, "sm_90")
    label_map = 2 * 150 * 128 * 128 + 8 * 512 * 512
    assert total == floors.Work(least.sum.bytes + label_map, least.sum.flops)


def test_network_bytes_by_storage(monkeypatch):
    """Of real tensors: weights that calls hold, each storage once, and pixels and logits."""
    size, batch = (64, 96), 2
    model = tiny_model()
    weights, logits = {}, None
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(op_cases, "_Counter", EveryCall)
        calls = recorded(size=size, batch=batch)
    for call in calls:
        for name, value in call.arguments.items():
            for tensor in op_cases.tensors(value):
                if name == "logits":
                    logits = tensor
                elif name not in op_cases.BATCHED and not name.endswith("_sum"):
                    storage = tensor.untyped_storage()
                    weights[storage.data_ptr()] = storage.nbytes()
    pixels = 4 * batch * 3 * size[0] * size[1]
    expected = sum(weights.values()) + pixels + logits.untyped_storage().nbytes()
    monkeypatch.setattr("fastseg.from_preset", lambda name, **kwargs: type(model)(model.config))
    found = forward_work.__wrapped__("b0", size, batch, torch.float32)
    assert found.network_bytes == expected


class EveryCall:
    """Calls one by one, where op_cases counts those that are alike."""

    def __init__(self):
        self.calls = {}

    def note(self, call):
        self.calls[len(self.calls)] = call


def test_bytes_go_with_the_dtype_and_with_classes():
    wide = forward_work("b0", (64, 64), 2, torch.float32)
    half = forward_work("b0", (64, 64), 2, torch.float16)
    assert wide.network_bytes == 2 * half.network_bytes
    more = forward_work("b0", (64, 64), 2, torch.float16, classes=151)
    # A row of the classifier and its bias, and a plane of logits an image.
    assert more.network_bytes - half.network_bytes == 2 * (256 + 1 + 2 * 16 * 16)


def test_forward_floor_sums_the_ops():
    work, floor_ms = roofline.forward_floor("b0", (128, 96), 2, "float32", KNOWN)
    by_bytes, by_flops = work.bytes / 1e10, work.flops / 1e11
    assert max(by_bytes, by_flops) <= floor_ms / 1e3 <= by_bytes + by_flops
    # Without an end of FLOPs the bytes are left, and the other way round.
    no_flops = floors.Ceilings(1e10, math.inf, "")
    no_bytes = floors.Ceilings(math.inf, 1e11, "")
    for ceilings, expected in ((no_flops, by_bytes), (no_bytes, by_flops)):
        _, floor_ms = roofline.forward_floor("b0", (128, 96), 2, "float32", ceilings)
        assert floor_ms == pytest.approx(1e3 * expected)


def test_floors_need_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; torch.set_grad_enabled(False)\n"
        "from bench import floors, roofline\n"
        "known = floors.Ceilings(1e10, 1e11, '')\n"
        "with torch.inference_mode():\n"
        "    print(roofline.forward_floor('b0', (64, 96), 2, 'bfloat16', known)[0].flops)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120, capture_output=True
    )
    expected = 2 * flops.total(flops.folded(preset("b0"), (64, 96), 2))
    assert int(done.stdout) == expected


def test_labels_floor_is_of_logits_and_labels():
    work, floor_ms = roofline.labels_floor(19, (64, 96), KNOWN)
    logits, labels = torch.empty(1, 19, 16, 24), torch.empty(1, 64, 96, dtype=torch.int64)
    assert work == floors.Work(logits.nbytes + labels.nbytes, 0)
    assert floor_ms == pytest.approx(1e3 * work.bytes / KNOWN.bytes_per_second)


# Rows


def ended(forwards, posts, **changes):
    """Parts of the way from an image, of the medians given by provider; and forwards alone."""
    rows = [row_cases.row(300.0, name, **changes) for name in forwards]
    for name, post in posts.items():
        parts = {"whole": 500.0, "pre": 7.0, "post": post}
        if name in forwards:
            parts["forward"] = forwards[name]
        rows += [
            row_cases.row(ms, name, kind="end to end", part=part, **changes)
            for part, ms in parts.items()
        ]
    return rows


ALL = {
    "transformers eager": 100.0,
    "transformers compiled": 80.0,
    "fastseg eager": 60.0,
    "fastseg Triton": 30.0,
    "fastseg CUDA graph": 10.0,
}
POSTS = {**dict.fromkeys(ALL, 2.0), "transformers eager": 20.0, "transformers compiled": 19.0}


def steps_of(rows, **changes):
    given = {"size": (512, 512), "batch": 1, "dtype": "float32", "device": row_cases.CPU}
    return roofline.waterfall(rows, "b0", **{**given, **changes})


def test_waterfall_changes_one_thing_a_step():
    steps = steps_of(ended(ALL, POSTS))
    assert steps == [
        ("transformers eager", 100.0, 20.0),
        ("transformers compiled", 80.0, 19.0),
        ("fastseg eager", 60.0, 20.0),
        ("fastseg Triton", 30.0, 20.0),
        ("fastseg CUDA graph", 10.0, 20.0),
        ("fused label map", 10.0, 2.0),
    ]
    assert roofline.missing(steps) == []
    assert steps[0].ms == 120.0


@pytest.mark.parametrize("count", range(len(ALL) + 1))
def test_steps_without_rows_are_named(count):
    for names in itertools.combinations(ALL, count):
        steps = steps_of(ended({name: ALL[name] for name in names}, POSTS))
        present = {step.name for step in steps}
        ours = [name for name in names if name.startswith("fastseg")]
        assert present - {"fused label map"} == set(names)
        assert ("fused label map" in present) == bool(ours)
        if ours:
            assert steps[-1].forward_ms == ALL[ours[-1]]
        assert roofline.missing(steps) == [n for n in roofline.STEPS if n not in present]


def test_nothing_without_label_maps():
    assert steps_of(ended(ALL, {})) == []
    assert roofline.missing([]) == list(roofline.STEPS)


def test_waterfall_is_of_one_setting_and_its_newest_run():
    wrong = dict.fromkeys(ALL, 1.0)
    others = [
        {"case": "b1"},
        {"size": [512, 640]},
        {"batch": 2},
        {"dtype": "bfloat16"},
        {"device": "another"},
        {"cache": "cold"},
        {"threads": 1, "date": "2025-01-01T00:00:00+00:00"},
    ]
    rows = ended(wrong, wrong, date="2025-01-01T00:00:00+00:00")
    rows += ended(ALL, POSTS)
    for changes in others:
        rows += ended(wrong, wrong, **changes)
    assert steps_of(rows) == steps_of(ended(ALL, POSTS))
    assert steps_of(rows, threads=1)[0].forward_ms == 1.0
    assert steps_of(rows, cache="cold")[0].forward_ms == 1.0


def test_shares():
    rows = row_cases.cpu_rows(("b0", "b2"))
    forward = next(row for row in rows if row["provider"] == "fastseg eager")
    assert roofline.share(forward) == pytest.approx(4.2 / 9)
    assert roofline.share(row_cases.row(1.0)) is None
    text = roofline.markdown(rows)
    assert "| B0 | fastseg eager | 63.3 | 29.6 | 47% |" in text
    assert "| B2 | transformers eager | 1.41e+03 | 156 | 11% |" in text
    # Its floor would be that of another dtype.
    assert "| B0 | OpenVINO default | 57.8 | - | - |" in text
    assert "Measured ceilings: 19 GB/s, 210 GFLOP/s." in text
    assert "No rows of: fastseg Triton, fastseg CUDA graph." in text


def test_rows_without_floors_are_counted():
    text = roofline.markdown([row_cases.row(1.0), row_cases.row(2.0, "fastseg eager")])
    assert "2 rows without a floor" in text
    assert roofline.markdown([]) == "No rows of forwards."


def test_known_chips_stand_beside_measured_ceilings():
    floor = {"flops": 1, "bytes": 1, "flops_per_second": 1.0, "bytes_per_second": 1.0}
    row = row_cases.row(1.0, device=row_cases.GPU, floor_ms=0.5, **floor)
    assert "To compare: an H200: 4.3 TB/s, 790 TFLOP/s." in roofline.markdown([row])


def test_command(capsys):
    roofline.main([])
    output = capsys.readouterr().out
    assert output.startswith("## ")
    with pytest.raises(SystemExit, match="2"):
        roofline.main(["no-such-file.jsonl"])
    assert "FILE: expected rows" in capsys.readouterr().err

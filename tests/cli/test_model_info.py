"""`fastseg info MODEL`, against torch's counter of a real forward and against closed formulas."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastseg
from fastseg.cli import main
from fastseg.cli.options import EMBEDDED_MODEL
from tests.cli.cli_cases import save_model
from tests.model_cases import TINY

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def info_of(capsys, *arguments):
    assert main(["info", *map(str, arguments), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


def by_formula(config, height, width):
    """Multiply-adds of matrix products and convolutions by stage, of the model's published form."""
    counts, channels, grids = {}, config.num_channels, []
    for stage, size in enumerate(config.hidden_sizes):
        patch, stride = config.patch_sizes[stage], config.strides[stage]
        height, width = (
            (side + 2 * (patch // 2) - patch) // stride + 1 for side in (height, width)
        )
        tokens, ratio = height * width, config.sr_ratios[stage]
        keys = (height // ratio) * (width // ratio)
        hidden = int(size * config.mlp_ratios[stage])
        attention = 2 * tokens * size**2 + 2 * keys * size**2  # query, output, key, value
        attention += 2 * tokens * keys * size  # scores, and values by probability
        attention += keys * ratio**2 * size**2 if ratio > 1 else 0
        ffn = 2 * tokens * size * hidden + 9 * tokens * hidden
        embed = tokens * patch**2 * channels * size
        counts[f"stage {stage + 1}"] = embed + config.depths[stage] * (attention + ffn)
        grids.append(tokens)
        channels = size
    width = config.decoder_hidden_size
    head = sum(n * size * width for n, size in zip(grids, config.hidden_sizes, strict=True))
    head += grids[0] * len(grids) * width**2 + grids[0] * width * config.num_labels
    counts["decode_head"] = head
    return {**counts, "total": sum(counts.values())}


@pytest.mark.parametrize("size", [(64, 64), (75, 131)])
def test_multiply_adds(model_folder, capsys, size):
    found = info_of(capsys, model_folder, "--size", *size)["multiply_adds"]
    model = fastseg.from_pretrained(model_folder)
    assert found == by_formula(model.config, *size)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), fastseg.plain_path(), counter:
        model(torch.randn(1, 3, *size))
    assert 2 * found["total"] == counter.get_total_flops()


def test_published_multiply_adds(tmp_path, capsys):
    """8.4 G of B0 with 150 classes at 512x512: the paper's table 1."""
    fastseg.from_preset("segformer_b0").save_pretrained(tmp_path)
    info = info_of(capsys, tmp_path)
    assert info["size"] == [512, 512]
    assert info["multiply_adds"]["total"] / 1e9 == pytest.approx(8.4, abs=0.1)
    assert info["parameters"] / 1e6 == pytest.approx(3.8, abs=0.1)


def test_the_embedded_model(capsys):
    assert main(["info", str(EMBEDDED_MODEL), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    model = fastseg.from_pretrained(EMBEDDED_MODEL)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{parameters:,} parameters, " in printed
    for name in model.config.id2label.values():
        assert name in printed
    with torch.no_grad():
        for line in fastseg.report(model).splitlines():
            assert f"  {line}\n" in f"{printed}\n"
    assert "stage 4" in printed
    assert "decode_head" in printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_and_memory(tmp_path, capsys, dtype):
    folder = save_model(tmp_path / "model")
    processor_file = (folder / "preprocessor_config.json").read_text()
    model = fastseg.from_pretrained(folder)
    model.to(dtype).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(processor_file)
    info = info_of(capsys, folder)
    name = str(dtype).removeprefix("torch.")
    assert (info["stored_dtype"], info["dtype"]) == (name, "float32")  # as it runs on a CPU
    tensors = model.float().state_dict().values()
    assert info["weight_bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    assert info["size"] == [64, 64]  # the processor's
    assert (info["num_labels"], len(info["id2label"])) == (6, 6)
    assert main(["info", str(folder)]) == 0
    assert (f"(stored in {name})" in capsys.readouterr().out) == (dtype == torch.float16)


def test_a_single_file(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    path.write_bytes((EMBEDDED_MODEL / "model.safetensors").read_bytes())
    info = info_of(capsys, path, "--size", "64", "64")
    expected = info_of(capsys, EMBEDDED_MODEL, "--size", "64", "64")
    assert info["parameters"] == expected["parameters"]
    assert info["multiply_adds"] == expected["multiply_adds"]


@pytest.mark.parametrize("kind", ["SegformerForImageClassification", "SegformerModel"])
def test_models_that_do_not_segment(kind, tmp_path, capsys):
    config = fastseg.SegformerConfig(**TINY)
    model = getattr(fastseg, kind)(config).eval()
    model.save_pretrained(tmp_path)
    info = info_of(capsys, tmp_path, "--size", "64", "96")
    expected = by_formula(config, 64, 96)
    stages = [f"stage {number}" for number in (1, 2, 3, 4)]
    head = {"classifier": 64 * 5} if kind.endswith("Classification") else {}
    counts = {**{stage: expected[stage] for stage in stages}, **head}
    assert info["multiply_adds"] == {**counts, "total": sum(counts.values())}
    assert info["class"] == kind
    assert info["num_labels"] == (5 if head else None)
    assert main(["info", str(tmp_path), "--size", "64", "96"]) == 0
    assert ("classes" in capsys.readouterr().out) == bool(head)


def test_a_hub_id_is_downloaded_once(model_folder, tmp_path, monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repo_id, filename, **where):
        assert repo_id == "someone/scenes"
        asked.append(filename)
        if not (model_folder / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(model_folder / filename)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = info_of(capsys, "someone/scenes", "--size", "64", "64")
    expected = info_of(capsys, model_folder, "--size", "64", "64")
    assert {**found, "model": str(model_folder)} == expected
    assert asked.count("model.safetensors") == 1
    assert asked.count("config.json") == 1
    assert asked.count("preprocessor_config.json") == 1


def test_differences_are_told(model_folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    state = dict(fastseg.from_pretrained(model_folder).state_dict())
    state = {name: tensor for name, tensor in state.items() if not name.startswith("decode_head")}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert main(["info", str(tmp_path), "--size", "64", "64"]) == 0
    printed = capsys.readouterr().out
    assert "loaded with differences:" in printed
    assert "decode_head.classifier.weight" in printed


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--size", "64", "64"], 2, "--size: expected a MODEL too"),
        (["--device", "cpu"], 2, "--device: expected a MODEL too"),
        (["MODEL", "--size", "8", "8"], 2, "--size 8 8: pixel_values: expected an input"),
        (["MODEL", "--size", "64"], 2, "--size"),
        (["./nowhere"], 1, "error: MODEL: ./nowhere: there is no such file or folder"),
    ],
)
def test_wrong_usage(model_folder, tmp_path, monkeypatch, capsys, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(model_folder) if one == "MODEL" else one for one in arguments]
    assert main(["info", *arguments]) == status
    assert message in capsys.readouterr().err

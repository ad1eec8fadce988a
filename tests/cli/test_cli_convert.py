"""`fastseg convert`: what it writes, what it refuses to overwrite, and how it checks itself."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastseg
from fastseg.cli import main
from tests.checkpoints.checkpoint_cases import SIZES, assert_same_tensors, randomize
from tests.cli.cli_cases import photo, save_model, tree
from tests.model_cases import relative_error
from tests.models.hosts import mmseg

FIXTURES = Path(__file__).parents[1] / "fixtures"
NVLABS_EPS = {"block_norm_eps": 1e-6, "stage_norm_eps": 1e-6}
EPS_NOTE = "config.json keeps the source's epsilons"


def nvlabs_file(path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model of fastseg's under the names of NVlabs."""
    config = fastseg.SegformerConfig(**SIZES, **NVLABS_EPS)
    model = randomize(fastseg.SegformerForSemanticSegmentation(config)).to(dtype)
    state = {}
    table = [
        ("attention.self.query", "attn.q"),
        ("attention.self.sr", "attn.sr"),
        ("attention.self.layer_norm", "attn.norm"),
        ("attention.output.dense", "attn.proj"),
        ("layer_norm_", "norm"),
        ("dense", "fc"),
        ("layer_norm", "norm"),
        ("decode_head.linear_fuse", "decode_head.linear_fuse.conv"),
        ("decode_head.batch_norm", "decode_head.linear_fuse.bn"),
        ("decode_head.classifier", "decode_head.linear_pred"),
    ]
    weights = model.state_dict()
    for name, tensor in weights.items():
        if ".value." in name:
            continue
        if ".key." in name:
            tensor = torch.cat([tensor, weights[name.replace(".key.", ".value.")]])
            name = name.replace("attention.self.key", "attn.kv")
        for ours, theirs in table:
            name = name.replace(ours, theirs)
        parts = name.split(".")
        if name.startswith("segformer.encoder."):
            part = {"patch_embeddings": "patch_embed"}.get(parts[2], parts[2])
            parts = ["backbone", f"{part}{int(parts[3]) + 1}", *parts[4:]]
        elif parts[1] == "linear_c":
            parts = ["decode_head", f"linear_c{int(parts[2]) + 1}", *parts[3:]]
        state[".".join(parts)] = tensor
    meta = {"CLASSES": ("sky", "road", "car", "tree", "person"), "mmseg_version": "0.11"}
    torch.save({"state_dict": state, "meta": meta}, path)
    return path


HEADS = ["--heads", "1", "2", "3", "4"]


def test_nvlabs_file(tmp_path, capsys):
    source = nvlabs_file(tmp_path / "segformer.pth")
    out = tmp_path / "new" / "out"
    assert main(["convert", str(source), str(out), *HEADS]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: SegformerForSemanticSegmentation, ")
    assert "5 classes, float32" in captured.out
    assert EPS_NOTE in captured.err
    assert "no options of an image processor" in captured.err
    assert tree(out) == {"config.json", "model.safetensors"}
    fields = json.loads((out / "config.json").read_text())
    assert NVLABS_EPS.items() <= fields.items()
    assert fields["id2label"]["3"] == "tree"
    assert "LABEL_0" not in captured.err
    direct = fastseg.from_pretrained(source, num_attention_heads=[1, 2, 3, 4])
    converted = fastseg.from_pretrained(out)
    assert converted.config.block_norm_eps == 1e-6
    assert_same_tensors(dict(converted.state_dict()), dict(direct.state_dict()))

    theirs, info = transformers.SegformerForSemanticSegmentation.from_pretrained(
        out, output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.id2label[3] == "tree"
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        error = relative_error(theirs.eval()(pixels).logits, converted(pixels).logits)
    assert 0 < error < 1e-2  # its epsilons are others


@pytest.mark.parametrize(
    ("arguments", "stored", "expected"),
    [
        ([], torch.float16, torch.float16),
        (["--dtype", "bfloat16"], torch.float32, torch.bfloat16),
    ],
)
def test_dtype(arguments, stored, expected, tmp_path, capsys):
    source = nvlabs_file(tmp_path / "it.pth", stored)
    assert main(["convert", str(source), str(tmp_path / "out"), *HEADS, *arguments]) == 0
    assert str(expected).removeprefix("torch.") in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {expected, torch.int64}


def test_heads_are_asked_for(tmp_path, capsys):
    source = nvlabs_file(tmp_path / "it.pth")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert str(source) in error
    assert "pass --heads" in error
    assert not (tmp_path / "out").exists()


def test_mmseg_gives_the_encoder_alone(tmp_path, capsys):
    network = mmseg.EncoderDecoder(
        mmseg.MixVisionTransformer(32, (1, 1, 1, 1)), mmseg.SegformerHead([32, 64, 160, 256])
    )
    torch.save({"state_dict": randomize(network).state_dict()}, tmp_path / "it.pth")
    command = ["convert", str(tmp_path / "it.pth"), str(tmp_path / "out")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "fastseg.accelerate" in error
    assert not (tmp_path / "out").exists()
    assert main([*command, "--encoder"]) == 0
    captured = capsys.readouterr()
    assert "SegformerModel" in captured.out
    assert "decode_head.convs.0.conv.weight" in captured.err  # what was left out
    assert fastseg.from_pretrained(tmp_path / "out").config.patch_norm_eps == 1e-6


def test_image_processor_comes_along(tmp_path, capsys):
    source = save_model(tmp_path / "model")
    (source / "preprocessor_config.json").unlink()
    processor = fastseg.SegformerImageProcessor(size=(64, 96), image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(source)
    for number, place in enumerate([source, source / "model.safetensors"]):
        out = tmp_path / f"out{number}"
        assert main(["convert", str(place), str(out)]) == 0
        assert EPS_NOTE not in capsys.readouterr().err
        found = fastseg.SegformerImageProcessor.from_pretrained(out)
        assert found.size == {"height": 64, "width": 96}
        assert found.image_mean == [0.1, 0.2, 0.3]


def test_predict_takes_a_file(tmp_path, capsys):
    """With the image processor beside it, or with the default one where it stands alone."""
    source = save_model(tmp_path / "model")
    photo("coffee").save(tmp_path / "coffee.png")
    command = ["predict", str(tmp_path / "coffee.png"), "--output", str(tmp_path / "maps")]
    assert main([*command, "--model", str(source / "model.safetensors")]) == 0
    assert "default image processor" not in capsys.readouterr().err
    network = fastseg.SegformerForSemanticSegmentation(
        fastseg.SegformerConfig(depths=[1, 1, 1, 1], num_labels=3)
    )
    torch.save(network.state_dict(), tmp_path / "alone.pth")
    assert main([*command, "--model", str(tmp_path / "alone.pth")]) == 0
    assert "default image processor" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["segmenter", "segmenter.keras"])
def test_keras(source, tmp_path, capsys):
    with tarfile.open(FIXTURES / "keras_hub.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    with zipfile.ZipFile(tmp_path / "segmenter.keras", "w") as archive:
        archive.writestr("config.json", (tmp_path / "segmenter" / "task.json").read_bytes())
        archive.writestr("model.weights.h5", (tmp_path / "segmenter.weights.h5").read_bytes())
    out = tmp_path / "out"
    assert main(["convert", str(tmp_path / source), str(out)]) == 0
    assert tree(out) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert fastseg.from_pretrained(out).config.hidden_act == "gelu_pytorch_tanh"
    processor = fastseg.SegformerImageProcessor.from_pretrained(out)
    assert processor.size == {"height": 64, "width": 64}
    image = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    found = processor(image, return_tensors="pt").pixel_values[0].permute(1, 2, 0)
    # What the preset's converter computes: scale * pixels + offset.
    converter = json.loads((tmp_path / "segmenter" / "image_converter.json").read_text())["config"]
    expected = torch.tensor(image) * torch.tensor(converter["scale"])
    assert torch.allclose(found, expected + torch.tensor(converter["offset"]), atol=1e-5)


def test_what_is_there_is_kept(tmp_path, capsys):
    source = nvlabs_file(tmp_path / "it.pth")
    out = save_model(tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    before = {name: (out / name).read_bytes() for name in tree(out)}
    command = ["convert", str(source), str(out), *HEADS]
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in tree(out)} == before
    assert main([*command, "--force"]) == 0
    # The earlier model's image processor goes with it.
    assert tree(out) == {"config.json", "model.safetensors", "notes.txt"}
    assert fastseg.from_pretrained(out).config.num_labels == 5


def test_over_its_own_source(tmp_path):
    source = save_model(tmp_path / "model")
    before = load_file(source / "model.safetensors")
    assert main(["convert", str(source), str(source), "--force", "--dtype", "float16"]) == 0
    assert (source / "preprocessor_config.json").exists()
    expected = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in before.items()
    }
    assert_same_tensors(load_file(source / "model.safetensors"), expected)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file or folder"),
        (b"nothing", "a text that begins with 'nothing'"),
        (b"\x80\x02nothing", "corrupt"),
        (b"", "an empty file"),
    ],
)
def test_sources_that_cannot_be_read(content, told, tmp_path, capsys):
    source = tmp_path / "a b.pth"
    if content is not None:
        source.write_bytes(content)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert str(source) in error
    assert told in error
    assert not (tmp_path / "out").exists()


def test_a_source_without_all_weights(tmp_path, capsys):
    config = fastseg.SegformerConfig(**SIZES)
    fastseg.SegformerModel(config).save_pretrained(tmp_path / "in")
    fields = json.loads((tmp_path / "in" / "config.json").read_text())
    fields["architectures"] = ["SegformerForSemanticSegmentation"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(fields))
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "weights are missing" in error
    assert "decode_head.classifier.weight" in error
    assert not (tmp_path / "out").exists()


def test_classes_without_names_are_told(tmp_path, capsys):
    source = nvlabs_file(tmp_path / "it.pth")
    content = torch.load(source)
    torch.save(content["state_dict"], source)
    assert main(["convert", str(source), str(tmp_path / "out"), *HEADS]) == 0
    assert "IN has no names of classes, so they are called LABEL_0" in capsys.readouterr().err


def test_output_is_a_file(tmp_path, capsys):
    source = nvlabs_file(tmp_path / "it.pth")
    assert main(["convert", str(source), str(source), *HEADS]) == 2
    assert "expected a folder, found a file" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["convert", str(source), str(tmp_path / "file" / "out"), *HEADS]) == 1
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err


@pytest.mark.parametrize("changed", ["model.safetensors", "config.json"])
def test_what_was_written_is_compared(changed, tmp_path, monkeypatch, capsys):
    source = nvlabs_file(tmp_path / "it.pth")
    save = fastseg.SegformerForSemanticSegmentation.save_pretrained

    def spoilt(model, folder):
        save(model, folder)
        path = Path(folder) / changed
        if changed == "config.json":
            fields = json.loads(path.read_text())
            path.write_text(json.dumps({**fields, "stage_norm_eps": 1e-5}))
        else:
            tensors = load_file(path)
            tensors["decode_head.classifier.bias"][0] += 1
            save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr(fastseg.SegformerForSemanticSegmentation, "save_pretrained", spoilt)
    assert main(["convert", str(source), str(tmp_path / "out"), *HEADS]) == 1
    error = capsys.readouterr().err
    assert "reads back otherwise" in error
    part = "stage_norm_eps" if changed == "config.json" else "decode_head.classifier.bias"
    assert error.strip().endswith(part)

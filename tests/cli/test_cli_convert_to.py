"""`fastseg convert --to` another library, and the options that choose what of IN is taken."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers

import fastseg
from fastseg.cli import main
from tests.checkpoints.checkpoint_cases import SIZES, assert_same_tensors, ours
from tests.checkpoints.test_strict import counted
from tests.cli.cli_cases import save_model, tree
from tests.model_cases import TINY, randomize, relative_error
from tests.models.hosts import mmseg, nvlabs

HEADS = ["--heads", "1", "2", "5", "8"]
SIZED = {name: value for name, value in TINY.items() if name != "num_labels"}
NAMES = ("sky", "road", "car", "tree", "person")
NVLABS_EPS = {"block_norm_eps": 1e-6, "stage_norm_eps": 1e-6}

# Makes a random model of smp in the folder argv[1], its state dict and its results in float64.
SAVE_SMP = """
import sys, pathlib, torch
import segmentation_models_pytorch as smp
folder = pathlib.Path(sys.argv[1])
torch.manual_seed(7)
model = smp.Segformer(
    "mit_b0", encoder_weights=None, classes=6, in_channels=4, decoder_segmentation_channels=48
)
for name, tensor in model.state_dict().items():
    if name.endswith("running_var"):
        tensor.uniform_(0.5, 1.5)
    elif tensor.is_floating_point() and tensor.ndim == 1:
        tensor.normal_(mean=float(name.endswith("weight")), std=0.3)
model.save_pretrained(folder / "saved")
torch.save(model.state_dict(), folder / "smp.pth")
"""
# Loads the folder argv[1] with smp, and writes its arguments, tensors and results to argv[3].
LOAD_SMP = """
import sys, torch
import segmentation_models_pytorch as smp
model = smp.from_pretrained(sys.argv[1]).eval()
tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
model.double()
model.segmentation_head[1] = torch.nn.Identity()  # the upsampling
with torch.no_grad():
    logits = model(torch.load(sys.argv[2]))
torch.save({"class": type(model).__name__, "tensors": tensors, "logits": logits}, sys.argv[3])
"""
LOAD_SMP_ENCODER = """
import sys, torch
import segmentation_models_pytorch as smp
encoder = smp.encoders.get_encoder("mit_b0", weights=None).eval()
print(encoder.load_state_dict(torch.load(sys.argv[1])))
with torch.no_grad():
    torch.save(encoder.double()(torch.load(sys.argv[2]))[-1], sys.argv[3])
"""


def convert(*arguments) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def run_loader(run_smp, tmp_path):
    """Runs smp on what was written, with `pixels`; gives what it saved."""

    def run(code, written, pixels):
        torch.save(pixels, tmp_path / "pixels.pt")
        told = run_smp(code, written, tmp_path / "pixels.pt", tmp_path / "result.pt")
        return told, torch.load(tmp_path / "result.pt")

    return run


@pytest.mark.slow
def test_smp_there_and_back(run_smp, run_loader, tmp_path, capsys):
    """The real library's model, converted and converted back, loads there as it was."""
    run_smp(SAVE_SMP, tmp_path)
    assert convert(tmp_path / "smp.pth", tmp_path / "ours") == 0
    capsys.readouterr()
    assert convert(tmp_path / "ours", tmp_path / "back", "--to", "smp") == 0
    captured = capsys.readouterr()
    assert "for segmentation_models_pytorch" in captured.out
    assert "computes with" not in captured.err  # the epsilons are smp's already
    assert tree(tmp_path / "back") == {"config.json", "model.safetensors"}
    given, written = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("saved", "back")
    )
    assert written == given
    pixels = torch.randn(1, 4, 64, 96, dtype=torch.float64)
    _, found = run_loader(LOAD_SMP, tmp_path / "back", pixels)
    assert found["class"] == "Segformer"
    assert_same_tensors(found["tensors"], dict(torch.load(tmp_path / "smp.pth")))
    model = fastseg.from_pretrained(tmp_path / "ours").double()
    with torch.no_grad():
        assert relative_error(model(pixels).logits, found["logits"]) <= 1e-12
    assert_same_tensors(
        dict(fastseg.from_pretrained(tmp_path / "back").state_dict()),
        dict(fastseg.from_pretrained(tmp_path / "ours").state_dict()),
    )


@pytest.fixture(scope="module")
def of_transformers(tmp_path_factory):
    """A B0 that transformers wrote, with its epsilons, and names of classes."""
    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(5)
    config = transformers.SegformerConfig(id2label=dict(enumerate(NAMES)), decoder_hidden_size=32)
    model = transformers.SegformerForSemanticSegmentation(config)
    randomize(model)
    model.save_pretrained(folder / "model")
    fastseg.SegformerImageProcessor(size=64).save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.slow
def test_smp_computes_as_much_otherwise_as_is_said(of_transformers, run_loader, tmp_path, capsys):
    assert convert(of_transformers, tmp_path / "out", "--to", "smp") == 0
    told = capsys.readouterr().err
    assert "block_norm_eps=1e-06 (not 1e-05), stage_norm_eps=1e-06 (not 1e-05)" in told
    assert "names of classes have no place" in told
    assert "image processor have no place" in told
    assert "'height': 64" in told
    worth = float(re.search(r"differ by (\S+) of their size", told)[1])
    assert 0 < worth < 2e-5 * 5
    pixels = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    _, found = run_loader(LOAD_SMP, tmp_path / "out", pixels)
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(of_transformers)
    with torch.no_grad():
        error = relative_error(found["logits"], theirs.eval().double()(pixels).logits)
    assert worth / 3 < error < worth * 3
    # With smp's epsilons fastseg's model is the same to rounding.
    model = fastseg.from_pretrained(of_transformers, **NVLABS_EPS).double()
    with torch.no_grad():
        assert relative_error(model(pixels).logits, found["logits"]) <= 1e-12


@pytest.mark.slow
def test_an_encoder_for_smp_is_a_file(of_transformers, run_loader, tmp_path):
    out = tmp_path / "encoder.pth"
    assert convert(of_transformers, out, "--to", "smp", "--encoder") == 0
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    told, found = run_loader(LOAD_SMP_ENCODER, out, pixels)
    assert "All keys matched" in told
    with pytest.warns(fastseg.CheckpointWarning, match="not used"):
        model = fastseg.SegformerModel.from_pretrained(of_transformers, **NVLABS_EPS)
    with torch.no_grad():
        assert relative_error(model.double()(pixels)[0], found) <= 1e-12


def test_nvlabs_there_and_back(tmp_path, capsys):
    backbone = nvlabs.MixVisionTransformer()
    network = nvlabs.EncoderDecoder(backbone, nvlabs.SegFormerHead())
    randomize(network)
    meta = {"CLASSES": NAMES}
    torch.save({"state_dict": network.state_dict(), "meta": meta}, tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "ours", *HEADS) == 0
    out = tmp_path / "new" / "out.pth"
    assert convert(tmp_path / "ours", out, "--to", "nvlabs") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].endswith("5 classes, float32, for NVlabs")
    assert "names of classes" not in captured.err
    assert tree(out.parent) == {"out.pth"}
    content = torch.load(out, weights_only=True)
    # What the authors' tools/test.py takes from a file.
    assert content["meta"] == {"CLASSES": NAMES, "PALETTE": None}
    expected = network.state_dict()
    for leaf in ("weight", "bias"):  # never called; a file of ours has none
        expected[f"decode_head.conv_seg.{leaf}"] = torch.zeros_like(
            expected[f"decode_head.conv_seg.{leaf}"]
        )
    assert_same_tensors(content["state_dict"], dict(expected))


def test_mmseg_there_and_back(tmp_path, capsys):
    network = mmseg.MixVisionTransformer()
    randomize(network)
    torch.save(network.state_dict(), tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "ours", *HEADS) == 0
    capsys.readouterr()
    assert convert(tmp_path / "ours", tmp_path / "out.pth", "--to", "mmseg") == 0
    assert "computes with" not in capsys.readouterr().err
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert_same_tensors(found, dict(network.state_dict()))


def test_a_segmentation_model_is_none_of_mmsegs(tmp_path, capsys):
    source, out = save_segmenter(tmp_path / "in"), tmp_path / "out.pth"
    assert convert(source, out, "--to", "mmseg") == 1
    error = capsys.readouterr().err
    for part in ("--to mmseg: ", "another network", "ReLU", "fastseg convert --encoder"):
        assert part in error
    assert not out.exists()
    assert convert(source, out, "--to", "mmseg", "--encoder") == 0
    told = capsys.readouterr().err
    assert "mmseg computes with block_norm_eps=1e-06 (not 1e-05), " in told
    assert "patch_norm_eps=1e-06 (not 1e-05)" in told
    network = mmseg.MixVisionTransformer()
    network.load_state_dict(torch.load(out), strict=True)
    model = fastseg.from_pretrained(source)
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = network.double().eval()(pixels)[-1]
        error = relative_error(model.double().segformer(pixels)[0], expected)
    worth = float(re.search(r"differ by (\S+) of their size", told)[1])
    assert worth / 5 < error < worth * 5


def save_segmenter(folder, **config):
    model = ours("SegformerForSemanticSegmentation", **{**SIZED, **config})
    randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["file", "folder"])
def test_what_is_there_is_kept(target, of_transformers, tmp_path, capsys):
    source = save_segmenter(tmp_path / "in") if target == "file" else of_transformers
    out = tmp_path / "out.pth"
    if target == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    command = [source, out, "--to", "nvlabs" if target == "file" else "smp"]
    assert convert(*command) == 2
    assert "--force" in capsys.readouterr().err
    assert (out if target == "file" else out / "notes.txt").read_text() == "mine"
    assert convert(*command, "--force") == 0
    if target == "file":
        assert torch.load(out).keys() == {"meta", "state_dict"}
        assert tree(tmp_path) == {"out.pth", "in/config.json", "in/model.safetensors"}
    else:
        assert tree(out) == {"notes.txt", "config.json", "model.safetensors"}
    other = tmp_path / "other"
    other.mkdir() if target == "file" else other.touch()
    assert convert(source, other, *command[2:], "--force") == 2
    expected = "a file, found a folder" if target == "file" else "a folder, found a file"
    assert f"expected {expected}" in capsys.readouterr().err


def test_dtype_and_a_place_that_cannot_be_written(tmp_path, capsys):
    source, out = save_segmenter(tmp_path / "in"), tmp_path / "out.pth"
    assert convert(source, out, "--to", "nvlabs", "--dtype", "float16") == 0
    tensors = torch.load(out)["state_dict"].values()
    assert {tensor.dtype for tensor in tensors} == {torch.float16, torch.int64}
    assert convert(source, out / "below.pth", "--to", "nvlabs") == 1
    assert f"{out} is a file" in capsys.readouterr().err


def test_what_was_written_is_compared(tmp_path, monkeypatch, capsys):
    from fastseg.cli import convert as command

    def spoilt(model, layout, path):
        content = layout.content(model, layout.tensors(model.state_dict()))
        content["state_dict"]["decode_head.linear_pred.bias"][0] += 1
        torch.save(content, path)

    source = save_segmenter(tmp_path / "in")
    # The model itself, which shares that memory, must not change.
    monkeypatch.setattr(command, "save_for", lambda model, *rest: spoilt(_copy(model), *rest))
    assert convert(source, tmp_path / "out.pth", "--to", "nvlabs") == 1
    error = capsys.readouterr().err
    assert "reads back otherwise" in error
    assert error.strip().endswith("decode_head.classifier.bias")


def _copy(model):
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def test_epsilons_of_transformers_have_a_worth_too(tmp_path, capsys):
    source = save_segmenter(tmp_path / "in", **NVLABS_EPS)
    assert convert(source, tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "config.json keeps the source's epsilons" in told
    worth = float(re.search(r"differ by (\S+) of their size", told)[1])
    model = fastseg.from_pretrained(source).double()
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "out")
    pixels = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        error = relative_error(theirs.eval().double()(pixels).logits, model(pixels).logits)
    assert worth / 5 < error < worth * 5


def test_the_average_of_the_weights(tmp_path):
    own, average = (ours("SegformerForSemanticSegmentation") for _ in range(2))
    content = {"model": own.state_dict(), "model_ema": average.state_dict()}
    torch.save(content, tmp_path / "it.pth")
    heads = ["--heads", "1", "2", "3", "4"]
    assert convert(tmp_path / "it.pth", tmp_path / "out", "--weights", "ema", *heads) == 0
    found = fastseg.from_pretrained(tmp_path / "out").state_dict()
    assert_same_tensors(found, dict(average.state_dict()))


def test_counters_of_a_profiler(tmp_path, capsys):
    model = ours("SegformerForSemanticSegmentation")
    torch.save(counted(model), tmp_path / "it.pth")
    command = [tmp_path / "it.pth", tmp_path / "out", "--heads", "1", "2", "3", "4"]
    assert convert(*command) == 1
    assert "(--no-strict leaves them out)" in capsys.readouterr().err
    assert convert(*command, "--no-strict") == 0
    assert "decode_head.classifier.total_ops" in capsys.readouterr().err
    found = fastseg.from_pretrained(tmp_path / "out").state_dict()
    assert_same_tensors(found, dict(model.state_dict()))


def test_a_folder_and_a_variant_of_the_source(tmp_path):
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**SIZES))
    model.half().save_pretrained(tmp_path / "in" / "run", variant="fp16")
    fastseg.SegformerImageProcessor(size=48).save_pretrained(tmp_path / "in" / "run")
    save_model(tmp_path / "in")
    where = ["--subfolder", "run", "--variant", "fp16"]
    assert convert(tmp_path / "in", tmp_path / "out", *where) == 0
    found = fastseg.from_pretrained(tmp_path / "out", dtype="auto")
    expected = fastseg.from_pretrained(
        tmp_path / "in", subfolder="run", variant="fp16", dtype="auto"
    )
    assert found.dtype == torch.float16
    assert_same_tensors(found.state_dict(), dict(expected.state_dict()))
    processor = fastseg.SegformerImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size == {"height": 48, "width": 48}


def test_a_revision_of_a_hub_id(tmp_path, monkeypatch):
    """In a cache as huggingface_hub lays it out, offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--someone--scenes"
    (repository / "refs").mkdir(parents=True)
    for name, classes in (("main", 3), ("v1", 7)):
        commit = f"{classes}" * 40
        (repository / "refs" / name).write_text(commit)
        save_model(repository / "snapshots" / commit, num_labels=classes)
    assert convert("someone/scenes", tmp_path / "out", "--revision", "v1") == 0
    assert fastseg.from_pretrained(tmp_path / "out").config.num_labels == 7
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


def test_help(capsys):
    assert main(["convert", "--help"]) == 0
    told = capsys.readouterr().out
    for part in ("--to {transformers,nvlabs,mmseg,smp}", "--weights {model,ema}", "--no-strict"):
        assert part in told

"""Checkpoints of NVlabs, mmseg and segmentation_models_pytorch: parity with their own networks."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import fastseg
from fastseg.checkpoints.load import CheckpointError, CheckpointWarning
from fastseg.models.auto import from_pretrained
from tests.model_cases import randomize, relative_error
from tests.models.hosts import mmseg

pytestmark = pytest.mark.filterwarnings("error::fastseg.CheckpointWarning")

# In float64 the networks agree to rounding, or else an epsilon or a weight is another.
BOUND = 1e-12
B0 = [32, 64, 160, 256]
HEADS = [1, 2, 5, 8]
NVLABS_EPS = {"patch": 1e-5, "block": 1e-6, "reduction": 1e-5, "stage": 1e-6}

# Makes, in the folder argv[1], random models of smp, and their outputs in float64.
SAVE_SMP = """
import sys, pathlib, torch
import segmentation_models_pytorch as smp
folder = pathlib.Path(sys.argv[1])
torch.manual_seed(7)
model = smp.Segformer("mit_b0", encoder_weights=None, classes=6).eval()
with torch.no_grad():
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            gain = name.endswith("weight") and ("norm" in name or "fuse_stage.1" in name)
            tensor.normal_(mean=float(gain), std=0.3)
model.save_pretrained(folder / "saved")
torch.save(model.state_dict(), folder / "smp.pth")
torch.save(model.encoder.state_dict(), folder / "encoder.pth")
torch.save(
    smp.Unet("mit_b0", encoder_weights=None, classes=6).state_dict(), folder / "unet.pth"
)
smp.Segformer("resnet18", encoder_weights=None).save_pretrained(folder / "resnet")
pixels = torch.randn(1, 3, 64, 32, dtype=torch.float64)  # convolutions in float64 are slow
model.double()
model.segmentation_head[1] = torch.nn.Identity()  # the upsampling
with torch.no_grad():
    maps = model.encoder(pixels)
    logits = model.segmentation_head(model.decoder(maps))
torch.save({"pixels": pixels, "maps": maps[2:], "logits": logits}, folder / "outputs.pt")
"""


@pytest.fixture(scope="module")
def smp(run_smp, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smp")
    run_smp(SAVE_SMP, folder)
    return folder


@pytest.fixture(scope="module")
def outputs(smp) -> dict:
    return torch.load(smp / "outputs.pt")


def nvlabs_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An smp Segformer's tensors under the authors' names, which its encoder has already."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("encoder.", "backbone.", 1)
        if match := re.fullmatch(r"decoder\.mlp_stage\.(\d)\.linear\.(.+)", name):
            name = f"decode_head.linear_c{4 - int(match[1])}.proj.{match[2]}"
        name = name.replace("decoder.fuse_stage.0.", "decode_head.linear_fuse.conv.")
        name = name.replace("decoder.fuse_stage.1.", "decode_head.linear_fuse.bn.")
        renamed[name.replace("segmentation_head.0.", "decode_head.linear_pred.")] = tensor
    # Leftovers that the authors' files have and their network does not use.
    renamed["decode_head.conv_seg.weight"] = torch.zeros(6, 256, 1, 1)
    renamed["decode_head.conv_seg.bias"] = torch.zeros(6)
    return renamed


@pytest.fixture
def nvlabs(smp) -> dict[str, torch.Tensor]:
    return nvlabs_names(torch.load(smp / "smp.pth"))


def epsilons(model) -> dict[str, float]:
    encoder = model._encoder
    return {
        "patch": encoder.patch_embeddings[0].layer_norm.eps,
        "block": encoder.block[0][0].layer_norm_1.eps,
        "reduction": encoder.block[0][0].attention.self.layer_norm.eps,
        "stage": encoder.layer_norm[0].eps,
    }


@torch.no_grad()
def assert_logits(model, outputs) -> None:
    """Plain and folded, in float64; and in float32 within its rounding."""
    assert type(model) is fastseg.SegformerForSemanticSegmentation
    assert model.dtype == torch.float32
    assert epsilons(model) == NVLABS_EPS
    pixels = outputs["pixels"]
    assert relative_error(model(pixels.float()).logits, outputs["logits"]) <= 2e-6
    model.double()
    assert relative_error(model(pixels).logits, outputs["logits"]) <= BOUND
    with fastseg.plain_path():
        assert relative_error(model(pixels).logits, outputs["logits"]) <= BOUND


@pytest.mark.slow
def test_nvlabs(nvlabs, outputs, tmp_path):
    nvlabs["backbone.head.weight"] = torch.zeros(1000, 256)
    torch.save({"state_dict": nvlabs, "meta": {"epoch": 3}}, tmp_path / "segformer.b0.pth")
    model = from_pretrained(tmp_path / "segformer.b0.pth")
    assert not model.load_report
    config = model.config
    assert config.hidden_sizes == B0
    assert config.num_attention_heads == HEADS
    assert config.sr_ratios == [8, 4, 2, 1]
    assert (config.num_labels, config.decoder_hidden_size) == (6, 256)
    assert_logits(model, outputs)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_prefixes_of_training_programs(prefix, nvlabs, outputs, tmp_path):
    torch.save({prefix + name: tensor for name, tensor in nvlabs.items()}, tmp_path / "it.ckpt")
    assert_logits(from_pretrained(str(tmp_path / "it.ckpt")), outputs)


def test_nvlabs_encoder_with_its_classifier(smp, outputs, tmp_path):
    """As the files that segmentation is trained from: mit_b0.pth."""
    state = torch.load(smp / "encoder.pth")
    head = {"head.weight": torch.randn(10, 256), "head.bias": torch.randn(10)}
    torch.save({**state, **head}, tmp_path / "mit_b0.pth")
    model = from_pretrained(tmp_path / "mit_b0.pth").double()
    assert type(model) is fastseg.SegformerForImageClassification
    assert epsilons(model) == NVLABS_EPS
    pooled = outputs["maps"][-1].mean((2, 3))
    expected = pooled @ head["head.weight"].double().t() + head["head.bias"].double()
    with torch.no_grad():
        assert relative_error(model(outputs["pixels"]).logits, expected) <= BOUND
    with pytest.warns(CheckpointWarning, match="newly initialised"):
        fastseg.SegformerForSemanticSegmentation.from_pretrained(
            tmp_path / "mit_b0.pth", num_labels=4
        )


@torch.no_grad()
def assert_maps(model, pixels, maps) -> None:
    assert type(model) is fastseg.SegformerModel
    found = model.double()(pixels, output_hidden_states=True).hidden_states
    assert len(found) == len(maps) == 4
    for ours, theirs in zip(found, maps, strict=True):
        assert relative_error(ours, theirs) <= BOUND


def test_smp_files_and_folders(smp, outputs, tmp_path):
    os.link(smp / "smp.pth", tmp_path / "pytorch_model.bin")  # a folder without config.json
    for path in (smp / "smp.pth", smp / "saved", tmp_path):
        model = from_pretrained(path)
        assert model.config.num_labels == 6
        assert_logits(model, outputs)
    assert_maps(from_pretrained(smp / "encoder.pth"), outputs["pixels"], outputs["maps"])


def test_smp_with_another_encoder(smp):
    with pytest.raises(CheckpointError, match=r"config\.json: expected .* mit_b5, got 'resnet18'"):
        from_pretrained(smp / "resnet")


def test_another_decoder_of_smp_gives_its_encoder_only(smp):
    with pytest.raises(CheckpointError, match=r"unet\.pth: .*another network.*accelerate"):
        from_pretrained(smp / "unet.pth")
    with pytest.warns(CheckpointWarning, match="not used"):
        encoder = fastseg.SegformerModel.from_pretrained(smp / "unet.pth")
    state = torch.load(smp / "unet.pth")
    weight = state["encoder.block3.0.attn.kv.weight"]
    attention = encoder.encoder.block[2][0].attention.self
    assert torch.equal(torch.cat([attention.key.weight, attention.value.weight]), weight)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_saved_config_keeps_the_epsilons(suffix, nvlabs, outputs, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save(nvlabs, path)
    else:
        save_file(nvlabs, path)
    from_pretrained(path).save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["block_norm_eps"] == written["stage_norm_eps"] == 1e-6
    assert written["patch_norm_eps"] == written["reduction_norm_eps"] == 1e-5
    assert_logits(from_pretrained(tmp_path / "saved"), outputs)


def mmseg_model(head: type | None = None):
    backbone = mmseg.MixVisionTransformer(32, (2, 1, 1, 1), HEADS)
    model = backbone if head is None else mmseg.EncoderDecoder(backbone, head(B0, num_classes=3))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_mmseg_encoder(prefix, tmp_path):
    network = mmseg_model()
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    assert f"{prefix}layers.0.1.1.attn.attn.in_proj_weight" in state
    torch.save({"state_dict": state}, tmp_path / "mit.pth")
    model = from_pretrained(tmp_path / "mit.pth")
    assert epsilons(model) == dict.fromkeys(NVLABS_EPS, 1e-6)
    assert model.config.depths == [2, 1, 1, 1]
    pixels = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        maps = network.double()(pixels)
    assert_maps(model, pixels, maps)


def test_mmseg_head_is_refused_and_its_encoder_loads(tmp_path):
    network = mmseg_model(mmseg.SegformerHead)
    state = network.state_dict()
    state["auxiliary_head.conv_seg.weight"] = torch.zeros(3, 8, 1, 1)
    torch.save({"state_dict": state, "meta": {}, "optimizer": {}}, tmp_path / "iter_160000.pth")
    for load in (from_pretrained, fastseg.SegformerForSemanticSegmentation.from_pretrained):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / "iter_160000.pth")
        for part in ("iter_160000.pth", "ReLU", "SegformerModel", "fastseg.accelerate"):
            assert part in str(caught.value)
    with pytest.warns(CheckpointWarning, match=r"auxiliary_head\.conv_seg"):
        encoder = fastseg.SegformerModel.from_pretrained(tmp_path / "iter_160000.pth")
    assert not encoder.load_report.reinitialized
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_maps(encoder, pixels, network.backbone.double()(pixels))


def test_mmseg_encoder_with_the_authors_head(nvlabs, outputs, tmp_path):
    """What mmseg's converter of NVlabs files leaves: only the encoder is renamed."""
    state = {}
    for name, tensor in nvlabs.items():
        if not (match := re.fullmatch(r"backbone\.(patch_embed|block|norm)(\d)\.(.+)", name)):
            state[name] = tensor
            continue
        part, stage, rest = match[1], int(match[2]) - 1, match[3]
        block, _, inner = rest.partition(".")
        if part == "norm":
            target = f"2.{rest}"
        elif part == "patch_embed":
            target = "0." + rest.replace("proj.", "projection.")
        elif inner.startswith("attn.q."):
            target = f"1.{block}." + inner.replace("attn.q.", "attn.attn.in_proj_")
            tensor = torch.cat([tensor, nvlabs[name.replace("attn.q.", "attn.kv.")]])
        elif inner.startswith("attn.kv."):
            continue
        else:
            inner = inner.replace("attn.proj.", "attn.attn.out_proj.")
            inner = inner.replace("mlp.fc1.", "ffn.layers.0.").replace("mlp.fc2.", "ffn.layers.4.")
            inner = inner.replace("mlp.dwconv.dwconv.", "ffn.layers.1.")
            target = f"1.{block}.{inner}"
            if tensor.ndim == 2 and inner.startswith("ffn"):
                tensor = tensor[:, :, None, None]
        state[f"backbone.layers.{stage}.{target}"] = tensor
    torch.save({"state_dict": state}, tmp_path / "it.pth")
    # The weights were made with the authors' epsilons.
    model = from_pretrained(tmp_path / "it.pth", patch_norm_eps=1e-5, reduction_norm_eps=1e-5)
    assert_logits(model, outputs)


def test_one_error_lists_all_tensors_by_their_own_names(nvlabs, tmp_path):
    del nvlabs["backbone.norm2.bias"]
    nvlabs["backbone.block1.0.attn.extra"] = torch.zeros(3)
    nvlabs["decode_head.linear_fuse.bn.bias"] = torch.zeros(9)
    nvlabs["backbone.block2.1.attn.kv.bias"] = torch.zeros(100)
    torch.save(nvlabs, tmp_path / "it.pth")
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(tmp_path / "it.pth")
    text = str(caught.value)
    assert f"{tmp_path / 'it.pth'}: the tensors do not fit SegformerForSemanticSegmentation" in text
    assert "segformer.encoder.layer_norm.1.bias: expected (64,)" in text
    assert "backbone.block1.0.attn.extra: got (3,)" in text
    assert "decode_head.batch_norm.bias: expected (256,), got (9,)" in text
    assert "block.1.1.attention.self.key.bias: expected (64,), got (50,)" in text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, r"num_attention_heads: .*\[8, 16, 24, 32\]: pass num_attention_heads="),
        ({"patch_sizes": [5, 3, 3, 3]}, r"strides: .*\[5, 3, 3, 3\]: pass strides="),
    ],
)
def test_what_tensors_do_not_tell(change, told, tmp_path):
    config = {
        "depths": [1, 0, 2, 1],
        "hidden_sizes": [8, 16, 24, 32],
        "num_attention_heads": [2, 2, 3, 4],
        "sr_ratios": [4, 1, 2, 1],
        "mlp_ratios": [2, 4, 3, 1],
        "num_channels": 4,
        "decoder_hidden_size": 12,
        "num_labels": 3,
        **change,
    }
    model = fastseg.SegformerForSemanticSegmentation(fastseg.SegformerConfig(**config)).eval()
    torch.save(model.state_dict(), tmp_path / "state_dict.pt")
    with pytest.raises(CheckpointError, match=told):
        from_pretrained(tmp_path / "state_dict.pt")
    given = {"num_attention_heads": [2, 2, 3, 4], "strides": [4, 2, 2, 2]}
    loaded = from_pretrained(tmp_path / "state_dict.pt", **given)
    assert loaded.config == model.config  # epsilons of transformers too
    pixels = torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_a_raw_state_dict_of_transformers_5_alone(tmp_path):
    model = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(depths=[1, 1, 1, 1], num_labels=4)
    ).eval()
    randomize(model)
    torch.save(model.state_dict(), tmp_path / "state_dict.pth")
    loaded = from_pretrained(tmp_path / "state_dict.pth").double()
    pixels = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model.double()(pixels).logits
        assert relative_error(loaded(pixels).logits, expected) <= BOUND


def test_a_config_json_counts_for_a_file_of_a_checkpoints_name_only(tmp_path):
    config = fastseg.SegformerConfig(depths=[1, 1, 1, 1], num_labels=3)
    fastseg.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "drop_path_rate": 0.3}))
    assert from_pretrained(tmp_path / "model.safetensors").config.drop_path_rate == 0.3
    os.link(tmp_path / "model.safetensors", tmp_path / "other.safetensors")
    assert from_pretrained(tmp_path / "other.safetensors").config.drop_path_rate == 0.1


def test_a_file_of_something_else(tmp_path):
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet\.pth: expected .*SegFormer.*conv1\.weight"):
        from_pretrained(tmp_path / "resnet.pth")

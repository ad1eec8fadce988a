"""segmentation_models_pytorch: its options, its decoders, and what it shares with the authors."""

from __future__ import annotations

import copy

import pytest
import segmentation_models_pytorch as smp
import timm
import torch

import fastseg
from fastseg.training.masks import compared

from . import nvlabs
from .checks import assert_parity, errors, run
from .host_models import HOSTS, randomize

HOST = HOSTS["smp"]


def accelerated(model, pixels):
    model.eval()
    randomize(model)
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    assert_parity(HOST, model, plain, pixels)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"upsampling": 1},
        {"upsampling": 2},
        {"activation": "sigmoid"},
        {"activation": "softmax2d"},
        {"in_channels": 1},
        {"in_channels": 5},
        {"encoder_depth": 3},
        {"encoder_depth": 4},
        {"decoder_segmentation_channels": 64},
        {"aux_params": {"classes": 4, "pooling": "avg"}},
    ],
    ids=str,
)
def test_options(options, calls):
    model = smp.Segformer("mit_b0", encoder_weights=None, classes=5, **options)
    pixels = torch.randn(2, options.get("in_channels", 3), 64, 96)
    accelerated(model, pixels)
    counts = calls.count_and_clear()
    stages = options.get("encoder_depth", 5) - 1
    assert counts["patch_embed"] == stages
    assert counts["mix_ffn"] == 2 * stages


@pytest.mark.parametrize("decoder", ["FPN", "MAnet", "UPerNet"])
def test_other_decoders(decoder, pixels, calls):
    accelerated(getattr(smp, decoder)("mit_b0", encoder_weights=None, classes=2), pixels)
    assert calls.count_and_clear() == HOSTS["smp-unet"].calls()


def test_dilated_last_stage(pixels, calls):
    """DeepLabV3+ exchanges the strides of the last stage for dilation."""
    accelerated(smp.DeepLabV3Plus("mit_b0", encoder_weights=None, classes=2), pixels)
    assert calls.count_and_clear()["patch_embed"] >= 3


def test_encoder_alone(pixels, calls):
    encoder = smp.encoders.get_encoder("mit_b1", weights=None)
    accelerated(encoder, pixels)
    assert calls.count_and_clear() == HOSTS["smp-unet"].calls()


def test_predict(pixels):
    model = HOST.build()
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    assert torch.allclose(model.predict(pixels), plain.predict(pixels), rtol=1e-4, atol=1e-4)


def test_saved_and_loaded(tmp_path, pixels):
    model = fastseg.accelerate(HOST.build())
    run(HOST, model, pixels)
    model.save_pretrained(tmp_path)
    loaded = smp.from_pretrained(tmp_path).eval()
    assert type(loaded) is smp.Segformer
    assert_parity(HOST, model, loaded, pixels)


def test_other_encoder_is_refused():
    with pytest.raises(ValueError, match="model: "):
        fastseg.accelerate(smp.Unet("resnet18", encoder_weights=None))


def test_the_authors_structure_is_smps(pixels):
    """`nvlabs.py` here has the names and the numbers of smp's encoder, which is the authors'."""
    theirs = HOST.build()
    encoder = nvlabs.MixVisionTransformer((32, 64, 160, 256), depths=(2, 2, 2, 2)).eval()
    torch.nn.Module.load_state_dict(encoder, theirs.encoder.state_dict())
    eps = {name: part.eps for name, part in theirs.encoder.named_modules() if hasattr(part, "eps")}
    assert eps == {n: part.eps for n, part in encoder.named_modules() if hasattr(part, "eps")}
    maps, expected = run(HOST, encoder, pixels), run(HOST, theirs.encoder, pixels)
    assert max(errors(maps, expected[-4:])) <= 1e-6

    head = nvlabs.SegFormerHead((32, 64, 160, 256), embedding_dim=256).eval()
    decoder, last = theirs.decoder, theirs.segmentation_head[0]
    state = head.state_dict()
    for stage in (1, 2, 3, 4):
        for leaf in ("weight", "bias"):
            state[f"linear_c{stage}.proj.{leaf}"] = decoder.mlp_stage[
                4 - stage
            ].linear.state_dict()[leaf]
    state["linear_fuse.conv.weight"] = decoder.fuse_stage[0].weight
    for leaf, tensor in decoder.fuse_stage[1].state_dict().items():
        state[f"linear_fuse.bn.{leaf}"] = tensor
    state["linear_pred.weight"], state["linear_pred.bias"] = last.weight, last.bias
    head.load_state_dict(state)
    with torch.no_grad():
        logits = last(decoder(theirs.encoder(pixels)))
        assert max(errors([head(maps)], [logits])) <= 1e-6


@pytest.mark.parametrize("features_only", [True, False])
def test_pvt_v2_of_timm(features_only):
    """By the stage; the patch embedding before the first stays timm's."""
    model = timm.create_model("pvt_v2_b0", features_only=features_only).eval()
    randomize(model)
    wide = copy.deepcopy(model).double()
    fastseg.accelerate(model, strict=True)
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert fastseg.report(model).count("(timm, PVT v2): folded") == 4
        expected, results = wide(pixels.double()), model(pixels)
    if not features_only:
        expected, results = [expected], [results]
    assert max(errors(results, expected)) < 1e-5


def test_pvt_v2_of_timm_as_an_encoder_of_smp(pixels):
    model = smp.FPN("tu-pvt_v2_b0", encoder_weights=None, classes=2).eval()
    randomize(model)
    wide = copy.deepcopy(model).double()
    fastseg.accelerate(model, strict=True)
    with torch.no_grad():
        assert max(errors([model(pixels)], [wide(pixels.double())])) < 1e-5


def test_linear_pvt_v2_of_timm_is_another_network():
    model = timm.create_model("pvt_v2_b2_li").eval()
    randomize(model)
    fastseg.accelerate(model)
    with torch.no_grad():
        assert "computes something else than a SegFormer's" in fastseg.report(model)


@pytest.mark.parametrize("ignored", [False, True])
def test_the_loss_of_a_loop_of_its_own(ignored):
    """smp resizes with aligned corners, and its loss is the mean over ignored pixels too."""
    options = {"encoder_weights": None, "classes": 5}
    plain = smp.Segformer("mit_b0", **options).double()
    randomize(plain)
    model = smp.Segformer("mit_b0", **options, upsampling=1).double()
    model.load_state_dict(plain.state_dict())
    with pytest.warns(UserWarning, match="your loop may call fastseg.kernels.upsample_cross"):
        fastseg.accelerate(model, training=True)
    pixels, labels = torch.randn(2, 3, 64, 96).double(), torch.randint(0, 5, (2, 64, 96))
    if ignored:
        labels[0, :40] = 255
    its_loss = smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1, ignore_index=255)

    def loss(logits, labels):
        options = {"reduction": "sum", "label_smoothing": 0.1, "align_corners": True}
        return fastseg.kernels.upsample_cross_entropy(logits, labels, **options) / labels.numel()

    found = []
    for one, of_it in ((plain, its_loss), (model, loss)):
        torch.manual_seed(7)
        with compared():
            of_it(one.train()(pixels), labels).backward()
        found.append([parameter.grad for parameter in one.parameters()])
    assert "all in stripes" in fastseg.report(model)
    largest = max(exact.norm() for exact in found[0])
    for exact, ours in zip(*found, strict=True):
        assert (ours - exact).norm() < 1e-12 * exact.norm() + 1e-14 * largest

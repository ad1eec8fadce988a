"""Models of transformers whose encoders are a SegFormer's, GLPN and PVT v2, under their heads."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fastseg
from tests.model_cases import relative_error

from .host_models import HEADS, randomize

WIDTHS = [8 * heads for heads in HEADS]
SIZES = {"depths": [1, 1, 1, 1], "hidden_sizes": WIDTHS, "num_attention_heads": list(HEADS)}


def pvt_v2(**config):
    return transformers.PvtV2Config(**SIZES, **config)


def under_upernet():
    backbone = pvt_v2(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        num_labels=3,
        auxiliary_in_channels=WIDTHS[2],
        auxiliary_channels=8,
    )
    return transformers.UperNetForSemanticSegmentation(config)


MODELS = {
    "depth by GLPN": (
        lambda: transformers.GLPNForDepthEstimation(
            transformers.GLPNConfig(**SIZES, decoder_hidden_size=24)
        ),
        "predicted_depth",
    ),
    "classes by PVT v2": (
        lambda: transformers.PvtV2ForImageClassification(pvt_v2(num_labels=5)),
        "logits",
    ),
    "PVT v2 under UPerNet": (under_upernet, "logits"),
}


def built(build):
    torch.manual_seed(0)
    model = build()
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_parity_with_float64(name):
    build, output = MODELS[name]
    model = built(build)
    wide = copy.deepcopy(model).double()
    fastseg.accelerate(model, strict=True)
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert fastseg.report(model).count(": folded") == 1
        expected = wide(pixels.double())[output]
        assert relative_error(model(pixels)[output], expected) < 1e-5
        tuples = model(pixels, return_dict=False)
    assert relative_error(tuples[0], expected) < 1e-5


def test_linear_attention_is_another_network():
    """Its keys come of a pool, and its feed-forward has a ReLU more: layers stay transformers'."""
    model = built(lambda: transformers.PvtV2Model(pvt_v2(linear_attention=True)))
    wide = copy.deepcopy(model).double()
    fastseg.accelerate(model)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert fastseg.report(model).count("computes something else than a SegFormer's") == 4
        expected = wide(pixels.double())[0]
        assert relative_error(model(pixels)[0], expected) < 1e-5
    with pytest.raises(ValueError, match="computes something else"):
        fastseg.accelerate(model, strict=True)

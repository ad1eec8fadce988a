"""Models made, cast, moved or loaded in `torch.inference_mode()`, whose tensors count no edits."""

from __future__ import annotations

import copy

import pytest
import torch

import fastseg
from tests.models.hosts import nvlabs
from tests.models.hosts.host_models import randomize


def own():
    config = fastseg.SegformerConfig(
        hidden_sizes=(8, 16, 40, 64), depths=(1, 1, 1, 1), decoder_hidden_size=24, num_labels=5
    )
    return fastseg.SegformerForSemanticSegmentation(config)


def accelerated():
    encoder = nvlabs.MixVisionTransformer()
    return fastseg.accelerate(nvlabs.EncoderDecoder(encoder, nvlabs.SegFormerHead()))


@pytest.fixture(params=[own, accelerated])
def build(request):
    def built():
        torch.manual_seed(0)
        model = request.param()
        randomize(model)
        return model.eval()

    return built


def logits(model, pixels):
    output = model(pixels)
    return getattr(output, "logits", output)


def assert_folded_and_right(model, reference):
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert "inference mode" not in fastseg.report(model)
        assert fastseg.report(model).count(": folded") == 2
        wide = copy.deepcopy(reference).double()
        with fastseg.plain_path():
            expected = logits(wide, pixels.double())
        error = (logits(model, pixels).double() - expected).square().mean().sqrt()
        assert error / expected.square().mean().sqrt() < 1e-5


def test_made_there(build):
    with torch.inference_mode():
        model = build()
    assert_folded_and_right(model, build())


@pytest.mark.parametrize("change", [torch.nn.Module.double, lambda model: model.to("meta")])
def test_cast_or_moved_there(build, change):
    model = build()
    with torch.inference_mode():
        change(model)
    for parameter in model.parameters():
        assert parameter._version >= 0  # an error of tensors that have no count


def test_cast_there_before_it_is_accelerated():
    plain = nvlabs.EncoderDecoder(nvlabs.MixVisionTransformer(), nvlabs.SegFormerHead()).eval()
    with torch.inference_mode():
        model = copy.deepcopy(plain)
    model.double().float()  # now they say that they are ordinary, and still count no edits
    assert_folded_and_right(fastseg.accelerate(model), plain)


def test_cast_back_and_forth_there(build):
    model = build()
    with torch.inference_mode():
        model.double().float()
    assert_folded_and_right(model, build())


def test_loaded_there_is_never_stale(build):
    with torch.inference_mode():
        model = build()
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    assert_folded_and_right(model, build())
    with torch.inference_mode():
        model.load_state_dict(other.state_dict())
        assert_folded_and_right(model, other)


def test_tied_parameters_stay_tied():
    model = accelerated()
    with torch.inference_mode():
        shared = torch.nn.Parameter(torch.ones(8))
        model.backbone.norm1.weight = model.backbone.norm1.bias = shared
    model.eval()
    assert model.backbone.norm1.weight is model.backbone.norm1.bias
    assert not model.backbone.norm1.weight.is_inference()

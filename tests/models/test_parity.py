"""Outputs against transformers': both paths, all heads, shapes and dtypes.

Bounds: relative RMS error against a float64 run of transformers' model of at most 2e-6 in float32,
and at most 1.25 times transformers' own error in bfloat16, where the CPU computes that right.
"""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

import fastseg
from tests.half_precision import half_bound
from tests.model_cases import TINY, WIDE, relative_error, twins

FP32_BOUND = 2e-6
# (batch, size); several images of a small size, as float64 references take long. A whole B0 has
# images of the size that people use in every run.
INPUTS = [
    pytest.param(1, (512, 512), marks=pytest.mark.slow),
    pytest.param(1, (517, 389), marks=pytest.mark.slow),
    (1, (261, 197)),
    (1, (64, 64)),
    (3, (64, 64)),
    (3, (33, 97)),
]
B0 = {"hidden_sizes": [32, 64, 160, 256], "num_labels": 150}
# Every preset's widths, one layer a stage.
SHALLOW = {
    "b0": {**B0, "depths": [1, 1, 1, 1]},
    "b1": {**WIDE, "decoder_hidden_size": 256},
    "b2 to b5": {**WIDE, "decoder_hidden_size": 768},
}


def float64_reference(hf_model, pixel_values, **arguments):
    dtype = next(hf_model.parameters()).dtype
    with torch.no_grad():
        output = hf_model.double()(pixel_values.double(), **arguments)
    hf_model.to(dtype)
    return output


@pytest.fixture(scope="module", params=SHALLOW.values(), ids=SHALLOW)
def shallow(request):
    torch.manual_seed(1)
    return twins(**request.param)


@pytest.mark.parametrize(("batch", "size"), INPUTS)
def test_float32(shallow, size, batch):
    hf_model, model = shallow
    pixel_values = torch.randn(batch, 3, *size)
    expected = float64_reference(hf_model, pixel_values, output_hidden_states=True)
    with torch.no_grad():
        folded = model(pixel_values, output_hidden_states=True)
        with fastseg.plain_path():
            plain = model(pixel_values, output_hidden_states=True)
    for output in (folded, plain):
        assert output.logits.shape == expected.logits.shape
        assert relative_error(output.logits, expected.logits) <= FP32_BOUND
        assert len(output.hidden_states) == 4
        for result, reference in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert relative_error(result, reference) <= FP32_BOUND


# The ratio of two errors is steady over several images: of one of 64x64 it is 0.9 to 1.25. A CPU
# without bfloat16 of its own takes most of a minute for the first, and five for larger ones.
@pytest.mark.parametrize(
    ("batch", "size"),
    [pytest.param(1, (261, 197), marks=pytest.mark.slow), (4, (64, 64)), (4, (33, 97))],
)
def test_bfloat16_is_as_close_as_transformers(shallow, size, batch):
    hf_model, model = shallow
    pixel_values = torch.randn(batch, 3, *size)
    # The reference has the rounded weights and pixels, so that rounding inside is what is compared.
    hf_model.bfloat16()
    pixel_values = pixel_values.bfloat16()
    expected = float64_reference(hf_model, pixel_values, output_hidden_states=True)
    with torch.no_grad():
        theirs = hf_model(pixel_values, output_hidden_states=True)
        ours = model.bfloat16()(pixel_values, output_hidden_states=True)
    hf_model.float()
    model.float()
    assert ours.logits.dtype == torch.bfloat16
    pairs = [(ours.logits, theirs.logits, expected.logits)]
    pairs += zip(ours.hidden_states, theirs.hidden_states, expected.hidden_states, strict=True)
    for our_result, their_result, reference in pairs:
        bound = half_bound(relative_error(their_result, reference), torch.bfloat16)
        assert relative_error(our_result, reference) <= bound


@pytest.fixture(scope="module")
def whole_b0():
    torch.manual_seed(2)
    return twins(**B0)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("size", "batch"), [((512, 512), 1), ((64, 64), 3), ((517, 389), 1), ((33, 97), 3)]
)
def test_whole_b0(whole_b0, size, batch):
    hf_model, model = whole_b0
    pixel_values = torch.randn(batch, 3, *size)
    expected = float64_reference(hf_model, pixel_values)
    with torch.no_grad():
        result = model(pixel_values)
    assert relative_error(result.logits, expected.logits) <= FP32_BOUND
    best = expected.logits.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(result.logits.argmax(1)[clear], expected.logits.argmax(1)[clear])


@pytest.mark.parametrize("name", ["SegformerModel", "SegformerForImageClassification"])
@pytest.mark.parametrize("reshape_last_stage", [True, False])
def test_encoder_and_classifier(name, reshape_last_stage):
    hf_model, model = twins(name, **TINY, reshape_last_stage=reshape_last_stage)
    pixel_values = torch.randn(2, 3, 70, 97)
    expected = float64_reference(hf_model, pixel_values, output_hidden_states=True)
    with torch.no_grad():
        result = model(pixel_values, output_hidden_states=True)
    assert relative_error(result[0], expected[0]) <= FP32_BOUND
    for ours, theirs in zip(result.hidden_states, expected.hidden_states, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= FP32_BOUND


def test_segmentation_without_reshaped_last_stage():
    # transformers' head guesses the grid of the last stage from its channels, so the expectation
    # is that of a model that keeps the grid.
    hf_model, model = twins(**TINY)
    model.config.reshape_last_stage = False
    pixel_values = torch.randn(1, 3, 64, 160)
    expected = float64_reference(hf_model, pixel_values, output_hidden_states=True)
    with torch.no_grad():
        result = model(pixel_values, output_hidden_states=True)
    assert relative_error(result.logits, expected.logits) <= FP32_BOUND
    tokens = expected.hidden_states[-1].flatten(2).transpose(1, 2)
    assert relative_error(result.hidden_states[-1], tokens) <= FP32_BOUND


@pytest.mark.parametrize("training", [False, True])
def test_attentions(training):
    hf_model, model = twins(
        attention="eager", **TINY, drop_path_rate=0.0, classifier_dropout_prob=0.0
    )
    hf_model.train(training)
    model.train(training)
    pixel_values = torch.randn(2, 3, 64, 96)
    expected = float64_reference(hf_model, pixel_values, output_attentions=True)
    with torch.no_grad():
        result = model(pixel_values, output_attentions=True)
    assert len(result.attentions) == 4
    for ours, theirs in zip(result.attentions, expected.attentions, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= FP32_BOUND


@pytest.mark.parametrize(
    "hidden_act",
    [
        "gelu",
        "relu",
        "selu",
        "gelu_new",
        "gelu_pytorch_tanh",
        "silu",
        "mish",
        "relu6",
        "quick_gelu",
    ],
)
def test_hidden_act(hidden_act, monkeypatch):
    if hidden_act not in ACT2FN:  # transformers 5.23 lacks selu, which its documentation names
        monkeypatch.setitem(ACT2FN, hidden_act, getattr(torch.nn, hidden_act.upper()))
    hf_model, model = twins(**TINY, hidden_act=hidden_act)
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = float64_reference(hf_model, pixel_values)
    with torch.no_grad():
        result = model(pixel_values)
        with fastseg.plain_path():
            plain = model(pixel_values)
    assert relative_error(result.logits, expected.logits) <= FP32_BOUND
    assert relative_error(plain.logits, expected.logits) <= FP32_BOUND


@pytest.mark.parametrize(
    "changes",
    [
        {"sr_ratios": [1, 1, 1, 1]},
        {"sr_ratios": [5, 3, 2, 1]},
        {"num_attention_heads": [2, 1, 1, 4]},
        {"depths": [0, 2, 1, 3]},
        {"mlp_ratios": [2, 3, 4, 1]},
        {"num_channels": 5},
        {"num_labels": 1},
        {"patch_sizes": [3, 5, 3, 7], "strides": [2, 4, 1, 2]},
        {
            "num_encoder_blocks": 3,
            "depths": [1, 1, 1],
            "sr_ratios": [4, 2, 1],
            "hidden_sizes": [8, 16, 24],
            "patch_sizes": [7, 3, 3],
            "strides": [4, 2, 2],
            "num_attention_heads": [1, 2, 3],
            "mlp_ratios": [4, 4, 4],
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_configurations(changes):
    config = {**TINY, **changes}
    hf_model, model = twins(**config)
    pixel_values = torch.randn(2, config.get("num_channels", 3), 75, 98)
    expected = float64_reference(hf_model, pixel_values)
    with torch.no_grad():
        result = model(pixel_values)
    assert relative_error(result.logits, expected.logits) <= FP32_BOUND


@pytest.mark.parametrize(
    "reshape",
    [
        lambda pixels: pixels.to(memory_format=torch.channels_last),
        lambda pixels: pixels[:, :, ::2, 1:],
        lambda pixels: pixels[:1].expand(3, -1, -1, -1),
        lambda pixels: pixels.transpose(2, 3),
    ],
    ids=["channels-last", "sliced", "expanded", "transposed"],
)
def test_any_memory_layout(reshape):
    hf_model, model = twins(**TINY)
    pixel_values = reshape(torch.randn(2, 3, 128, 129))
    expected = float64_reference(hf_model, pixel_values)
    with torch.no_grad():
        result = model(pixel_values)
    assert relative_error(result.logits, expected.logits) <= FP32_BOUND


def test_stage_maps_are_channels_last_views():
    _, model = twins(**TINY)
    with torch.no_grad():
        output = model(torch.randn(2, 3, 64, 96), output_hidden_states=True)
    for feature_map in (*output.hidden_states, output.logits):
        assert feature_map.is_contiguous(memory_format=torch.channels_last)

"""Each fold in float64 to 1e-12: the folded form of a part against its plain form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import fastseg
from fastseg.kernels import DecodeHeadWeights, decode_head, mix_ffn, patch_embed, sr_attention
from fastseg.kernels.attention.op import reduce_tokens
from fastseg.kernels.head.op import supports
from fastseg.models.segformer.decode_head import SegformerDecodeHead
from fastseg.models.segformer.encoder_plan import LayerPlan
from fastseg.models.segformer.fold import (
    fold_classifier,
    fold_fuse,
    fold_mix_ffn,
    fold_norm_into_linear,
    fold_patch_embed,
    fold_sr_attention,
    wide_affine,
)
from fastseg.models.segformer.hosts.own import ENCODER
from fastseg.models.segformer.layers import SegformerLayer, SegformerOverlapPatchEmbeddings
from tests.model_cases import randomize, relative_error, tiny_model

BOUND = 1e-12
GRIDS = [(1, 1), (7, 5), (16, 16), (33, 9)]


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_equal(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.shape == expected.shape
    assert (result - expected).abs().max() <= BOUND * expected.abs().max().clamp(min=1)


def make_layer(channels, heads, sr_ratio, hidden_act="gelu"):
    config = fastseg.SegformerConfig(hidden_act=hidden_act)
    layer = SegformerLayer(config, channels, heads, 0.0, sr_ratio, 4).eval()
    randomize(layer)
    # Different, so that one taken for the other shows.
    layer.layer_norm_1.eps, layer.layer_norm_2.eps = 1e-6, 1e-4
    return layer


def fold_decode_head(projections, fuse, batch_norm, classifier):
    neck = fold_fuse(projections, fuse, batch_norm)
    return DecodeHeadWeights(neck.weights, neck.bias, **fold_classifier(classifier))


def planned(layer):
    plan = LayerPlan(layer, ENCODER.layer, None, own=True)
    plan.settle(any_mode=False)
    assert [plan.reason, plan.attention.reason, plan.ffn.reason] == [None, None, None]
    return plan


def tokens_with_large_mean(batch, height, width, channels):
    """Rows whose mean is 100 times their deviation, a constant row, large and tiny rows."""
    x = torch.randn(batch, height * width, channels) + 100
    x[0, 0] = 3.0
    if height * width > 4:
        x[0, 1] *= 1e4
        x[0, 2] *= 1e-4
    return x


def test_norm_into_linear():  # A1
    norm, linear = nn.LayerNorm(24), nn.Linear(24, 7)
    randomize(norm)
    x = torch.randn(3, 24)
    weight, bias = fold_norm_into_linear(norm, *wide_affine(linear))
    assert_equal(F.linear(F.layer_norm(x, (24,)), weight, bias), linear(norm(x)))


@pytest.mark.parametrize("sr_ratio", [2, 3, 4, 8])
def test_reduction_as_matrix_product(sr_ratio):
    convolution = nn.Conv2d(6, 6, sr_ratio, stride=sr_ratio)
    x = torch.randn(2, 6, 13, 17)
    tokens = x.flatten(2).transpose(1, 2).contiguous()
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
    result = reduce_tokens(tokens, 13, 17, weight, convolution.bias, sr_ratio)
    assert_equal(result, convolution(x).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("heads", [1, 2, 5])  # A3, A4; A5 for one head
@pytest.mark.parametrize(
    ("sr_ratio", "grid"),
    [(1, grid) for grid in GRIDS] + [(ratio, grid) for ratio in (2, 3, 4) for grid in GRIDS[1:]],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_attention(heads, sr_ratio, grid, batch):
    layer = make_layer(20, heads, sr_ratio)
    self_attention = layer.attention.self
    x = tokens_with_large_mean(batch, *grid, 20)
    folded = fold_sr_attention(
        layer.layer_norm_1,
        self_attention.query,
        self_attention.key,
        self_attention.value,
        layer.attention.output.dense,
        heads,
        self_attention.sr if sr_ratio > 1 else None,
        self_attention.layer_norm if sr_ratio > 1 else None,
    )
    with torch.no_grad():
        expected = x + layer.attention(layer.layer_norm_1(x), *grid)[0]
        assert_equal(sr_attention(x, *grid, folded), expected)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("stripe_bytes", [1, 7000, 1 << 30])
def test_mix_ffn(grid, batch, stripe_bytes, monkeypatch):
    monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", stripe_bytes)
    layer = make_layer(20, 1, 1)
    x = tokens_with_large_mean(batch, *grid, 20)
    mlp = layer.mlp
    folded = fold_mix_ffn(layer.layer_norm_2, mlp.dense1, mlp.dwconv.dwconv, mlp.dense2)
    with torch.no_grad():
        expected = x + mlp(layer.layer_norm_2(x), *grid)
        assert_equal(mix_ffn(x, *grid, folded), expected)


@pytest.mark.parametrize(("patch_size", "stride"), [(7, 4), (3, 2), (3, 1), (5, 3)])
def test_patch_embed(patch_size, stride):
    embeddings = SegformerOverlapPatchEmbeddings(patch_size, stride, 3, 20).eval()
    randomize(embeddings)
    x = torch.randn(2, 3, 37, 23)
    with torch.no_grad():
        expected, height, width = embeddings(x)
        result, *grid = patch_embed(x, fold_patch_embed(embeddings.proj, embeddings.layer_norm))
    assert_equal(result, expected)
    assert grid == [height, width]
    assert result.is_contiguous()


@pytest.mark.parametrize(  # A6
    "grids",
    [
        [(16, 16), (8, 8), (4, 4), (2, 2)],
        [(33, 9), (17, 5), (9, 3), (5, 2)],
        [(9, 25), (5, 13), (3, 7), (2, 4)],
        [(1, 1), (1, 1), (1, 1), (1, 1)],
        [(4, 4), (7, 3), (1, 9), (2, 2)],
    ],
)
@pytest.mark.parametrize("num_labels", [1, 19])
@pytest.mark.parametrize("stripe_bytes", [1, 3000, 1 << 30])
def test_decode_head(grids, num_labels, stripe_bytes, monkeypatch):
    monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", stripe_bytes)
    config = fastseg.SegformerConfig(
        hidden_sizes=[8, 16, 40, 64], decoder_hidden_size=12, num_labels=num_labels
    )
    head = SegformerDecodeHead(config).eval()
    randomize(head)
    maps = [
        torch.randn(2, channels, *grid).contiguous(memory_format=torch.channels_last)
        for channels, grid in zip(config.hidden_sizes, grids, strict=True)
    ]
    with torch.no_grad(), fastseg.plain_path():
        expected = head(maps)
    folded = fold_decode_head(
        [linear.proj for linear in head.linear_c],
        head.linear_fuse,
        head.batch_norm,
        head.classifier,
    )
    with torch.no_grad():
        assert_equal(decode_head(maps, folded), expected)


def test_batch_norm_without_affine_and_layers_without_bias():
    projections = [nn.Linear(6, 4, bias=False), nn.Linear(5, 4)]
    fuse, batch_norm = nn.Conv2d(8, 4, 1, bias=True), nn.BatchNorm2d(4, affine=False).eval()
    classifier = nn.Conv2d(4, 3, 1, bias=False)
    randomize(batch_norm)
    maps = [torch.randn(1, 6, 4, 4), torch.randn(1, 5, 2, 2)]
    with torch.no_grad():
        projected = [
            F.interpolate(
                torch.einsum("bchw,dc->bdhw", feature_map, linear.weight)
                + (0 if linear.bias is None else linear.bias[:, None, None]),
                size=(4, 4),
                mode="bilinear",
                align_corners=False,
            )
            for linear, feature_map in zip(projections, maps, strict=True)
        ]
        expected = classifier(F.relu(batch_norm(fuse(torch.cat(projected[::-1], dim=1)))))
        folded = fold_decode_head(projections, fuse, batch_norm, classifier)
        assert_equal(decode_head(maps, folded), expected)


def head_arguments():
    """Arguments of `decode_head` for four maps of widths that kernels take."""
    widths, sizes = (32, 64, 96, 128), ((9, 7), (5, 4), (3, 2), (2, 1))
    maps = [torch.randn(2, c, *size) for c, size in zip(widths, sizes, strict=True)]
    weights = [torch.randn(64, c) * c**-0.5 for c in widths]
    return maps, weights, torch.randn(64), torch.randn(5, 64), torch.randn(5)


@pytest.mark.parametrize("stripe_bytes", [1, 1 << 30])
def test_decode_head_without_classifier(stripe_bytes, monkeypatch):
    """The map that a classifier would take, as models have it whose classifier is not folded."""
    monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", stripe_bytes)
    maps, weights, bias, *_ = head_arguments()
    upsampled = [
        F.interpolate(
            torch.einsum("bchw,dc->bdhw", one, weight),
            size=(9, 7),
            mode="bilinear",
            align_corners=False,
        )
        for one, weight in zip(maps, weights, strict=True)
    ]
    expected = F.relu(sum(upsampled) + bias[:, None, None])
    assert (expected == 0).any()
    assert (expected > 0).any()
    made = DecodeHeadWeights(tuple(weights), bias)
    assert_equal(decode_head(maps, made), expected)
    result = decode_head([one.float() for one in maps], made.map(torch.Tensor.float))
    assert result.dtype == torch.float32
    assert relative_error(result, expected) < 2e-6


def test_kernels_need_a_classifier():
    maps, weights, bias, *classifier = tree_map(torch.Tensor.float, head_arguments())
    assert supports(maps, DecodeHeadWeights(tuple(weights), bias)) == "there is no classifier"
    assert supports(maps, DecodeHeadWeights(tuple(weights), bias, *classifier)) is None


@pytest.mark.parametrize("missing", ["classifier_weight", "classifier_bias"])
def test_a_classifier_has_a_weight_and_a_bias(missing):
    _, weights, bias, weight, classifier_bias = head_arguments()
    given = {"classifier_weight": weight, "classifier_bias": classifier_bias, missing: None}
    with pytest.raises(ValueError, match=f"{missing}: expected a tensor of shape .*, got None"):
        DecodeHeadWeights(tuple(weights), bias, **given)


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "selu", "gelu_new", "silu"])
def test_whole_layer(hidden_act):
    layer = make_layer(20, 5, 2, hidden_act)
    x = tokens_with_large_mean(2, 7, 5, 20)
    with torch.no_grad():
        assert_equal(planned(layer).run(x, 7, 5, None), layer(x, 7, 5)[0])


def test_inputs_are_not_written_to():
    layer = make_layer(20, 1, 2)
    x = torch.randn(1, 35, 20)
    before = x.clone()
    with torch.no_grad():
        planned(layer).run(x, 7, 5, None)
    assert torch.equal(x, before)


def test_folded_tensors_have_the_parameters_dtype():
    layer = make_layer(20, 1, 2).bfloat16()
    for part in planned(layer).parts():
        for name, value in part.folded().arguments().items():
            if isinstance(value, torch.Tensor):
                # Sums are of the weights as they are rounded, and are not rounded themselves.
                expected = torch.float32 if name.endswith("_weight_sum") else torch.bfloat16
                assert value.dtype == expected, name


@pytest.mark.parametrize("sr_ratio", [1, 2])
def test_sums_are_those_of_the_rounded_weights(sr_ratio):
    folded = planned(make_layer(20, 5, sr_ratio).bfloat16()).attention.folded().arguments()
    sums = {n: v for n, v in folded.items() if n.endswith("_weight_sum") and v is not None}
    second = "key_value_weight_sum" if sr_ratio == 1 else "sr_weight_sum"
    assert set(sums) == {"query_weight_sum", second}
    for name, value in sums.items():
        weight = folded[name.removesuffix("_sum")].double()
        if name == "sr_weight_sum":
            weight = weight.view(20, 4, 20).transpose(0, 1)
        torch.testing.assert_close(value.double(), weight.sum(-1), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_keras_cv_network():
    """Uneven padding and mixed channels; grids that their channels divide, and that they do not."""
    fields = {"same_padding": True, "mixes_channels": True, "batch_norm_eps": 1e-3}
    model = tiny_model(**fields, depths=[2, 1, 1, 1])
    for side in (32, 96):
        pixels = torch.randn(2, 3, side, side)
        folded = model(pixels).logits
        with fastseg.plain_path():
            assert_equal(folded, model(pixels).logits)

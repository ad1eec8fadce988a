"""What makes a CPU fast, in graphs and outside: whole ops, stripes, groups of channels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg.kernels import MixFfnWeights, mix_ffn, upsample_argmax
from fastseg.kernels.blocks import onednn
from fastseg.kernels.blocks.bilinear import (
    bilinear_neighbours,
    image_stripes,
    row_shares,
    share_rows,
)
from fastseg.kernels.ffn import op
from tests.half_precision import half_limit
from tests.model_cases import SMALL, relative_error, tiny_model

OPS = {"patch_embed": 2, "sr_attention": 2, "mix_ffn": 2, "decode_head": 1}  # of two stages


@pytest.fixture(autouse=True)
def forget_graphs():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def small_inputs_count(monkeypatch):
    """What pays for large inputs alone is tested on small ones."""
    monkeypatch.setattr(onednn, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(onednn, "_FEWEST_VALUES", 0)
    monkeypatch.setattr(op, "_LEAST_GROUPED_BYTES", 0)


class Graphs:
    """A backend of torch.compile that keeps the names of the operators that it is given."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, graph, inputs):
        for node in graph.graph.nodes:
            if node.op in ("call_function", "call_method"):
                self.names.append(str(node.target).removesuffix(".default"))
        return graph.forward

    def ops(self):
        names = [name.removeprefix("fastseg.") for name in self.names if "fastseg." in name]
        return {name: names.count(name) for name in names if name != "refresh_folds"}


def plain(model, pixels):
    with torch.no_grad(), fastseg.plain_path():
        return model.double()(pixels.double()).logits


# Whole ops in graphs


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.slow
def test_a_graph_for_a_cpu_takes_ops_whole(dynamic):
    model, pixels = tiny_model(**SMALL), torch.randn(2, 3, 64, 96)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=dynamic)
    with torch.no_grad():
        result = compiled(pixels).logits
    assert graphs.ops() == OPS
    assert not any("conv" in name or "layer_norm" in name for name in graphs.names)
    assert relative_error(result, plain(model, pixels)) <= 2e-6


@pytest.mark.slow
def test_inductor_keeps_memory_formats():
    model, pixels = tiny_model(**SMALL), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels).logits
        result = torch.compile(model, fullgraph=True, dynamic=False)(pixels).logits
    assert result.stride() == expected.stride()
    assert torch.equal(result, expected)


@pytest.mark.slow
def test_ops_of_a_graph_work_in_stripes(monkeypatch):
    counts = []

    def counted(*arguments):
        stripes = image_stripes(*arguments)
        counts.append(len(stripes))
        return stripes

    monkeypatch.setattr(op, "image_stripes", counted)
    monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", 5000)
    model, pixels = tiny_model(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        result = torch.compile(model, fullgraph=True, backend="aot_eager")(pixels).logits
    assert max(counts) > 4
    assert relative_error(result, plain(model, pixels)) <= 2e-6


def ffn_arguments(dtype=torch.float32, channels=8, hidden=32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator) / shape[-1] ** 0.5

    return MixFfnWeights(
        eps=1e-6,
        fc1_weight=draw(hidden, channels),
        fc1_bias=draw(hidden),
        dwconv_weight=draw(hidden, 1, 3, 3),
        dwconv_bias=draw(hidden),
        fc2_weight=draw(channels, hidden),
        fc2_bias=draw(channels),
    )


def ffn_formula(x, height, width, arguments):
    """`mix_ffn` with GELU in float64, step by step."""
    x = x.double()
    wide = vars(arguments.map(torch.Tensor.double))
    normalized = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    grid = F.linear(normalized, wide["fc1_weight"], wide["fc1_bias"])
    grid = grid.transpose(1, 2).unflatten(2, (height, width))
    taps = wide["dwconv_weight"]
    grid = F.conv2d(grid, taps, wide["dwconv_bias"], padding=1, groups=len(taps))
    active = F.gelu(grid).flatten(2).transpose(1, 2)
    return x + F.linear(active, wide["fc2_weight"], wide["fc2_bias"])


def test_a_graph_with_gradients_is_traced_into():
    x, arguments = torch.randn(2, 12, 8, requires_grad=True), ffn_arguments()
    arguments.fc2_weight.requires_grad_(True)
    sources = (x, arguments.fc2_weight)
    expected = torch.autograd.grad(mix_ffn(x, 3, 4, arguments).square().sum(), sources)
    graphs = Graphs()
    compiled = torch.compile(mix_ffn, fullgraph=True, backend=graphs)
    result = torch.autograd.grad(compiled(x, 3, 4, arguments).square().sum(), sources)
    assert graphs.ops() == {}
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_graph_takes_bytes_whole():
    """The weights' dtype decides, and not that of the pixels."""
    model = tiny_model(**SMALL).segformer
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    scale, offset = torch.full((3,), 0.02), torch.full((3,), -2.0)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        result = compiled(pixels, pixel_scale=scale, pixel_offset=offset).last_hidden_state
        floats = pixels.double() * 0.02 - 2
        with fastseg.plain_path():
            expected = copy.deepcopy(model).double()(floats).last_hidden_state
    assert graphs.ops()["patch_embed"] == 2
    assert relative_error(result, expected) < 2e-6


def test_a_graph_under_autocast_is_traced_into():
    x, arguments = torch.randn(2, 12, 8), ffn_arguments()
    graphs = Graphs()
    compiled = torch.compile(mix_ffn, fullgraph=True, backend=graphs)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        result = compiled(x, 3, 4, arguments)
    assert graphs.ops() == {}
    assert result.dtype == torch.float32
    expected = ffn_formula(x, 3, 4, arguments)
    assert relative_error(result - x, expected - x.double()) <= half_limit(torch.bfloat16)


@pytest.mark.parametrize("classes", [2, 30])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_labels_of_a_compiled_graph(classes, dtype):
    smooth = F.interpolate(torch.randn(2, classes, 3, 4), size=(12, 16), mode="bicubic")
    compiled = torch.compile(upsample_argmax, fullgraph=True, dynamic=False)
    result = compiled(smooth, (48, 64), dtype)
    resized = F.interpolate(smooth.double(), size=(48, 64), mode="bilinear", align_corners=False)
    top, second = resized.topk(2, dim=1).values.unbind(1)
    clear = top - second > 1e-5
    assert result.dtype == dtype
    assert clear.float().mean() > 0.99
    assert torch.equal(result.long()[clear], resized.argmax(1)[clear])


# Stripes and groups


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("row_bytes", [1, 100, 700, 5000])
def test_stripes_cover_all_rows_once(batch, row_bytes, monkeypatch):
    monkeypatch.setattr("fastseg.kernels.blocks.bilinear.STRIPE_BYTES", 3000)
    seen = torch.zeros(batch, 9, 4, dtype=torch.int64)
    for images, top, bottom in image_stripes(batch, 9, row_bytes, seen.device):
        part = seen[images, top:bottom]
        assert part.is_contiguous()
        assert part.shape[0] * part.shape[1] * row_bytes <= 3000 or bottom - top == 1
        part += 1
    assert (seen == 1).all()
    rows = image_stripes(batch, 9, row_bytes, seen.device, 4)
    assert all(bottom - top >= 4 for _, top, bottom in rows)


@pytest.mark.parametrize("sizes", [((12, 10), (6, 5)), ((9, 13), (5, 4)), ((4, 5), (7, 3))])
def test_shared_rows_are_those_of_interpolate(sizes):
    (height, width), source = sizes
    grid = torch.randn(2, *source, 3, dtype=torch.float64)
    expected = F.interpolate(
        grid.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    rows = row_shares(bilinear_neighbours(height, source[0], grid.device, grid.dtype), source[0])
    assert torch.equal(rows.sum(1), torch.ones(height, dtype=torch.float64))
    for top, bottom in ((0, height), (0, 3), (1, 2), (2, height)):
        shares, widened = share_rows(grid, rows, top, bottom, width)
        result = (shares @ widened).view(2, bottom - top, width, 3)
        torch.testing.assert_close(result, expected[:, top:bottom])


@pytest.mark.parametrize("hidden", [64, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_hidden_channels(hidden, dtype):
    """Against the formula, in float64; half precision is not rounded between groups."""
    x, arguments = torch.randn(2, 30, 16).to(dtype), ffn_arguments(dtype, 16, hidden)
    result = mix_ffn(x, 5, 6, arguments)
    expected = ffn_formula(x, 5, 6, arguments)
    assert relative_error(result, expected) < (2e-6 if dtype == torch.float32 else 4e-3)

"""oneDNN's products and convolutions on a CPU, and whom they leave to aten's."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from fastseg.kernels.blocks import onednn
from fastseg.kernels.blocks.activations import ACTIVATIONS
from fastseg.kernels.blocks.onednn import (
    dense,
    dense_residual,
    depthwise_activated,
    normalize,
    relu_of_sum_,
)
from tests.model_cases import relative_error


@pytest.fixture(autouse=True)
def small_inputs_count(monkeypatch):
    """What pays for large inputs alone is tested on small ones."""
    monkeypatch.setattr(onednn, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(onednn, "_FEWEST_ROWS_HALF", 1)
    monkeypatch.setattr(onednn, "_FEWEST_VALUES", 0)


def bound(dtype, mean=1):
    """Of relative errors; a mean so many times the deviation costs its share of float32."""
    units = {torch.float32: 16 * mean, torch.float64: 16 * mean}.get(dtype, 1)
    return units * torch.finfo(dtype).eps


def linear_case(rows=(3, 5), inputs=24, outputs=20):
    return torch.randn(*rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)


@pytest.mark.parametrize("rows", [(7,), (2, 5), (2, 3, 4), (0, 5)])
def test_products(rows):
    x, weight, bias = linear_case(rows)
    residual = torch.randn(*rows, 20)
    kept = residual.clone()
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(dense(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        dense(x, weight).double(), expected - bias.double(), rtol=1e-5, atol=1e-5
    )
    total = dense_residual(x, weight, bias, residual)
    torch.testing.assert_close(total.double(), expected + kept.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, kept)


def test_products_of_slices_and_transposes():
    x, weight, bias = linear_case(inputs=48, outputs=40)
    residual = torch.randn(5, 3, 20).transpose(0, 1)
    for rows in (x[..., ::2], x[..., :24], torch.randn(5, 24, 3).permute(2, 0, 1)):
        for matrix in (weight[:20, :24], weight[::2, ::2], torch.randn(24, 20).t()):
            for vector in (bias[::2], bias[:20], None):
                wide = None if vector is None else vector.double()
                expected = F.linear(rows.double(), matrix.double(), wide)
                result = dense(rows, matrix, vector).double()
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
                result = dense_residual(rows, matrix, vector, residual).double()
                expected = expected + residual.double()
                torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_products_keep_gradients_tangents_and_transforms():
    x, weight, bias = linear_case()
    residual, tangent = torch.randn(3, 5, 20), torch.randn(3, 5, 24)
    weight.requires_grad_(True)
    dense_residual(x, weight, bias, residual).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(20, -1))
    weight = weight.detach()
    with forward_ad.dual_level():
        dual = dense(forward_ad.make_dual(x, tangent), weight, bias)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, F.linear(tangent, weight))
    per_row = torch.func.vmap(dense, in_dims=(0, None, None))(x, weight, bias)
    torch.testing.assert_close(per_row, F.linear(x, weight, bias))
    _, result = torch.func.jvp(lambda t: dense(t, weight, bias), (x,), (tangent,))
    torch.testing.assert_close(result, F.linear(tangent, weight))


def test_products_in_other_dtypes_and_under_autocast():
    x, weight, bias = linear_case()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        arguments = [tensor.to(dtype) for tensor in (x, weight, bias)]
        result, expected = dense(*arguments), F.linear(*(tensor.double() for tensor in arguments))
        assert result.dtype == dtype
        assert onednn.plain_on_cpu(*arguments) == (dtype == torch.bfloat16 and onednn._BFLOAT16)
        assert relative_error(result, expected) <= bound(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dense(x, weight, bias).dtype == torch.bfloat16
        total = dense_residual(x, weight, bias, torch.zeros(3, 5, 20))
    assert total.dtype == torch.float32


def test_products_of_fake_tensors():
    x, weight, bias = linear_case()
    with FakeTensorMode() as mode, torch.no_grad():
        x, weight, bias, residual = map(mode.from_tensor, (x, weight, bias, torch.zeros(3, 5, 20)))
        assert dense(x, weight, bias).shape == (3, 5, 20)
        assert dense_residual(x, weight, bias, residual).shape == (3, 5, 20)


def test_products_are_counted_by_counters_and_left_to_aten_on_request(monkeypatch):
    x, weight, bias = linear_case()
    with FlopCounterMode(display=False) as counter:
        dense(x, weight, bias)
    assert counter.get_total_flops() == 2 * 15 * 24 * 20
    called = []
    monkeypatch.setattr(
        "fastseg.kernels.blocks.onednn.F.linear", lambda *tensors: called.append(1) or tensors[0]
    )
    dense(x, weight, bias)
    assert bool(called) != onednn._FAST
    called.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TF32, which is not touched
        with torch.backends.mkldnn.flags(enabled=False):
            dense(x, weight, bias)
    assert called


def test_few_rows_are_left_to_aten(monkeypatch):
    x, weight, bias = linear_case()
    monkeypatch.setattr(onednn, "_FEWEST_ROWS", 16)
    wanted = dense(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(wanted.double(), expected, rtol=1e-5, atol=1e-5)
    called = []
    monkeypatch.setattr(
        "fastseg.kernels.blocks.onednn.F.linear", lambda *tensors: called.append(1) or tensors[0]
    )
    dense(x, weight, bias)  # 15 rows
    assert called == [1]
    dense(torch.cat([x, x]), weight, bias)
    assert len(called) == (1 if onednn._FAST else 2)


# What follows a product or a convolution, inside of it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(2, 5, 7), (1, 1, 1), (0, 3, 4), (1, 9, 1)])
def test_relu_of_a_sum_is_in_the_memory_of_the_residual(dtype, size):
    x, weight, bias = (tensor.to(dtype) for tensor in linear_case(size, 32, 20))
    for visit in range(2):  # of the first the rows are padded, which takes new memory
        residual = torch.randn(*size, 20).to(dtype)
        expected = residual.double() + F.linear(x.double(), weight.double(), bias.double())
        result = relu_of_sum_(residual, x, weight, bias)
        assert result.shape == residual.shape
        if x.numel() == 0:
            return
        assert relative_error(result, expected.relu()) <= bound(dtype)
        if onednn.plain_on_cpu(x) and visit == 1:
            assert torch.equal(result, residual)
        # An image of another size, or both visits would count as one.
        relu_of_sum_(residual.new_zeros(1, 2, 3, 20), x.new_zeros(1, 2, 3, 32), weight, bias)


def test_relu_of_a_sum_of_two_dtypes_is_wide():
    x, weight, bias = (tensor.bfloat16() for tensor in linear_case((2, 3, 4)))
    residual = torch.randn(2, 3, 4, 20)
    expected = residual.double() + F.linear(x.double(), weight.double(), bias.double())
    result = relu_of_sum_(residual, x, weight, bias)
    assert result.dtype == torch.float32
    assert relative_error(result, expected.relu()) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [(2, 5, 7, 24), (1, 4, 1, 8), (1, 1, 1, 32), (0, 3, 3, 8)])
def test_depthwise_convolution_and_activation(activation, dtype, size):
    hidden, channels = torch.randn(*size).to(dtype), size[3]
    weight, bias = torch.randn(channels, 1, 3, 3).to(dtype) / 3, torch.randn(channels).to(dtype)
    convolved = F.conv2d(
        hidden.double().permute(0, 3, 1, 2),
        weight.double(),
        bias.double(),
        padding=1,
        groups=channels,
    )
    expected = ACTIVATIONS[activation](convolved).permute(0, 2, 3, 1)
    for given in (bias, torch.stack([bias, bias], 1)[:, 0]):
        result = depthwise_activated(hidden, weight, given, activation, slice(0, 3))
        assert result.dtype == dtype
        assert result.shape == expected[:, :3].shape
        if hidden.numel():
            assert relative_error(result, expected[:, :3]) <= bound(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalized_rows(dtype):
    x = (torch.randn(3, 5, 40) * 3 + 50).to(dtype)
    expected = F.layer_norm(x.double(), (40,), eps=1e-6)
    assert relative_error(normalize(x, 1e-6), expected) <= bound(dtype, mean=50 / 3)
    assert normalize(x.requires_grad_(True), 1e-6).requires_grad

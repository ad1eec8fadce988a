"""LayerNorm kernel: parity with float64, hard rows, memory layouts, wrong input."""

from __future__ import annotations

import pytest
import torch

from fastseg.kernels import layer_norm
from tests.kernels.triton.kernel_cases import DTYPES, WIDTHS, check_parity, randn


def parameters(channels: int, dtype: torch.dtype, device: torch.device):
    weight = randn(channels, dtype=dtype, device=device, scale=0.2) + 1
    return weight, randn(channels, dtype=dtype, device=device, scale=0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 35, 297])
@pytest.mark.parametrize("channels", [*WIDTHS, 1, 40])
def test_parity(channels, rows, dtype, device):
    x = randn(3, rows, channels, dtype=dtype, device=device)
    check_parity(layer_norm, x, *parameters(channels, dtype, device), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_affine_part(dtype, device):
    check_parity(layer_norm, randn(2, 7, 64, dtype=dtype, device=device), None, None, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_large_and_tiny_values(scale, dtype, device):
    x = randn(2, 35, 160, dtype=dtype, device=device, scale=scale)
    check_parity(layer_norm, x, None, None, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero(dtype, device):
    x = (torch.randn(2, 35, 160) + 100).to(device=device, dtype=dtype)
    check_parity(layer_norm, x, *parameters(160, dtype, device), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_rows_give_the_bias(dtype, device):
    weight, bias = parameters(320, dtype, device)
    x = torch.full((1, 5, 320), 37.5, dtype=dtype, device=device)
    result = layer_norm(x, weight, bias, 1e-6)
    assert torch.equal(result, bias.expand(1, 5, 320))


@pytest.mark.parametrize("layout", ["sliced", "expanded", "transposed"])
def test_layouts(layout, device):
    x = torch.randn(2, 70, 128, device=device)
    x = {
        "sliced": x[:, ::2, 32:96],
        "expanded": x[:1, :1].expand(3, 5, 128),
        "transposed": x.transpose(1, 2),
    }[layout]
    assert check_parity(layer_norm, x, None, None, 1e-6).is_contiguous()


def test_nan_stays_in_its_row(device):
    x = torch.randn(1, 9, 64, device=device)
    x[0, 4, 7] = float("nan")
    result = layer_norm(x, None, None, 1e-6)
    assert result[0, 4].isnan().all()
    assert not result[0, [0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


def test_empty(device):
    assert layer_norm(torch.randn(0, 9, 64, device=device)).shape == (0, 9, 64)


def test_wrong_input(device):
    x = torch.randn(2, 9, 64, device=device)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got torch.int64"):
        layer_norm(x.long())
    with pytest.raises(ValueError, match=r"weight: expected shape \(64,\), got \(32,\)"):
        layer_norm(x, torch.ones(32, device=device))
    with pytest.raises(TypeError, match="bias: expected torch.float32 as the others, got"):
        layer_norm(x, None, torch.ones(64, device=device).half())
    with pytest.raises(ValueError, match="weight: expected a tensor on .*, got meta"):
        layer_norm(x, torch.ones(64, device="meta"))
    with pytest.raises(RuntimeError, match="no kernels for torch.float64"):
        layer_norm(x.double())


def test_registration(device):
    x, weight = torch.randn(2, 9, 64, device=device), torch.randn(64, device=device)
    torch.library.opcheck(torch.ops.fastseg.layer_norm.default, (x, weight, None, 1e-6))


def test_strided_parameters(device):
    weight, bias = torch.randn(64, 2, device=device).unbind(1)
    check_parity(layer_norm, torch.randn(2, 9, 64, device=device), weight, bias, 1e-6)

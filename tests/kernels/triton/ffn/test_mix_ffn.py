"""Mix-FFN kernels: parity with float64 in every form, hard rows and borders, wrong input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fastseg
from fastseg.kernels.blocks.activations import ACTIVATIONS, activate
from fastseg.kernels.core.launch import record_launches
from fastseg.kernels.core.optional_triton import tl, triton
from fastseg.kernels.ffn.op import MixFfnWeights, supports
from fastseg.models.segformer.fold import fold_mix_ffn
from tests.kernels.triton.ffn.ffn_cases import mix_ffn, weights
from tests.kernels.triton.kernel_cases import (
    DTYPES,
    check_parity,
    randn,
    relative_error,
    set_config,
)

TAIL = {
    "form": "tail",
    "BLOCK_Y": 4,
    "BLOCK_X": 4,
    "STRIP": 2,
    "BLOCK_E": 64,
    "BLOCK_N": 32,
    "CHUNKS": 2,
}
SPLIT = {"form": "split", "BLOCK_Y": 4, "BLOCK_X": 4, "STRIP": 4, "BLOCK_E": 64}
# Of a row of more than 64 channels the programs of TAIL have parts.
FORMS = {"tail": TAIL, "whole rows": {**TAIL, "CHUNKS": 5}, "split": SPLIT}


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict], None]:
    return lambda config: set_config(monkeypatch, "mix_ffn", {"num_warps": 4, **config})


@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("channels", "grid", "batch", "dtype"),
    [
        (32, (7, 5), 3, torch.float32),
        (32, (1, 1), 1, torch.bfloat16),
        (64, (5, 9), 2, torch.float16),
        (64, (1, 6), 1, torch.float32),
        (64, (6, 1), 3, torch.bfloat16),
        (160, (3, 11), 1, torch.bfloat16),
        (160, (4, 8), 2, torch.float32),
    ],
    ids=str,
)
def test_parity(channels, grid, batch, dtype, form, norm, choose, device):
    choose(FORMS[form])
    x = randn(batch, grid[0] * grid[1], channels, dtype=dtype, device=device)
    result = check_parity(mix_ffn, x, *grid, **weights(channels, dtype, device, norm=norm))
    assert result.is_contiguous()


@pytest.mark.parametrize(("channels", "ratio"), [(96, 1), (160, 3), (256, 1), (512, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_configurations_are_found_for_any_width(channels, ratio, dtype, device):
    x = randn(1, 15, channels, dtype=dtype, device=device)
    check_parity(mix_ffn, x, 3, 5, **weights(channels, dtype, device, ratio))


@pytest.mark.parametrize("grid", [(16, 16), (33, 9)])
@pytest.mark.parametrize("form", ["whole rows", "split"])
def test_tiles(form, grid, choose, device):
    choose(FORMS[form])
    x = randn(1, grid[0] * grid[1], 32, dtype=torch.float16, device=device)
    check_parity(mix_ffn, x, *grid, **weights(32, torch.float16, device, ratio=2))


@pytest.mark.parametrize(
    ("form", "norm", "names"),
    [
        ("whole rows", True, ["linear_kernel", "tail_kernel"]),
        ("tail", False, ["linear_kernel", "tail_kernel"]),
        ("tail", True, ["linear_kernel", "tail_kernel", "layer_norm_kernel"]),
        ("split", False, ["linear_kernel", "depthwise_kernel", "linear_kernel"]),
        (
            "split",
            True,
            ["linear_kernel", "depthwise_kernel", "linear_kernel", "layer_norm_kernel"],
        ),
    ],
)
def test_launches(form, norm, names, choose, device):
    choose(FORMS[form])
    x = torch.randn(1, 35, 160, device=device)
    with record_launches(dry=True) as launches:
        mix_ffn(x, 7, 5, **weights(160, x.dtype, device, norm=norm))
    assert [launch.name for launch in launches] == names


@pytest.mark.parametrize("grid", [(5, 7), (1, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("form", FORMS)
def test_padding_is_of_the_hidden_tensor(form, grid, choose, device):
    """A hidden tensor of ones, summed over the taps inside of the image: 4, 6 or 9 of them."""
    choose(FORMS[form])
    height, width = grid
    folded = {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else value
        for name, value in weights(32, torch.float32, device).items()
    }
    folded["fc1_bias"].fill_(1)
    folded["dwconv_weight"].fill_(1)
    folded["fc2_weight"][:, 0] = 1
    x = torch.zeros(2, height * width, 32, device=device)
    result = mix_ffn(x, height, width, activation="relu", **folded)
    ones = torch.ones(1, 1, height, width)
    taps = nn.functional.conv2d(ones, torch.ones(1, 1, 3, 3), padding=1).view(-1, 1)
    assert torch.equal(result.cpu(), taps.expand(2, -1, 32))


@triton.jit
def activate_kernel(x_pointer, y_pointer, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_pointer + index, activate(tl.load(x_pointer + index), ACTIVATION))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_functions(activation, device):
    extremes = [0.0, -0.0, 1e-40, 1e-6, 90.0, 1e4, 1e10, 1e20, 3e38, float("inf")]
    x = torch.cat([torch.linspace(-12, 12, 16384 - 21), torch.tensor(extremes)])
    x = torch.cat([x, -x[-10:], torch.tensor([float("nan")])]).to(device)
    y = torch.empty_like(x)
    activate_kernel[(4,)](x, y, ACTIVATION=activation, BLOCK=4096)
    with fastseg.backend("eager"):
        expected = ACTIVATIONS[activation](x.double())
    # Eager gives NaN for -inf in some, as a product of infinity and 0.
    finite = ~ACTIVATIONS[activation](x).isnan() & ~expected.isnan()
    assert y[-1].isnan()
    assert not y[finite].isnan().any()
    bounded = finite & (x.abs() <= 12)
    assert ((y - expected).abs() <= 4e-7 + 2.5e-7 * x.abs())[bounded].all()
    small = bounded & (x.abs() < 0.3)
    assert relative_error(y[small], expected[small]) <= 1e-6
    beyond = finite & (x.abs() > 12)
    assert torch.allclose(y[beyond], expected[beyond].float(), rtol=1e-6, atol=1e-4)


def test_error_of_gelu(device):
    """What the file says of its GELU."""
    x = torch.linspace(-10, 10, 1 << 16, device=device)
    y = torch.empty_like(x)
    activate_kernel[(16,)](x, y, ACTIVATION="gelu", BLOCK=4096)
    assert (y - nn.functional.gelu(x.double())).abs().max() <= 4.3e-7


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["tail", "split"])
def test_activations(form, activation, choose, device):
    choose(FORMS[form])
    folded = weights(32, torch.float32, device, ratio=2)
    folded["dwconv_weight"] *= 3
    x = torch.randn(1, 12, 32, device=device)
    check_parity(mix_ffn, x, 3, 4, activation=activation, **folded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["far from zero", "constant", "large", "tiny"])
def test_hard_rows(rows, dtype, choose, device):
    choose(FORMS["tail"])
    x = torch.randn(2, 20, 64)
    x = {
        "far from zero": x + 100,
        "constant": x[:, :, :1].bfloat16().float().expand(2, 20, 64),  # sums of it are exact
        "large": x * 1e3,
        "tiny": x * 1e-3,
    }[rows]
    folded = weights(64, dtype, device, ratio=1, norm=True)
    check_parity(mix_ffn, x.to(device=device, dtype=dtype), 4, 5, **folded)


def test_a_large_mean_cancels(choose, device):
    """Rows of mean 100, whose mean the final LayerNorm takes off again."""
    choose(FORMS["tail"])
    x = (torch.randn(1, 20, 64) + 100).to(device=device, dtype=torch.bfloat16)
    folded = weights(64, torch.bfloat16, device)
    branch = mix_ffn(x, 4, 5, **folded, norm_weight=torch.ones_like(x[0, 0]))
    with fastseg.backend("eager"):
        twin = mix_ffn(x, 4, 5, **folded, norm_weight=torch.ones_like(x[0, 0]))
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in folded.items()}
        exact = mix_ffn(x.double(), 4, 5, **wide, norm_weight=torch.ones_like(x[0, 0]).double())
    assert relative_error(branch, exact) <= 1.25 * relative_error(twin, exact)


@pytest.mark.parametrize("layout", ["sliced", "expanded", "transposed", "channels last"])
@pytest.mark.parametrize("form", ["tail", "split"])
def test_layouts(form, layout, choose, device):
    choose(FORMS[form])
    x = torch.randn(2, 24, 64, device=device)
    x = {
        "sliced": x[:, ::2, 32:],
        "expanded": x[:1, :1, :32].expand(3, 12, 32),
        "transposed": x[:, :12, :32].transpose(0, 1).contiguous().transpose(0, 1),
        "channels last": x[:, :12, :32].transpose(1, 2).contiguous().transpose(1, 2),
    }[layout]
    folded = weights(32, torch.float32, device, ratio=2)
    folded["dwconv_weight"] = folded["dwconv_weight"].contiguous()
    folded["fc1_weight"] = folded["fc1_weight"].t().contiguous().t()
    folded["fc2_weight"] = folded["fc2_weight"].t().contiguous().t()
    folded["fc2_bias"] = folded["fc2_bias"][:1].expand(32)
    assert check_parity(mix_ffn, x, 3, 4, **folded).is_contiguous()


@pytest.mark.parametrize("form", ["tail", "split"])
def test_nan_stays_in_its_neighbourhood(form, choose, device):
    choose(FORMS[form])
    x = torch.randn(2, 35, 32, device=device)
    x[0, 2 * 5 + 1, 7] = float("nan")
    result = mix_ffn(x, 7, 5, **weights(32, x.dtype, device)).view(2, 7, 5, 32)
    assert result[0, 1:4, 0:3].isnan().all()
    assert result.isnan().sum() == 9 * 32


def test_weight_sums_are_made_where_they_are_not_given(device):
    x = randn(1, 12, 32, dtype=torch.float16, device=device)
    folded = weights(32, x.dtype, device)
    with_sums = mix_ffn(x, 3, 4, **folded)
    folded["fc1_weight_sum"] = None
    assert torch.equal(mix_ffn(x, 3, 4, **folded), with_sums)


def test_a_form_that_there_is_no_more(choose, device):
    """A file of an earlier `fastseg tune` may name one."""
    choose({"form": "implicit", "BLOCK_Y": 4, "BLOCK_X": 8, "BLOCK_E": 64})
    x = torch.randn(1, 12, 32, device=device)
    with pytest.raises(ValueError, match="'tail' or 'split', got 'implicit'; .* FASTSEG_CONFIGS"):
        mix_ffn(x, 3, 4, **weights(32, x.dtype, device))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fc1_weight": torch.ones(64, 16)}, ValueError, r"fc1_weight: expected .*\(64, 32\)"),
        ({"fc1_bias": torch.ones(32)}, ValueError, r"fc1_bias: expected shape \(64,\)"),
        ({"dwconv_weight": torch.ones(64, 3, 3)}, ValueError, r"dwconv_weight: .*\(64, 1, 3, 3\)"),
        ({"dwconv_bias": torch.ones(64).half()}, TypeError, "dwconv_bias: expected torch.float32"),
        ({"fc2_weight": torch.ones(64, 32)}, ValueError, r"fc2_weight: expected .*\(32, 64\)"),
        ({"fc2_bias": torch.ones(32, device="meta")}, ValueError, "fc2_bias: .*, got meta"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of gelu, .*, got 'tanh'"),
        ({"activation": nn.functional.gelu}, ValueError, "activation: expected one of"),
        ({"fc1_weight_sum": torch.ones(64).half()}, TypeError, "fc1_weight_sum: expected"),
        ({"fc1_weight_sum": torch.ones(32)}, ValueError, r"fc1_weight_sum: expected .*\(64,\)"),
        ({"norm_weight": torch.ones(16)}, ValueError, r"norm_weight: expected shape \(32,\)"),
        ({"norm_bias": torch.ones(32)}, ValueError, "norm_bias: expected None as norm_weight"),
    ],
)
def test_wrong_parameters(changes, error, message, device):
    x = torch.randn(1, 12, 32, device=device)
    changes = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in changes.items()
    }
    with pytest.raises(error, match=message):
        mix_ffn(x, 3, 4, **{**weights(32, x.dtype, device, ratio=2), **changes})


def test_wrong_tokens(device):
    folded = weights(32, torch.float32, device)
    x = torch.randn(1, 12, 32, device=device)
    with pytest.raises(TypeError, match="x: expected a floating-point tensor, got torch.int64"):
        mix_ffn(x.long(), 3, 4, **folded)
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, 3 \* 5, 32\)"):
        mix_ffn(x, 3, 5, **folded)
    with pytest.raises(ValueError, match="height, width: expected positive sizes, got 0 and 4"):
        mix_ffn(x[:, :0], 0, 4, **folded)


def test_what_kernels_decline(device):
    x = torch.randn(1, 12, 32, device=device)
    folded = weights(32, x.dtype, device)

    def reason(x, channels=32, ratio=2):
        of_width = weights(channels, x.dtype, device, ratio)
        return supports(x, 3, 4, None, None, 1e-5, MixFfnWeights.of(**of_width))

    assert reason(x) is None
    assert "no kernels for torch.float64" in reason(x.double())
    assert "40 to 80 channels are not multiples of 32" in reason(x, 40)
    assert "16 to 48 channels" in reason(x, 16, 3)
    with torch.enable_grad():
        folded["fc2_bias"].requires_grad_()
        made = MixFfnWeights(**folded)
        assert "gradients" in supports(x, 3, 4, None, None, 1e-5, made)
        with pytest.raises(RuntimeError, match="mix_ffn: backend 'triton' .* gradients"):
            mix_ffn(x, 3, 4, **folded)


def test_compiled(device):
    folded = weights(32, torch.float32, device, ratio=1, norm=True)
    x = torch.randn(2, 12, 32, device=device)
    compiled = torch.compile(mix_ffn, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, 3, 4, **folded), mix_ffn(x, 3, 4, **folded))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folding(dtype):
    """Sums of the rounded weight; off the CPU channels of a tap lie side by side."""
    layers = [nn.LayerNorm(32), nn.Linear(32, 64), nn.Conv2d(64, 64, 3, padding=1, groups=64)]
    layers.append(nn.Linear(64, 32))
    folded = fold_mix_ffn(*[layer.to(dtype) for layer in layers])
    assert torch.equal(folded.fc1_weight_sum, folded.fc1_weight.float().sum(1))
    assert folded.dwconv_weight.is_contiguous()
    elsewhere = fold_mix_ffn(*[layer.to("meta") for layer in layers]).dwconv_weight
    assert elsewhere.shape == (64, 1, 3, 3)
    assert elsewhere.stride() == (1, 576, 192, 64)

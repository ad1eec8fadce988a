"""Spatial-reduction attention: every form against float64 and the others, hard rows, errors."""

from __future__ import annotations

import pytest
import torch

import fastseg
from fastseg.kernels.core import configurations
from fastseg.kernels.core.launch import record_launches
from tests.kernels.triton.attention.attention_cases import force, op, sr_attention, weights
from tests.kernels.triton.kernel_cases import DTYPES, HALF, check_parity, randn, relative_error

KERNELS = {
    "one_launch": ["sr_key_value_kernel"],
    "split": ["sr_partials_kernel", "key_value_kernel"],
    "linear": ["linear_kernel"],
    "one_head": ["one_head_kernel"],
    "block": ["block_kernel"],
    "per_head": ["per_head_kernel", "linear_kernel"],
}


# Channels, heads, sr_ratio, grid, batch: all stages of B0 and of B1 to B5, and what is unlike them.
CASES = [
    (32, 1, 8, (16, 16), 1),
    (64, 1, 8, (33, 9), 3),
    (64, 2, 4, (16, 16), 1),
    (128, 2, 4, (33, 9), 1),
    (160, 5, 2, (7, 5), 3),
    (320, 5, 2, (7, 5), 1),
    (64, 2, 1, (16, 16), 1),
    (256, 8, 1, (7, 5), 1),
    (512, 8, 1, (7, 5), 1),
    (256, 8, 1, (1, 1), 3),
    (128, 1, 2, (7, 5), 1),
    (32, 1, 3, (10, 11), 2),
    (160, 5, 3, (7, 8), 1),
    (96, 3, 8, (8, 9), 1),
    (96, 3, 2, (2, 5), 1),
    (32, 2, 1, (7, 5), 1),  # heads of 16 channels
    (256, 2, 2, (2, 3), 1),  # heads of 128
    (64, 1, 1, (1, 1), 1),
    (128, 1, 1, (7, 5), 3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "heads", "sr_ratio", "grid", "batch"), CASES)
def test_parity(channels, heads, sr_ratio, grid, batch, dtype, device):
    x = randn(batch, grid[0] * grid[1], channels, dtype=dtype, device=device, scale=1.5)
    folded = weights(channels, heads, sr_ratio, dtype, device)
    assert check_parity(sr_attention, x, *grid, **folded).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_several_tiles_of_keys(heads, dtype, device):
    x = randn(1, 17 * 16, 64, dtype=dtype, device=device)
    folded = weights(64, heads, 1, dtype, device)
    # The largest scores come last, so that what was summed before has to be scaled down.
    x[:, -20:] *= 8
    folded["key_value_weight"][:64] *= 6
    folded["key_value_weight_sum"][:64] *= 6
    check_parity(sr_attention, x, 17, 16, **folded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "heads", "sr_ratio"),
    [(32, 1, 2), (64, 1, 3), (64, 2, 2), (128, 2, 3), (160, 5, 2), (96, 3, 1)],
)
def test_forms_agree(channels, heads, sr_ratio, dtype, device, monkeypatch):
    grid = (9, 7)
    x = randn(2, 63, channels, dtype=dtype, device=device)
    folded = weights(channels, heads, sr_ratio, dtype, device)
    key_values = ["split"] if channels > 128 else ["one_launch", "split"]
    results = []
    for key_value in key_values if sr_ratio > 1 else ["linear"]:
        for attending in ["one_head"] if heads == 1 else ["block", "per_head"]:
            with monkeypatch.context() as patch:
                force(patch, key_value, attending)
                results.append(check_parity(sr_attention, x, *grid, **folded))
                with record_launches(dry=True) as launches:
                    sr_attention(x, *grid, **folded)
            names = [launch.name for launch in launches]
            assert names == KERNELS[key_value] + KERNELS[attending]
    for result in results[1:]:
        limit = 2e-6 if dtype == torch.float32 else 4e-3
        assert relative_error(result, results[0]) < limit


@pytest.mark.parametrize("form", ["block", "per_head"])
@pytest.mark.parametrize(("channels", "heads"), [(256, 8), (512, 8), (256, 2), (96, 3)])
def test_attention_forms_of_wide_rows(channels, heads, form, device, monkeypatch):
    force(monkeypatch, attention=form)
    x = randn(1, 35, channels, dtype=torch.float16, device=device)
    folded = weights(channels, heads, 1, torch.float16, device)
    check_parity(sr_attention, x, 7, 5, **folded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "heads", "sr_ratio", "form"),
    [(32, 1, 2, None), (64, 2, 2, "block"), (160, 5, 2, "block"), (160, 5, 1, "per_head")],
)
def test_rows_far_from_zero(channels, heads, sr_ratio, form, dtype, device, monkeypatch):
    force(monkeypatch, attention=form)
    x = torch.randn(1, 35, channels) + 100
    x[0, 3] = 3.0
    x[0, 4] *= 100
    x[0, 5] *= 1e-3
    x = x.to(device=device, dtype=dtype)
    folded = weights(channels, heads, sr_ratio, dtype, device)
    result = check_parity(sr_attention, x, 7, 5, **folded)
    # The residual hides the attention's part: compare that alone too.
    with fastseg.backend("eager"):
        wide = {n: w.double() if isinstance(w, torch.Tensor) else w for n, w in folded.items()}
        expected = sr_attention(x.double(), 7, 5, **wide) - x.double()
    if dtype == torch.float32:
        assert relative_error(result.double() - x.double(), expected) < 2e-3


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("channels", [64, 160])
def test_the_branch_of_rows_far_from_zero(channels, dtype, device, monkeypatch):
    """Tokens whose means are 100 times their deviations attend as the centred ones do."""
    heads = 1 if channels == 64 else 5
    folded = weights(channels, heads, 2, dtype, device)
    folded["eps"] = 1e-12
    # Multiples of 1/8 around 0, and 12.5 more: the same deviations, exactly.
    x = (torch.randint(-2, 3, (1, 35, channels)) / 8).to(device=device, dtype=dtype)
    assert torch.equal((x + 12.5) - 12.5, x)
    near = sr_attention(x, 7, 5, **folded).double() - x.double()
    far = sr_attention(x + 12.5, 7, 5, **folded).double() - (x + 12.5).double()
    # What is stored is the sum, rounded at 12.5.
    rounding = 16 * torch.finfo(dtype).eps
    assert (near - far).abs().max() < rounding


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize(("channels", "heads"), [(32, 1), (64, 2), (160, 5)])
def test_large_and_tiny_values(channels, heads, scale, device):
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(1, 35, channels, dtype=dtype, device=device, scale=scale)
        check_parity(sr_attention, x, 7, 5, **weights(channels, heads, 2, dtype, device))


def test_scores_that_overflow_exponentials(device):
    folded = weights(32, 1, 1, torch.float32, device)
    folded["key_offset_weight"] *= 1e4
    x = torch.randn(1, 35, 32, device=device)
    assert check_parity(sr_attention, x, 7, 5, **folded).isfinite().all()


@pytest.mark.parametrize(("channels", "heads"), [(32, 1), (64, 2), (160, 5)])
def test_nan_stays_in_its_image(channels, heads, device):
    x = torch.randn(3, 35, channels, device=device)
    x[1, 0, 5] = float("nan")
    result = sr_attention(x, 7, 5, **weights(channels, heads, 2, torch.float32, device))
    assert result[1].isnan().all()
    assert not result[[0, 2]].isnan().any()


@pytest.mark.parametrize("layout", ["sliced", "expanded", "transposed"])
def test_layouts(layout, device):
    x = torch.randn(2, 70, 128, device=device)
    x = {
        "sliced": x[:, ::2, 32:96],
        "expanded": x[:1, :1, :64].expand(3, 35, 64),
        "transposed": torch.randn(2, 64, 35, device=device).transpose(1, 2),
    }[layout]
    folded = weights(64, 2, 2, torch.float32, device)
    for name in ("key_value_weight", "query_weight", "output_weight", "sr_weight"):
        folded[name] = folded[name].t().contiguous().t()
    assert check_parity(sr_attention, x, 7, 5, **folded).is_contiguous()


@pytest.mark.parametrize(("channels", "heads", "sr_ratio"), [(160, 5, 2), (96, 3, 1)])
def test_sums_are_made_where_they_are_not_given(channels, heads, sr_ratio, device):
    x = randn(1, 35, channels, dtype=torch.float16, device=device, scale=2)
    folded = weights(channels, heads, sr_ratio, torch.float16, device)
    bare = {name: value for name, value in folded.items() if not name.endswith("_sum")}
    result = sr_attention(x, 7, 5, **folded)
    assert relative_error(sr_attention(x, 7, 5, **bare), result) < 1e-5
    wrong = {**folded, "query_weight_sum": folded["query_weight_sum"] + 1}
    assert not torch.equal(sr_attention(x + 4, 7, 5, **folded), sr_attention(x + 4, 7, 5, **wrong))


def test_wrong_input(device):
    x = torch.randn(1, 35, 64, device=device)
    folded = weights(64, 2, 2, torch.float32, device)
    larger = weights(64, 2, 6, torch.float32, device)
    for expected, changes, kind in (
        (r"x: expected shape \(batch, 7 \* 5, 64\)", {"x": x[:, :34]}, ValueError),
        ("x: expected a floating-point tensor", {"x": x.long()}, TypeError),
        ("num_heads: expected a divisor of 64", {"num_heads": 3}, ValueError),
        (r"weights: expected an sr_ratio of 1 to 5 on a grid of 7 x 5, got 6", larger, ValueError),
        (r"sr_weight: expected shape \(64, 576\)", {"sr_ratio": 3}, ValueError),
        ("key_offset_weight: expected a tensor", {"num_heads": 1}, ValueError),
        ("query_bias: expected a tensor", {"query_bias": None}, ValueError),
        ("sr_bias: expected torch.float32", {"sr_bias": x[0, 0].half()}, TypeError),
        ("output_bias: expected a tensor on", {"output_bias": x[0, 0].to("meta")}, ValueError),
        (
            r"query_weight_sum: expected shape \(64,\)",
            {"query_weight_sum": x[0, 0, :3]},
            ValueError,
        ),
        ("sr_weight_sum: expected torch.float32", {"sr_weight_sum": x[0, :4].half()}, TypeError),
    ):
        arguments = {"x": x, "height": 7, "width": 5, **folded, **changes}
        with pytest.raises(kind, match=expected):
            sr_attention(**arguments)
    with pytest.raises(ValueError, match="height, width: expected positive sizes"):
        sr_attention(x[:, :0], 0, 5, **folded)


@pytest.mark.parametrize(
    ("channels", "heads", "reason"),
    [
        (40, 1, "40 channels are no multiple of 32"),
        (2048, 16, "2048 channels are more than 1024"),
        (96, 2, "a head of 48 channels is none of"),
        (256, 1, "a head of 256 channels is none of"),
        (64, 8, "a head of 8 channels is none of"),
    ],
)
def test_what_kernels_do_not_take(channels, heads, reason, device):
    x = torch.randn(1, 4, channels, device=device)
    folded = weights(channels, heads, 1, torch.float32, device)
    with pytest.raises(RuntimeError, match=reason):
        sr_attention(x, 2, 2, **folded)
    with fastseg.backend("auto"):
        assert sr_attention(x, 2, 2, **folded).shape == x.shape


@pytest.mark.parametrize(("channels", "heads", "sr_ratio"), [(32, 1, 2), (64, 2, 1)])
def test_registration(channels, heads, sr_ratio, device):
    x = torch.randn(1, 35, channels, device=device)
    folded = weights(channels, heads, sr_ratio, torch.float32, device)
    torch.library.opcheck(torch.ops.fastseg.sr_attention.default, (x, 7, 5), folded)


def test_compiled(device):
    folded = weights(32, 1, 2, torch.float32, device)
    x = torch.randn(1, 35, 32, device=device)
    compiled = torch.compile(
        lambda x: sr_attention(x, 7, 5, **folded), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), sr_attention(x, 7, 5, **folded))


def test_choice(device, monkeypatch):
    """The forms that the committed configurations give to the stages of B1 to B5 on sm_90."""
    monkeypatch.setattr(configurations, "device_family", lambda device: "sm_90")
    x = torch.empty(1, 1, 1, dtype=torch.bfloat16, device=device)

    def choose(batch, tokens, channels, heads, sr_ratio):
        tall = x.expand(batch, tokens, channels)
        return tuple(op.choose(tall, heads, sr_ratio, tokens // sr_ratio**2))

    assert choose(1, 128 * 128, 64, 1, 8) == ("one_launch", "one_head")
    assert choose(1, 64 * 64, 128, 2, 4) == ("one_launch", "block")
    assert choose(1, 32 * 32, 320, 5, 2) == ("split", "per_head")
    assert choose(1, 16 * 16, 512, 8, 1) == ("linear", "per_head")
    assert choose(7, 32 * 32, 160, 5, 2) == ("split", "per_head")
    assert choose(8, 32 * 32, 160, 5, 2) == ("split", "block")
    assert choose(32, 16 * 16, 256, 8, 1) == ("linear", "block")
    # Forms that the sizes do not allow are not taken, whatever the configuration says.
    assert choose(1, 64, 96, 3, 2)[0] == "split"


@pytest.mark.parametrize(("heads", "sr_ratio"), [(1, 2), (2, 2), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_parameters(heads, sr_ratio, dtype, device):
    folded = weights(64, heads, sr_ratio, dtype, device)
    for name, value in folded.items():
        if isinstance(value, torch.Tensor):
            folded[name] = torch.stack([value, value + 1], dim=-1)[..., 0]
    x = randn(1, 24, 64, dtype=dtype, device=device)
    check_parity(sr_attention, x, 6, 4, **folded)

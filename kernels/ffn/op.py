"""Mix-FFN with its LayerNorm and residual, and the stage's final LayerNorm where it ends one.

    y = x + W2 act(dwconv3x3(W1 N(x) + b1)) + b2,   N(x) = (x - mean) * rstd

LayerNorm's affine part is inside W1 and b1 (`fastseg/models/segformer/fold.py`). The hidden tensor
is four times as wide as x, and the convolution is what keeps the two linear maps apart: it looks
one pixel around. Kernels take one of two forms, which the configuration names:

- "tail": N and W1, then one kernel for all the rest (`depthwise`): the activated tensor is never
  written. Where few programs of it would fill the GPU or its accumulators would spill:
- "split": N and W1, convolution and activation, W2 and the residual: three kernels.

On a CPU the hidden tensor is made in stripes of rows, so that it stays in the cache and no stripe
is large enough to be mapped and zeroed anew by the allocator at every call. Where x is narrow, and
its grid large, in groups of hidden channels too, which the convolution does not mix: stripes of
them fit a smaller cache, without so few rows that the convolution's margins cost much.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..blocks.activations import ACTIVATIONS
from ..blocks.bilinear import image_stripes
from ..blocks.linear import linear
from ..blocks.onednn import dense, dense_residual, depthwise_activated, normalize
from ..blocks.primitives import matmul_precision
from ..core.checks import autocasts, check_matrix, check_parameter, check_wide, common_reason
from ..core.configurations import Config, look_up, product
from ..core.launch import ceil_div, launch
from ..core.registry import Op, register
from ..core.weights import Weights, check_tokens, check_weights
from ..norm.op import fused as fused_layer_norm
from .depthwise import depthwise_kernel, tail_kernel

# Of the eager twin in groups of hidden channels: up to which width of x they pay, the fewest
# channels of a group, and tensors as large as a stripe that are in use at once. Grids of 64 and 128
# a side with 64 channels took 0.6 and 0.8 of their time without groups, 128 with 32 channels as
# long, and 64 with 128 channels 1.05 (one core of an AMD EPYC).
_MOST_CHANNELS_GROUPED = 64
_LEAST_GROUP = 64
# Bytes of all hidden channels, from which on they pay: with fewer, calls are most of the work, and
# without groups 8 to 32 a side took 0.3 to 0.7 of the time (one core of a Xeon with 2 MiB of L2).
_LEAST_GROUPED_BYTES = 2 << 20
_GROUP_TENSORS = 4


@dataclass(frozen=True, eq=False)
class MixFfnWeights(Weights):
    """Weights of `mix_ffn`, E hidden channels of C.

    Args:
        fc1_weight, fc1_bias: (E, C), (E,).
        dwconv_weight, dwconv_bias: (E, 1, 3, 3), (E,); zero padding of one pixel. Kernels read the
            weight fastest where channels are contiguous in memory.
        fc2_weight, fc2_bias: (C, E), (C,).
        eps: of the LayerNorm before fc1.
        activation: a name in `ACTIVATIONS`, between the convolution and fc2.
        fc1_weight_sum: (E,) float32 (float64 for float64), the row sums of `fc1_weight`, which
            kernels need in half precision: computed at each call where they are not given.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not match, or there is no such activation.
    """

    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    dwconv_weight: torch.Tensor
    dwconv_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor
    eps: float
    activation: str = "gelu"
    fc1_weight_sum: torch.Tensor | None = None

    derived = ("fc1_weight_sum",)

    @property
    def like(self) -> torch.Tensor:
        return self.fc1_weight

    @property
    def channels(self) -> int:
        return self.fc2_bias.shape[0]

    def check(self) -> None:
        like = check_matrix("fc1_weight", self.fc1_weight)
        hidden, channels = like.shape[0], self.channels
        check_parameter("fc1_weight", self.fc1_weight, (hidden, channels), like)
        check_parameter("fc1_bias", self.fc1_bias, (hidden,), like)
        check_parameter("dwconv_weight", self.dwconv_weight, (hidden, 1, 3, 3), like)
        check_parameter("dwconv_bias", self.dwconv_bias, (hidden,), like)
        check_parameter("fc2_weight", self.fc2_weight, (channels, hidden), like)
        check_parameter("fc2_bias", self.fc2_bias, (channels,), like)
        check_wide("fc1_weight_sum", self.fc1_weight_sum, (hidden,), like)
        if self.activation not in ACTIVATIONS:
            names = ", ".join(sorted(ACTIVATIONS))
            raise ValueError(f"activation: expected one of {names}, got {self.activation!r}")

    def least_input(self) -> tuple[object, ...]:
        return (*super().least_input(), None, None, 0.0)


def eager(
    x: torch.Tensor,
    height: int,
    width: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float,
    weights: MixFfnWeights,
) -> torch.Tensor:
    """The eager twin."""
    batch, _, channels = x.shape
    hidden_channels = weights.fc1_weight.shape[0]
    groups = _channel_groups(x, weights)
    row_bytes = width * hidden_channels * x.element_size()
    if len(groups) > 1:
        row_bytes = row_bytes // len(groups) * _GROUP_TENSORS
    grid = x.reshape(batch, height, width, channels)
    stripes = image_stripes(batch, height, row_bytes, x.device)
    output: torch.Tensor | None = None
    for images, top, bottom in stripes:
        if len(stripes) == 1:
            # Without slices: their bounds would make graphs of any size slow to trace.
            source, target, rows = grid, grid, slice(None)
        else:
            # The convolution looks one row beyond the stripe on either side, where there is one.
            above, below = max(top - 1, 0), min(bottom + 1, height)
            source, target = grid[images, above:below], grid[images, top:bottom]
            rows = slice(top - above, bottom - above)
        normalized = normalize(source, weights.eps)
        for weight_1, bias_1, taps, tap_bias, weight_2, bias_2 in groups:
            hidden = dense(normalized, weight_1, bias_1)
            hidden = depthwise_activated(hidden, taps, tap_bias, weights.activation, rows)
            target = dense_residual(hidden, weight_2, bias_2, target)
        if len(stripes) == 1:
            output = target
            break
        if output is None:  # in the dtype of the sum, which autocast may choose
            output = target.new_empty(grid.shape)
        output[images, top:bottom] = target
    assert output is not None
    output = output.view(batch, height * width, channels)
    if norm_weight is not None:
        output = F.layer_norm(output, (channels,), norm_weight, norm_bias, norm_eps)
    return output


def _channel_groups(x: torch.Tensor, weights: MixFfnWeights) -> list[tuple[Any, ...]]:
    """The weights in groups of hidden channels, one after another added to the result."""
    w = weights
    whole = (w.fc1_weight, w.fc1_bias, w.dwconv_weight, w.dwconv_bias, w.fc2_weight, w.fc2_bias)
    channels, size = x.shape[2], max(_LEAST_GROUP, x.shape[2])
    if (
        x.device.type != "cpu"
        or torch.compiler.is_compiling()
        or channels > _MOST_CHANNELS_GROUPED
        or x.shape[0] * x.shape[1] * w.fc1_bias.nbytes < _LEAST_GROUPED_BYTES
        or w.fc1_weight.shape[0] <= size
        or w.fc2_weight.dtype.itemsize < 4  # sums would be rounded at each group
        or autocasts(x.device)
    ):
        return [whole]
    # Slices of columns: as they lie, oneDNN would be a thousand times slower.
    fc2_weights = [part.contiguous() for part in w.fc2_weight.split(size, dim=1)]
    biases = [w.fc2_bias, *[None] * (len(fc2_weights) - 1)]
    parts = (tensor.split(size) for tensor in whole[:4])
    return list(zip(*parts, fc2_weights, biases, strict=True))


def tiles(x: torch.Tensor, height: int, width: int, config: dict[str, Any]) -> int:
    """Number of tiles that cover the images of a batch."""
    block_width = config["BLOCK_X"] * config.get("STRIP", 1)
    return x.shape[0] * ceil_div(height, config["BLOCK_Y"]) * ceil_div(width, block_width)


def fused(
    x: torch.Tensor,
    height: int,
    width: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float,
    weights: MixFfnWeights,
) -> torch.Tensor:
    """The kernels, in the form that the configuration names."""
    x = x.contiguous()
    output = torch.empty_like(x)
    if x.numel() == 0:
        return output
    fc1_weight, fc1_bias = weights.fc1_weight.contiguous(), weights.fc1_bias.contiguous()
    fc2_weight, fc2_bias = weights.fc2_weight.contiguous(), weights.fc2_bias.contiguous()
    dwconv_weight, dwconv_bias = weights.dwconv_weight, weights.dwconv_bias.contiguous()
    if norm_weight is not None:
        norm_weight = norm_weight.contiguous()
        norm_bias = None if norm_bias is None else norm_bias.contiguous()
    hidden_channels, channels = fc1_weight.shape
    config = look_up(
        "mix_ffn",
        x.device,
        x.dtype,
        {"channels": channels, "tokens": x.shape[0] * height * width},
        divides={"BLOCK_E": hidden_channels},
    )
    form = config.pop("form")
    if form not in ("tail", "split"):
        raise ValueError(
            f"mix_ffn: expected a configuration of the form 'tail' or 'split', got {form!r}; the "
            "file that FASTSEG_CONFIGS names may be of an earlier version: unset it and tune anew"
        )
    grid = (tiles(x, height, width, config),)
    sizes = {"HIDDEN": hidden_channels, "ACTIVATION": weights.activation}

    sums = weights.fc1_weight_sum
    sums = fc1_weight.sum(1, dtype=torch.float32) if sums is None else sums.contiguous()
    hidden = linear(x, fc1_weight, fc1_bias, eps=weights.eps, weight_sum=sums)
    channel_stride, _, row_stride, column_stride = dwconv_weight.stride()
    strides = (channel_stride, row_stride, column_stride)
    if form == "tail":
        splits = ceil_div(channels, config["BLOCK_N"] * config["CHUNKS"])
        # A program that has only a part of a row cannot normalise it.
        in_tail = norm_weight if splits == 1 else None
        launch(
            tail_kernel,
            (*grid, splits),
            *(hidden, dwconv_weight, dwconv_bias, fc2_weight, fc2_bias, x, in_tail, norm_bias),
            *(output, height, width, *strides, norm_eps),
            CHANNELS=channels,
            PRECISION=matmul_precision(x.dtype),
            **sizes,
            **config,
        )
        if splits == 1:
            return output
    else:
        activated = torch.empty_like(hidden)
        launch(
            depthwise_kernel,
            (*grid, hidden_channels // config["BLOCK_E"]),
            *(hidden, dwconv_weight, dwconv_bias, activated, height, width, *strides),
            **sizes,
            **config,
        )
        output = linear(activated, fc2_weight, fc2_bias, residual=x)
    if norm_weight is None:
        return output
    return fused_layer_norm(output, norm_weight, norm_bias, norm_eps)


def supports(
    x: torch.Tensor,
    height: int,
    width: int,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    norm_eps: float,
    weights: MixFfnWeights,
) -> str | None:
    """Reason why the kernels cannot take these arguments; None where they can."""
    channels, hidden_channels = weights.fc2_weight.shape
    if channels % 32 or hidden_channels % 32:
        return f"{channels} to {hidden_channels} channels are not multiples of 32"
    return common_reason(x, norm_weight, norm_bias, *weights.tensors())


def candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    """What the tuner tries."""
    channels = sizes["channels"]
    tile = dict(BLOCK_Y=(4, 8), BLOCK_X=(4, 8), BLOCK_E=(32, 64), num_warps=(4, 8))
    # One program for a whole row of the output, as one power of two or as several of 32 or 64.
    whole = channels & (channels - 1) == 0 and channels <= 128
    block_n = channels if whole else 64 if channels % 64 == 0 else 32
    chunks = 1 if whole else channels // block_n
    options = [{"form": "split", **config} for config in product(STRIP=(2, 4), **tile)]
    if half or channels <= 128:
        options += [
            {"form": "tail", "BLOCK_N": block_n, "CHUNKS": chunks, **config}
            for config in product(STRIP=(2, 4) if whole else (1, 2), **tile)
        ]
    return options


def example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """A grid of 3 x 5 tokens of 32 channels, and a LayerNorm at the end."""
    shapes = ((64, 32), (64,), (64, 1, 3, 3), (64,), (32, 64), (32,))
    drawn = [torch.randn(shape, device=device) * shape[-1] ** -0.5 for shape in shapes]
    names = MixFfnWeights.names()[: len(shapes)]
    tensors: Any = {name: one.to(dtype) for name, one in zip(names, drawn, strict=True)}
    x = torch.randn(2, 15, 32, device=device).to(dtype)
    norm = torch.ones(32, device=device, dtype=dtype)
    return x, 3, 5, norm, -norm, 1e-5, MixFfnWeights(**tensors, eps=1e-6)


OP = register(
    Op(
        name="mix_ffn",
        inputs="Tensor x, SymInt height, SymInt width, Tensor? norm_weight, Tensor? norm_bias,"
        " float norm_eps",
        eager=eager,
        fused=fused,
        fake=lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device=x.device),
        supports=supports,
        example=example,
        weights=MixFfnWeights,
        candidates={"mix_ffn": candidates},
    )
)


def mix_ffn(
    x: torch.Tensor,
    height: int,
    width: int,
    weights: MixFfnWeights,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
) -> torch.Tensor:
    """`x` plus its Mix-FFN; with `norm_weight` LayerNorm of that.

    Args:
        x: tokens (B, H * W, C), floating.
        norm_weight, norm_bias, norm_eps: (C,), of a LayerNorm of the result; None for none.

    Returns:
        (B, H * W, C), contiguous.

    Raises:
        TypeError: `x` is not a floating tensor of the dtype of `weights`, or these are no
            `MixFfnWeights`.
        ValueError: shapes or devices do not match, or the grid is empty.
    """
    check_weights(weights, MixFfnWeights)
    check_tokens("x", x, height, width, weights)
    if norm_weight is not None:
        check_parameter("norm_weight", norm_weight, (weights.channels,), weights.like)
    if norm_bias is not None:
        if norm_weight is None:
            raise ValueError("norm_bias: expected None as norm_weight is None, got a tensor")
        check_parameter("norm_bias", norm_bias, (weights.channels,), weights.like)
    return OP(x.device, x, height, width, norm_weight, norm_bias, norm_eps, weights)

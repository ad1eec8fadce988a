"""Overlapping patch embedding: strided convolution, then LayerNorm, straight to tokens.

    tokens = LN(conv(p) + bias),   p = feature_map  or  feature_map * pixel_scale + pixel_offset

As a matrix product over patches the convolution's output rows are tokens: LayerNorm is an epilogue,
and between stages neither a transpose nor a copy is made. The padding is 0 after the normalisation
of pixels, whatever scale and offset are.

Pixels (a few channels, any strides, uint8 or floating) and a stage's tokens (channels-last, widths
in multiples of 32) have kernels of their own; the latter in two forms:

- "whole_row": a program holds all channels of its tokens, normalises and writes them;
- "split": channels and taps are split among programs, and a second kernel adds the float32 parts
  and normalises: for grids that give too few programs with whole rows, and for wide rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..blocks.primitives import matmul_precision
from ..core.checks import KERNEL_DTYPES, check_parameter, check_wide, common_reason
from ..core.configurations import Config, look_up, product
from ..core.launch import ceil_div, launch
from ..core.optional_triton import triton
from ..core.registry import Op, register
from ..core.weights import Weights, check_weights
from .kernels import (
    patch_embed_pixels_kernel,
    patch_embed_reduce_kernel,
    patch_embed_split_kernel,
    patch_embed_whole_row_kernel,
)

MAX_CHANNELS = 512  # of a row that one program normalises
# Of the kernel from pixels: columns times input channels of a step, and the elements of its tile of
# weights, 64 KiB in float32. Twice that would pass what a multiprocessor of sm_80 or sm_120 has.
MAX_STEP_WIDTH = 128
MAX_STEP_SIZE = 1 << 14


@dataclass(frozen=True, eq=False)
class PatchEmbedWeights(Weights):
    """Weights of `patch_embed`, from C_in channels to C.

    Args:
        weight, bias: (C, C_in, k, k) of the convolution, best in channels-last memory; (C,).
        norm_weight, norm_bias: (C,) of the LayerNorm over channels.
        stride, padding: of the convolution.
        eps: of the LayerNorm.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not match.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    stride: int
    padding: int
    eps: float

    @property
    def like(self) -> torch.Tensor:
        return self.weight

    @property
    def channels(self) -> int:
        return self.weight.shape[1]

    def least_input(self) -> tuple[object, ...]:
        return (self.weight.new_empty(1, *self.weight.shape[1:]), None, None)

    def output_size(self, side: int) -> int:
        """Number of patches along a side of the input."""
        return (side + 2 * self.padding - self.weight.shape[2]) // self.stride + 1

    def check(self) -> None:
        weight = self.weight
        if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or not weight.is_floating_point():
            raise ValueError(
                "weight: expected a floating-point tensor (channels, input channels, kernel, "
                f"kernel), got {weight.dtype} {tuple(weight.shape)}"
            )
        for name in ("bias", "norm_weight", "norm_bias"):
            check_parameter(name, getattr(self, name), (weight.shape[0],), weight)
        if self.stride < 1 or self.padding < 0:
            raise ValueError(
                f"stride, padding: expected at least 1 and 0, got {self.stride} and {self.padding}"
            )


def eager(
    feature_map: torch.Tensor,
    pixel_scale: torch.Tensor | None,
    pixel_offset: torch.Tensor | None,
    weights: PatchEmbedWeights,
) -> torch.Tensor:
    """The eager twin: the tokens alone."""
    if pixel_scale is not None or pixel_offset is not None:
        wide = torch.promote_types(weights.weight.dtype, torch.float32)
        scale = 1.0 if pixel_scale is None else pixel_scale[:, None, None]
        offset = 0.0 if pixel_offset is None else pixel_offset[:, None, None]
        # Bytes to floats in the layout that the convolution wants, in one pass.
        feature_map = feature_map.to(wide, memory_format=torch.channels_last)
        feature_map = (feature_map * scale).add_(offset).to(weights.weight.dtype)
    # Left to itself, a convolution of contiguous pixels answers in NCHW and costs a transpose.
    feature_map = feature_map.contiguous(memory_format=torch.channels_last)
    embedded = _convolve(feature_map, weights)
    batch, channels, height, width = embedded.shape
    tokens = embedded.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    return F.layer_norm(tokens, (channels,), weights.norm_weight, weights.norm_bias, weights.eps)


def _convolve(feature_map: torch.Tensor, weights: PatchEmbedWeights) -> torch.Tensor:
    weight, bias = weights.weight, weights.bias
    stride, padding = weights.stride, weights.padding
    if (
        feature_map.dtype == torch.bfloat16
        and feature_map.is_cpu
        and not torch.compiler.is_compiling()
        and weights.output_size(feature_map.shape[3]) == 1
    ):
        # To a grid of width 1 torch 2.13 reads memory that nobody has set, where a CPU has AMX.
        feature_map, weight, bias = feature_map.float(), weight.float(), bias.float()
        return F.conv2d(feature_map, weight, bias, stride=stride, padding=padding).bfloat16()
    return F.conv2d(feature_map, weight, bias, stride=stride, padding=padding)


def _empty_output(feature_map: torch.Tensor, weights: PatchEmbedWeights) -> torch.Tensor:
    height, width = map(weights.output_size, feature_map.shape[2:])
    return weights.weight.new_empty(feature_map.shape[0], height * width, weights.weight.shape[0])


def _next_power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _is_tokens(
    weight: torch.Tensor, pixel_scale: torch.Tensor | None, pixel_offset: torch.Tensor | None
) -> bool:
    """Return whether the kernels from tokens serve, and not the one from pixels."""
    plain = pixel_scale is None and pixel_offset is None
    return plain and weight.shape[0] % 32 == 0 and weight.shape[1] % 32 == 0


def fused(
    feature_map: torch.Tensor,
    pixel_scale: torch.Tensor | None,
    pixel_offset: torch.Tensor | None,
    weights: PatchEmbedWeights,
) -> torch.Tensor:
    """The kernels."""
    weight, eps = weights.weight, weights.eps
    channels, in_channels, kernel, _ = weight.shape
    in_height, in_width = feature_map.shape[2:]
    output = _empty_output(feature_map, weights)
    tokens = output.shape[0] * output.shape[1]
    if tokens == 0:
        return output
    height, width = map(weights.output_size, (in_height, in_width))
    grid_sizes = (tokens, height, width, in_height, in_width)
    from_tokens = _is_tokens(weight, pixel_scale, pixel_offset)
    weight = weight.permute(0, 2, 3, 1).contiguous()  # no copy of channels-last memory
    after = (weights.bias, weights.norm_weight, weights.norm_bias)
    parameters = tuple(tensor.contiguous() for tensor in after)
    constants = {
        "IN_CHANNELS": in_channels,
        "CHANNELS": channels,
        "KERNEL": kernel,
        "STRIDE": weights.stride,
        "PADDING": weights.padding,
        "PRECISION": matmul_precision(weight.dtype),
    }
    sizes = {"in_channels": in_channels, "out_channels": channels, "tokens": tokens}
    device, dtype = weight.device, weight.dtype
    if not from_tokens:
        config = look_up("patch_embed_pixels", device, dtype, sizes)
        scale, offset = (
            None if tensor is None else tensor.contiguous()
            for tensor in (pixel_scale, pixel_offset)
        )
        launch(
            patch_embed_pixels_kernel,
            (ceil_div(tokens, config["BLOCK_M"]),),
            *(feature_map, scale, offset, weight, *parameters, output),
            *(*grid_sizes, *feature_map.stride(), eps),
            **constants,
            BLOCK_N=max(16, triton.next_power_of_2(channels)),
            BLOCK_K=max(16, triton.next_power_of_2(kernel * in_channels)),
            **config,
        )
        return output

    x = feature_map.permute(0, 2, 3, 1).contiguous()
    divides = {"BLOCK_N": channels, "BLOCK_K": in_channels}
    config = look_up("patch_embed", device, dtype, sizes, divides)
    form = config.pop("form")
    if form == "whole_row":
        launch(
            patch_embed_whole_row_kernel,
            (ceil_div(tokens, config["BLOCK_M"]),),
            *(x, weight, *parameters, output, *grid_sizes, eps),
            **constants,
            **config,
        )
        return output
    if form != "split":
        raise ValueError(f"patch_embed: expected form 'whole_row' or 'split', got {form!r}")
    parts = output.new_empty((config["SPLIT"], tokens, channels), dtype=torch.float32)
    launch(
        patch_embed_split_kernel,
        (
            ceil_div(tokens, config["BLOCK_M"]),
            channels // config["BLOCK_N"],
            config["SPLIT"],
        ),
        *(x, weight, parts, *grid_sizes),
        **constants,
        **config,
    )
    reduce_config = look_up("patch_embed_reduce", device, dtype, sizes)
    launch(
        patch_embed_reduce_kernel,
        (ceil_div(tokens, reduce_config["BLOCK_M"]),),
        *(parts, *parameters, output, tokens, eps),
        CHANNELS=channels,
        SPLIT=config["SPLIT"],
        BLOCK_N=triton.next_power_of_2(channels),
        **reduce_config,
    )
    return output


def supports(
    feature_map: torch.Tensor,
    pixel_scale: torch.Tensor | None,
    pixel_offset: torch.Tensor | None,
    weights: PatchEmbedWeights,
) -> str | None:
    """Reason why the kernels cannot take these arguments; None where they can."""
    if feature_map.dtype not in (*KERNEL_DTYPES, torch.uint8):
        return f"there are no kernels for {feature_map.dtype}"
    channels, in_channels, kernel, _ = weights.weight.shape
    if channels > MAX_CHANNELS:
        return f"{channels} channels are more than {MAX_CHANNELS}"
    if not _is_tokens(weights.weight, pixel_scale, pixel_offset):
        step = kernel * in_channels
        if step > MAX_STEP_WIDTH:
            return (
                f"{in_channels} input channels, if not plain tokens in multiples of 32, times "
                f"{kernel} columns are more than {MAX_STEP_WIDTH}"
            )
        if max(16, _next_power_of_2(step)) * _next_power_of_2(channels) > MAX_STEP_SIZE:
            return (
                f"{in_channels} input channels, if not plain tokens in multiples of 32, times "
                f"{kernel} columns times {channels} channels are too many for shared memory"
            )
    return common_reason(*weights.tensors(), feature_map, pixel_scale, pixel_offset)


def _pixels_candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    return product(BLOCK_M=(16, 32, 64, 128), num_warps=(4, 8), num_stages=(2, 3))


def _candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    block = dict(
        BLOCK_M=(64, 128) if half else (32,),
        BLOCK_N=(32, 64, 128) if half else (32,),
        BLOCK_K=(32, 64) if half else (32,),
        num_warps=(4, 8),
        num_stages=(3,) if half else (2,),
    )
    split = {**block, "BLOCK_M": block["BLOCK_M"][:1], "num_warps": (4,)}
    options = [{"form": "split", **config} for config in product(SPLIT=(2, 4, 8), **split)]
    if sizes["out_channels"] <= 320:
        options += [{"form": "whole_row", **config} for config in product(**block)]
    return options


def _reduce_candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    return product(BLOCK_M=(1, 2, 4, 8, 16), num_warps=(2, 4, 8))


def example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Pixels of 11 x 9, by a convolution of 3 with stride 2."""
    weight, bias = torch.randn(32, 3, 3, 3, device=device) / 27**0.5, torch.randn(32, device=device)
    tensors = (tensor.to(dtype) for tensor in (weight, bias, 1 + bias, -bias))
    names = ("weight", "bias", "norm_weight", "norm_bias")
    parameters: Any = dict(zip(names, tensors, strict=True))
    weights = PatchEmbedWeights(**parameters, stride=2, padding=1, eps=1e-6)
    return torch.randn(2, 3, 11, 9, device=device).to(dtype), None, None, weights


OP = register(
    Op(
        name="patch_embed",
        inputs="Tensor feature_map, Tensor? pixel_scale, Tensor? pixel_offset",
        eager=eager,
        fused=fused,
        fake=lambda feature_map, scale, offset, weights: _empty_output(feature_map, weights),
        supports=supports,
        example=example,
        weights=PatchEmbedWeights,
        candidates={
            "patch_embed": _candidates,
            "patch_embed_pixels": _pixels_candidates,
            "patch_embed_reduce": _reduce_candidates,
        },
    )
)


def patch_embed(
    feature_map: torch.Tensor,
    weights: PatchEmbedWeights,
    *,
    pixel_scale: torch.Tensor | None = None,
    pixel_offset: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int, int]:
    """Embed the patches of `feature_map`.

    Args:
        feature_map: (B, C_in, H_in, W_in): pixels, or the channels-last view of a stage's tokens.
            Of the dtype of `weights`; with a scale or an offset any floating dtype, and with a
            scale uint8 too.
        pixel_scale, pixel_offset: (C_in,) float32 (float64 for weights in float64), or None. The
            convolution takes `feature_map * pixel_scale + pixel_offset`, computed in that dtype and
            cast to that of `weights`. Its padding is 0 all the same.

    Returns:
        tokens (B, H * W, C), contiguous, and H, W with H = (H_in + 2 * padding - k) // stride + 1.

    Raises:
        TypeError: dtypes that do not go together, or `weights` that are no `PatchEmbedWeights`.
        ValueError: shapes or devices that do not match, or an input smaller than the kernel.
    """
    check_weights(weights, PatchEmbedWeights)
    _check_input(feature_map, weights, pixel_scale, pixel_offset)
    height, width = map(weights.output_size, feature_map.shape[2:])
    arguments = (feature_map, pixel_scale, pixel_offset, weights)
    return OP(feature_map.device, *arguments), height, width


def _check_input(
    feature_map: torch.Tensor,
    weights: PatchEmbedWeights,
    pixel_scale: torch.Tensor | None,
    pixel_offset: torch.Tensor | None,
) -> None:
    weight = weights.weight
    _, in_channels, kernel, _ = weight.shape
    check_wide("pixel_scale", pixel_scale, (in_channels,), weight)
    check_wide("pixel_offset", pixel_offset, (in_channels,), weight)
    if not isinstance(feature_map, torch.Tensor):
        raise TypeError(f"feature_map: expected a tensor, got {type(feature_map).__name__}")
    if feature_map.dtype == torch.uint8:
        if pixel_scale is None:
            raise TypeError("feature_map: expected floating-point, or a pixel_scale, got uint8")
    elif not feature_map.is_floating_point():
        raise TypeError(f"feature_map: expected floating-point or uint8, got {feature_map.dtype}")
    elif (
        feature_map.dtype != weight.dtype
        and pixel_scale is None
        and pixel_offset is None
        and not torch.is_autocast_enabled(weight.device.type)
    ):
        raise TypeError(
            f"feature_map: expected {weight.dtype} as the weight, got {feature_map.dtype}; of a "
            "model's first stage it is pixel_values: cast these or the model"
        )
    if feature_map.device != weight.device:
        raise ValueError(
            f"feature_map: expected a tensor on {weight.device} as the weight, "
            f"got {feature_map.device}"
        )
    if feature_map.ndim != 4 or feature_map.shape[1] != in_channels:
        raise ValueError(
            f"feature_map: expected shape (batch, {in_channels}, height, width), "
            f"got {tuple(feature_map.shape)}"
        )
    height, width = feature_map.shape[2:]
    smallest = max(kernel - 2 * weights.padding, 1)
    if height < smallest or width < smallest:
        raise ValueError(
            f"feature_map: expected at least {smallest}x{smallest} for a kernel of {kernel} and "
            f"padding {weights.padding}, got {height}x{width}"
        )

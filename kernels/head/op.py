"""The all-MLP decode head, with every projection applied at its own stage's resolution.

A 1x1 convolution commutes with bilinear upsampling, so a stage's linear projection, its slice of
the fuse convolution and BatchNorm make one C_i x D matrix (`fastseg.models.segformer.fold`):

    logits = relu(x_1 M_1 + b + sum_i upsample(x_i M_i)) W + c

The usual order upsamples first and runs a 4 D x D convolution over all H/4 x W/4 pixels.

Two kernels. One projects the three coarse maps. In the other a program takes a tile of the finest
map's pixels and goes through the D channels of the sum in chunks that never leave it: a tile reads
a small window of each coarse map, so upsampling is one more matrix product, of the pixels' shares
of the window's positions with their projections. Each chunk is added up in float32, cut at 0 and
multiplied with its part of W. The logits are written in NCHW, where a class is a plane.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..blocks.bilinear import image_stripes
from ..blocks.linear import linear_candidates
from ..blocks.onednn import dense, relu_of_sum_
from ..blocks.primitives import matmul_precision
from ..core.checks import check_matrix, check_parameter, common_reason
from ..core.configurations import Config, look_up, product
from ..core.launch import ceil_div, launch
from ..core.optional_triton import interpreting, triton
from ..core.registry import Op, register
from ..core.weights import Weights, check_weights
from .kernels import decode_head_kernel, decode_head_project_kernel
from .upsampling import UpsampledSum

MAX_FINEST_CHANNELS = 128  # of which a program holds its tile
# Of the eager twin: tensors as large as a stripe that are in use at once, and the rows of an image
# below which too much of the upsampling is done twice.
_TENSORS = 4
_LEAST_ROWS = 4


@dataclass(frozen=True, eq=False)
class DecodeHeadWeights(Weights):
    """Weights of `decode_head`, D channels wide, for K classes.

    Args:
        weights: M_i as (D, C_i), one for each map, finest first.
        bias: (D,), BatchNorm inside.
        classifier_weight, classifier_bias: (K, D), (K,); None for no classifier, which runs
            eagerly.

    Raises:
        TypeError: dtypes differ.
        ValueError: shapes or devices do not match, or there are no weights.
    """

    weights: tuple[torch.Tensor, ...]
    bias: torch.Tensor
    classifier_weight: torch.Tensor | None = None
    classifier_bias: torch.Tensor | None = None

    @property
    def like(self) -> torch.Tensor:
        return self.bias

    @property
    def channels(self) -> int:
        return self.weights[0].shape[1]

    def least_input(self) -> tuple[object, ...]:
        return ([weight.new_empty(1, weight.shape[1], 1, 1) for weight in self.weights],)

    def check(self) -> None:
        if not isinstance(self.weights, tuple) or not self.weights:
            raise ValueError(
                f"weights: expected a tuple of at least one matrix, got {self.weights!r}"
            )
        like = check_matrix("weights[0]", self.weights[0])
        width = like.shape[0]
        for index, weight in enumerate(self.weights):
            channels = check_matrix(f"weights[{index}]", weight).shape[1]
            check_parameter(f"weights[{index}]", weight, (width, channels), like)
        check_parameter("bias", self.bias, (width,), like)
        if self.classifier_weight is not None or self.classifier_bias is not None:
            classifier = self.classifier_weight
            classes = 0 if classifier is None else classifier.shape[0]
            check_parameter("classifier_weight", classifier, (classes, width), like)
            check_parameter("classifier_bias", self.classifier_bias, (classes,), like)


def eager(feature_maps: Sequence[torch.Tensor], weights: DecodeHeadWeights) -> torch.Tensor:
    """The eager twin; its logits are in channels-last memory."""
    finest = feature_maps[0].permute(0, 2, 3, 1)
    batch, height, width, _ = finest.shape
    decoder_channels = len(weights.bias)
    projected = [
        dense(feature_map.permute(0, 2, 3, 1), weight)
        for feature_map, weight in zip(feature_maps[1:], weights.weights[1:], strict=True)
    ]
    coarse = UpsampledSum(projected, height, width)
    # By products a stripe of twice the size took 0.8 to 1 of the time: there are fewer of them.
    row_bytes = width * decoder_channels * coarse.dtype.itemsize
    row_bytes = row_bytes // 2 if coarse.form == "products" else row_bytes * _TENSORS
    stripes = image_stripes(batch, height, row_bytes, finest.device, _LEAST_ROWS)
    logits: torch.Tensor | None = None
    for images, top, bottom in stripes:
        whole = len(stripes) == 1
        # Without slices, which are operators in a graph.
        source = finest if whole else finest[images, top:bottom]
        upsampled = coarse.stripe(None if whole else images, top, bottom)
        if upsampled is None:
            fused = dense(source, weights.weights[0], weights.bias).relu_()
        else:
            fused = relu_of_sum_(upsampled, source, weights.weights[0], weights.bias)
        fused = fused.to(finest.dtype)
        stripe = fused
        if weights.classifier_weight is not None:
            stripe = dense(fused, weights.classifier_weight, weights.classifier_bias)
        if whole:
            logits = stripe
            break
        if logits is None:  # in the dtype of the classifier's output, which autocast may choose
            logits = stripe.new_empty(batch, height, width, stripe.shape[-1])
        logits[images, top:bottom] = stripe
    assert logits is not None
    return logits.permute(0, 3, 1, 2)


def window_size(tile: int, size: int, source_size: int) -> int:
    """Number of source positions that `tile` positions in a row read at most, of `size` in all."""
    return min((tile - 1) * source_size // size + 3, source_size)


def _windows(
    sizes: Sequence[tuple[int, int]], tile_height: int, tile_width: int
) -> list[tuple[int, int]]:
    """(positions, a power of two, and columns) of each coarse map's window."""
    (height, width), *coarse = sizes
    windows = []
    for source_height, source_width in coarse:
        rows = window_size(tile_height, height, source_height)
        columns = window_size(tile_width, width, source_width)
        windows.append((max(16, triton.next_power_of_2(rows * columns)), columns))
    return windows


@functools.cache
def class_blocks(classes: int, largest: int) -> tuple[int, int]:
    """The two blocks of classes that a program takes, powers of two; the second may be 0.

    As few programs as blocks of up to `largest` allow, then as few columns: 150 classes are 128 and
    32 rather than 256.
    """
    share = ceil_div(classes, ceil_div(classes, 2 * largest))
    powers = [1 << exponent for exponent in range(4, largest.bit_length())]
    pairs = [(a, b) for a in powers for b in (0, *powers) if b <= a and a + b >= share]
    return min(pairs, key=lambda pair: (sum(pair), pair[1] > 0))


def fused(feature_maps: Sequence[torch.Tensor], weights: DecodeHeadWeights) -> torch.Tensor:
    """The kernels; the logits are contiguous."""
    batch, channels, height, width = feature_maps[0].shape
    classifier_weight, classifier_bias = weights.classifier_weight, weights.classifier_bias
    assert classifier_weight is not None
    assert classifier_bias is not None
    classes, decoder_channels = classifier_weight.shape
    output = weights.bias.new_empty(batch, classes, height, width)
    if batch == 0:
        return output
    finest, *coarse = (feature_map.permute(0, 2, 3, 1).contiguous() for feature_map in feature_maps)
    finest_weight, *coarse_weights = (weight.contiguous() for weight in weights.weights)
    device, dtype = output.device, output.dtype
    precision = matmul_precision(dtype)

    rows = [tokens.numel() // tokens.shape[-1] for tokens in coarse]
    widths = [tokens.shape[-1] for tokens in coarse]
    projected = [output.new_empty(count, decoder_channels) for count in rows]
    config = look_up(
        "decode_head_project",
        device,
        dtype,
        {"rows": sum(rows), "decoder_channels": decoder_channels},
        divides={"BLOCK_K": math.gcd(*widths)},
    )
    launch(
        decode_head_project_kernel,
        (
            sum(ceil_div(count, config["BLOCK_M"]) for count in rows),
            ceil_div(decoder_channels, config["BLOCK_N"]),
        ),
        *(*coarse, *coarse_weights, *projected, *rows),
        **{f"CHANNELS_{stage}": size for stage, size in enumerate(widths, start=2)},
        WIDTH=decoder_channels,
        PRECISION=precision,
        **config,
    )

    sizes = [(tokens.shape[1], tokens.shape[2]) for tokens in (finest, *coarse)]
    config = look_up(
        "decode_head",
        device,
        dtype,
        {
            "channels": channels,
            "decoder_channels": decoder_channels,
            "classes": classes,
            "pixels": batch * height * width,
            "positions": sum(positions for positions, _ in _windows(sizes, 8, 16)),
        },
        divides={"BLOCK_D": decoder_channels},
    )
    tile_height, tile_width = config["TILE_HEIGHT"], config["TILE_WIDTH"]
    block_a, block_b = class_blocks(classes, config.pop("MAX_CLASSES"))
    windows = _windows(sizes, tile_height, tile_width)
    launch(
        decode_head_kernel,
        (
            batch * ceil_div(height, tile_height) * ceil_div(width, tile_width),
            ceil_div(classes, block_a + block_b),
        ),
        *(finest, finest_weight, *projected, weights.bias.contiguous()),
        *(classifier_weight.contiguous(), classifier_bias.contiguous(), output),
        *(classes, *(side for size in sizes for side in size)),
        CHANNELS=channels,
        BLOCK_C=triton.next_power_of_2(channels),
        WIDTH=decoder_channels,
        **{f"WINDOW_{stage}": window[0] for stage, window in enumerate(windows, start=2)},
        **{f"WINDOW_WIDTH_{stage}": window[1] for stage, window in enumerate(windows, start=2)},
        PRECISION=precision,
        CLASSES_A=block_a,
        CLASSES_B=block_b,
        **config,
    )
    return output


def _fake(feature_maps: Sequence[torch.Tensor], weights: DecodeHeadWeights) -> torch.Tensor:
    batch, _, height, width = feature_maps[0].shape
    bias = weights.bias
    classes = len(bias) if weights.classifier_bias is None else len(weights.classifier_bias)
    if bias.device.type == "cpu" and not interpreting():
        return bias.new_empty(batch, height, width, classes).permute(0, 3, 1, 2)
    return bias.new_empty(batch, classes, height, width)


def supports(feature_maps: Sequence[torch.Tensor], weights: DecodeHeadWeights) -> str | None:
    """Reason why the kernels cannot take these arguments; None where they can."""
    if weights.classifier_weight is None:
        return "there is no classifier"
    if len(feature_maps) != 4:
        return f"{len(feature_maps)} maps are not 4"
    for weight in weights.weights:
        if weight.shape[0] % 32 or weight.shape[1] % 32:
            return f"{weight.shape[1]} to {weight.shape[0]} channels are no multiples of 32"
    if weights.channels > MAX_FINEST_CHANNELS:
        return f"the finest map's {weights.channels} channels exceed {MAX_FINEST_CHANNELS}"
    height, width = feature_maps[0].shape[2:]
    for feature_map in feature_maps[1:]:
        if feature_map.shape[2] > height or feature_map.shape[3] > width:
            return "a coarse map is larger than the finest"
    return common_reason(*feature_maps, *weights.tensors())


def _candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    if not half:
        return product(
            TILE_HEIGHT=(4, 8),
            TILE_WIDTH=(8,),
            BLOCK_D=(16,),
            MAX_CLASSES=(64, 128),
            num_warps=(4, 8),
            num_stages=(2,),
        )
    return product(
        TILE_HEIGHT=(8,),
        TILE_WIDTH=(8, 16),
        BLOCK_D=(32, 64),
        MAX_CLASSES=(64, 128),
        num_warps=(4, 8),
        num_stages=(2, 3),
    )


def example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Maps of 9 x 7 and less, 5 classes."""

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

    sizes = ((9, 7), (5, 4), (3, 2), (2, 1))
    maps = [draw(2, *size, 32).permute(0, 3, 1, 2) for size in sizes]
    matrices = tuple(draw(64, 32) for _ in sizes)
    return maps, DecodeHeadWeights(matrices, draw(64), draw(5, 64), draw(5))


OP = register(
    Op(
        name="decode_head",
        inputs="Tensor[] feature_maps",
        eager=eager,
        fused=fused,
        fake=_fake,
        supports=supports,
        example=example,
        weights=DecodeHeadWeights,
        candidates={"decode_head": _candidates, "decode_head_project": linear_candidates},
    )
)


def decode_head(feature_maps: Sequence[torch.Tensor], weights: DecodeHeadWeights) -> torch.Tensor:
    """Logits from the maps of all stages, finest first.

    Where a coarse map has a value that is not finite, all pixels of a tile that reads it may come
    out as NaN, not only those that it has a share in.

    Args:
        feature_maps: (B, C_i, H_i, W_i), each best the channels-last view of tokens.

    Returns:
        (B, K, H_1, W_1): contiguous from the kernels, in channels-last memory from the eager twin.
        Without a classifier what it would take, (B, D, H_1, W_1).

    Raises:
        TypeError: a map is not a floating tensor of the dtype of `weights`, or these are no
            `DecodeHeadWeights`.
        ValueError: shapes or devices do not match, or there are no positions.
    """
    check_weights(weights, DecodeHeadWeights)
    if len(feature_maps) != len(weights.weights):
        raise ValueError(
            f"feature_maps: expected {len(weights.weights)} maps as weights, "
            f"got {len(feature_maps)}"
        )
    feature_maps = list(feature_maps)
    finest = feature_maps[0]
    pairs = zip(feature_maps, weights.weights, strict=True)
    for index, (feature_map, weight) in enumerate(pairs):
        name = f"feature_maps[{index}]"
        if not isinstance(feature_map, torch.Tensor) or not feature_map.is_floating_point():
            got = getattr(feature_map, "dtype", type(feature_map).__name__)
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        shape, channels = tuple(feature_map.shape), weight.shape[1]
        if len(shape) != 4 or 0 in shape[2:] or shape[0] != finest.shape[0] or shape[1] != channels:
            raise ValueError(
                f"{name}: expected shape ({finest.shape[0]}, {channels}, height, width), "
                f"got {shape}"
            )
        weights.check_input(name, feature_map)
    return OP(finest.device, feature_maps, weights)

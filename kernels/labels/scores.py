"""Scores of label maps: the highest class's probability at every pixel, without a map of all.

    score(y, x) = max_k softmax_k v(y, x) = 1 / sum_k exp(v_k - max_j v_j)

of the logits v, resized as for `upsample_argmax`. It is an op of its own, so that label maps alone
cost no exponentials and are the same bits with scores and without. All classes of every pixel
count here: there is no shortcut away from borders. A lane of the kernel owns a pixel, and keeps a
maximum and a sum; the twin works in stripes of rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..blocks.bilinear import bilinear_neighbours, row_stripes, upsample_rows
from ..core.checks import KERNEL_DTYPES
from ..core.configurations import Config, look_up, product
from ..core.launch import ceil_div, launch
from ..core.registry import Op, register
from .kernels import upsample_scores_kernel
from .op import check


def highest_probability(logits: torch.Tensor) -> torch.Tensor:
    """The largest softmax over the last axis of `logits`, whose memory is written over."""
    logits -= logits.amax(dim=-1, keepdim=True)
    return logits.exp_().sum(dim=-1).reciprocal_()


def eager(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, K, h, w) -> (B, height, width), in float32, of float64 in float64."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # As for label maps: a class masked by -inf would turn to NaN where it is blended.
    logits = logits.clamp(min=torch.finfo(logits.dtype).min / 4)
    return _of_stripes(logits, height, width, highest_probability)


def highest_blend(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The highest value at every pixel of maps (B, K, h, w) resized to `size`, (B, H, W).

    Of probabilities that are upsampled as they are it is the score.
    """
    return _of_stripes(maps, size[0], size[1], lambda stripe: stripe.amax(dim=-1))


def _of_stripes(
    maps: torch.Tensor, height: int, width: int, reduce: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`reduce` of all classes, its last axis, at every pixel of the resized maps."""
    grid = maps.permute(0, 2, 3, 1).contiguous()
    rows = bilinear_neighbours(height, grid.shape[1], grid.device, grid.dtype)
    batch, _, _, classes = grid.shape
    found = torch.empty(batch, height, width, dtype=grid.dtype, device=grid.device)
    row_bytes = batch * width * classes * grid.element_size()
    for top, bottom in row_stripes(height, row_bytes, grid.device):
        found[:, top:bottom] = reduce(upsample_rows(grid, rows, top, bottom, width))
    return found


def fused(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The kernel: (B, K, h, w) of any strides -> (B, height, width) in float32."""
    batch, classes, *grid = logits.shape
    output = torch.empty(batch, height, width, dtype=torch.float32, device=logits.device)
    if batch == 0:
        return output
    sizes = {"classes": classes, "outputs": output.numel()}
    config = look_up("upsample_scores", logits.device, logits.dtype, sizes)
    blocks = ceil_div(height * width, config["BLOCK"])
    launch(
        upsample_scores_kernel,
        (blocks * batch,),
        *(logits, output, *logits.stride(), *grid, height, width),
        *(grid[0] / height, grid[1] / width, blocks),
        CLASSES=classes,
        **config,
    )
    return output


def supports(logits: torch.Tensor, height: int = 1, width: int = 1) -> str | None:
    """Reason why the kernel cannot take `logits`; None where it can.

    Autocast does not matter: blending is in float32.
    """
    if logits.dtype not in KERNEL_DTYPES:
        return f"there are no kernels for {logits.dtype}"
    return None


def _candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    return product(BLOCK=(64, 128, 256), UNROLL=(1, 4, 8), num_warps=(2, 4))


def example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Five classes, upsampled by 4."""
    return torch.randn(2, 5, 6, 7, device=device).to(dtype), 24, 28


def _fake(logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return torch.empty(logits.shape[0], height, width, dtype=dtype, device=logits.device)


OP = register(
    Op(
        name="upsample_scores",
        inputs="Tensor logits, SymInt height, SymInt width",
        eager=eager,
        fused=fused,
        fake=_fake,
        supports=supports,
        example=example,
        candidates={"upsample_scores": _candidates},
        multiplies=False,
    )
)


def upsample_scores(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The probability of the highest class at every pixel of a map of `size`.

    Equal to `interpolate(logits, size, mode="bilinear", align_corners=False).softmax(1).amax(1)`
    but for rounding, with half-precision logits blended in float32; `upsample_argmax` gives the
    class. A class masked by -inf counts for nothing unless all are. Where a logit that counts is
    NaN, so is the score. Scores carry no gradient.

    Args:
        logits: (B, K, h, w), floating.
        size: (H, W) of the map.

    Returns:
        (B, H, W), float32; of float64 logits float64.

    Raises:
        TypeError: `logits` is not a floating tensor.
        ValueError: `logits` is not 4-D or has no class or no position, or `size` is not two
            positive integers.
    """
    height, width = check(logits, size)
    return OP(logits.device, logits.detach(), height, width)

"""Mix-FFN with its LayerNorm and residual: x + W2 act(dwconv3x3(W1 LN(x) + b1)) + b2.

LayerNorm's affine part is inside W1 and b1 (`fastseg.folding`). The hidden tensor is four times as
wide as x; on a CPU it is made in stripes of rows, so that it stays in the cache and no stripe is
large enough to be mapped and zeroed anew by the allocator at every call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .bilinear import row_stripes
from .residual import add_residual


def mix_ffn(
    x: torch.Tensor,
    height: int,
    width: int,
    *,
    eps: float,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor,
    dwconv_weight: torch.Tensor,
    dwconv_bias: torch.Tensor,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu,
) -> torch.Tensor:
    """`x` plus its Mix-FFN.

    Args:
        x: tokens (B, H * W, C), contiguous.
        eps: of the LayerNorm.
        fc1_weight, fc1_bias: (E, C), (E,).
        dwconv_weight, dwconv_bias: (E, 1, 3, 3), (E,); zero padding of one pixel.
        fc2_weight, fc2_bias: (C, E), (C,).
        activation: elementwise, between the convolution and W2.

    Returns:
        (B, H * W, C).
    """
    batch, _, channels = x.shape
    hidden_channels = fc1_weight.shape[0]
    row_bytes = batch * width * hidden_channels * x.element_size()
    grid = x.view(batch, height, width, channels)
    stripes = row_stripes(height, row_bytes, x.device)
    outputs = []
    for top, bottom in stripes:
        # The convolution looks one row beyond the stripe on either side, where there is one.
        above, below = max(top - 1, 0), min(bottom + 1, height)
        normalized = F.layer_norm(grid[:, above:below], (channels,), eps=eps)
        hidden = F.linear(normalized, fc1_weight, fc1_bias).permute(0, 3, 1, 2)
        hidden = F.conv2d(hidden, dwconv_weight, dwconv_bias, padding=1, groups=hidden_channels)
        hidden = hidden[:, :, top - above : bottom - above].permute(0, 2, 3, 1)
        mixed = F.linear(activation(hidden), fc2_weight, fc2_bias)
        outputs.append(add_residual(mixed, grid[:, top:bottom]))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output.view(batch, height * width, channels)

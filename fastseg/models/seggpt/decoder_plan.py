"""Plan of a decoder: from the features of patches to pixels, in stripes, channels last."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.exporting.folded import ExportedPlan
from fastseg.folding.find import (
    Declined,
    activation_name,
    find,
    find_conv2d,
    find_layer_norm,
    find_leaf,
    find_pointwise,
)
from fastseg.folding.fold import Folded, Part
from fastseg.kernels.blocks.activations import ACTIVATIONS
from fastseg.kernels.core.checks import autocasts
from fastseg.kernels.core.weights import Weights

_ROWS = 14  # of patches whose pixels are made at once
_PIXELS = 32  # rows of them that are convolved at once: 8 MB at 448 columns


class DecoderPlan(ExportedPlan):
    """A decoder, all of it or nothing.

    Args:
        activation: path of the function in it.
    """

    def __init__(self, decoder: Any, activation: str, own: bool = False) -> None:
        self.decoder = decoder
        self._activation = activation
        self.whole = Part(decoder, self._roots(), self._fold, own)

    def _roots(self) -> list[nn.Module]:
        return [self.decoder.decoder_embed, self.decoder.decoder_pred]

    def _fold(self) -> Folded:
        decoder = self.decoder
        width = find_leaf(decoder, "decoder_embed", nn.Linear).weight.shape[0]
        find_conv2d(decoder, "decoder_pred.conv", kernel=3, stride=1, padding=1)
        channels = find_layer_norm(decoder, "decoder_pred.layernorm").weight.shape[0]
        find_pointwise(decoder, "decoder_pred.head")
        patch = find(decoder, "patch_size")
        if not isinstance(patch, int) or width != patch * patch * channels:
            raise Declined(f"decoder_embed gives {width} values for {patch!r} x {patch!r} pixels")
        function = find(decoder, self._activation)
        activation = activation_name(function)
        if activation is None:
            raise Declined(f"{self._activation} is {function}, unknown here")
        return {"patch": patch, "activation": activation}

    def is_current(self) -> bool:
        return list(map(id, self.whole.roots)) == list(map(id, self._roots()))

    def parts(self) -> list[Part]:
        return [self.whole]

    def weights(self) -> Iterator[tuple[str, Weights]]:
        return iter(())

    def runs_by(self) -> str:
        return "eager: there are no kernels for this family"

    def takes(self, hidden_states: torch.Tensor) -> bool:
        """Return whether no autocast is to round these features."""
        return not autocasts(hidden_states.device)

    def run(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, H, W, C) -> pixels (B, 3, H p, W p)."""
        if features.device.type != "cpu" or torch.compiler.is_compiling():
            return self._colours(self._pixels(features))
        return torch.cat([self._in_stripes(one) for one in features.split(1)])

    def _pixels(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, H, W, C) -> (B, H p, W p, channels)."""
        batch, height, width, _ = features.shape
        patch = self.whole.folded()["patch"]
        pixels = self.decoder.decoder_embed(features)
        pixels = pixels.view(batch, height, width, patch, -1).transpose(2, 3)
        return pixels.reshape(batch, height * patch, width * patch, -1)

    def _colours(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, H, W, channels) -> (B, 3, H, W), in channels-last memory."""
        head = self.decoder.decoder_pred
        norm, last = head.layernorm, head.head
        x = head.conv(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        x = ACTIVATIONS[self.whole.folded()["activation"]](x)
        return F.linear(x, last.weight.flatten(1), last.bias).permute(0, 3, 1, 2)

    def _in_stripes(self, features: torch.Tensor) -> torch.Tensor:
        """The same of one image, without the pixels of all channels in memory at once."""
        stripes: list[torch.Tensor] = []
        above = None  # the last two rows of pixels of what was made before
        for rows in features.split(_ROWS, dim=1):
            pixels = self._pixels(rows)
            if above is not None:
                pixels = torch.cat([above, pixels], dim=1)
            # The last row waits for the one below it.
            for start in range(int(above is not None), pixels.shape[1] - 1, _PIXELS):
                stop = min(start + _PIXELS, pixels.shape[1] - 1)
                top = max(start - 1, 0)
                colours = self._colours(pixels[:, top : stop + 1])
                stripes.append(colours[:, :, start - top : stop - top])
            above = pixels[:, -2:].clone()
        assert above is not None
        return torch.cat([*stripes, self._colours(above)[:, :, -1:]], dim=2)

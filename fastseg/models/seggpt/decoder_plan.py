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
from fastseg.kernels.blocks.activations import activated
from fastseg.kernels.blocks.onednn import dense
from fastseg.kernels.core.checks import autocasts
from fastseg.kernels.core.weights import Weights

from .exported import FoldedSegGpt

# Patches whose pixels are made at once, 59 MB of them at the published widths. The product copies
# or reads its 268 MB of weights each time, so few at once are slow.
_PATCHES = 900
_ROWS = 32  # of pixels that are convolved at once, 4 MB


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

    def folded_model(self, model: nn.Module) -> FoldedSegGpt:
        return FoldedSegGpt.of(model, self)

    def takes(self, hidden_states: torch.Tensor) -> bool:
        """Return whether no autocast is to round these features."""
        return not autocasts(hidden_states.device)

    def run(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, H, W, C) -> pixels (B, 3, H p, W p)."""
        if features.device.type != "cpu" or torch.compiler.is_compiling():
            return self._colours(self._in_rows(self._pixels(features)), padding=1)
        return torch.cat([self._in_stripes(one) for one in features.split(1)])

    def _pixels(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, H, W, C) -> channels of their pixels (B, H, W, p p channels)."""
        embed = self.decoder.decoder_embed
        return dense(features, embed.weight, embed.bias)

    def _in_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of patches (B, H, W, p p channels) -> of rows (B, H p, W p, channels)."""
        batch, height, width, _ = pixels.shape
        patch = self.whole.folded()["patch"]
        pixels = pixels.view(batch, height, width, patch, -1).transpose(2, 3)
        return pixels.reshape(batch, height * patch, width * patch, -1)

    def _colours(self, pixels: torch.Tensor, padding: int) -> torch.Tensor:
        """(B, H, W, channels) -> (B, 3, H, W), in channels-last memory.

        Args:
            padding: rows of zeros above and below; without them H is 2 less.
        """
        head = self.decoder.decoder_pred
        conv, norm, last = head.conv, head.layernorm, head.head
        x = F.conv2d(pixels.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=(padding, 1))
        x = F.layer_norm(
            x.permute(0, 2, 3, 1), norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )
        x = activated(self.whole.folded()["activation"], x)
        return F.linear(x, last.weight.flatten(1), last.bias).permute(0, 3, 1, 2)

    def _in_stripes(self, features: torch.Tensor) -> torch.Tensor:
        """The same of one image, without the pixels of all channels in memory at once."""
        _, height, width, _ = features.shape
        stripes = -(-height * width // _PATCHES)
        at_once = max(_ROWS // self.whole.folded()["patch"], 1)
        colours: list[torch.Tensor] = []
        above = border = None  # rows of pixels: the last two of those before, one of zeros
        for rows in features.split(-(-height // stripes), dim=1):
            for some in self._pixels(rows).split(at_once, dim=1):
                pixels = self._in_rows(some)
                if above is None:
                    above = border = torch.zeros_like(pixels[:, :1])
                pixels = torch.cat([above, pixels], dim=1)
                colours.append(self._colours(pixels, padding=0))  # its last row waits
                above = pixels[:, -2:]
        assert above is not None
        assert border is not None
        colours.append(self._colours(torch.cat([above, border], dim=1), padding=0))
        return torch.cat(colours, dim=2)

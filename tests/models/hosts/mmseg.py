"""SegFormer as open-mmlab's mmsegmentation 1.x builds it: its modules' names, tree and epsilons.

The library itself needs compiled mmcv ops and OpenCV. Checked once against the real one,
mmsegmentation 1.2.2 with mmcv 2.1.0 (those imports stubbed): with its state_dict, which fits
strictly, the encoder and the head here give its outputs to the bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .nvlabs import ConvModule, DropPath, EncoderDecoder

__all__ = ["EncoderDecoder", "MixVisionTransformer", "SegformerHead"]

EPS = 1e-6  # of every norm, those of patch embeddings and of the reduction too


class Conv2d(nn.Conv2d):
    """mmcv's own, which is torch's but for empty inputs. So are the two containers below."""

    def forward(self, x):
        return super().forward(x)


class ModuleList(nn.ModuleList):
    pass


class Sequential(nn.Sequential):
    pass


def nlc_to_nchw(x, hw_shape):
    return x.transpose(1, 2).reshape(x.shape[0], -1, *hw_shape)


def nchw_to_nlc(x):
    return x.flatten(2).transpose(1, 2).contiguous()


class PatchEmbed(nn.Module):
    def __init__(self, in_channels: int, embed_dims: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.adap_padding = None
        self.projection = nn.Conv2d(
            in_channels, embed_dims, kernel_size, stride, padding=kernel_size // 2
        )
        self.norm = nn.LayerNorm(embed_dims, eps=EPS)

    def forward(self, x):
        x = self.projection(x)
        out_size = (x.shape[2], x.shape[3])
        return self.norm(x.flatten(2).transpose(1, 2)), out_size


class EfficientMultiheadAttention(nn.Module):
    """torch's own attention, not batch-first, on a reduced grid of keys and values."""

    def __init__(
        self, embed_dims: int, num_heads: int, drop: float, drop_path: float, sr_ratio: int
    ) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.batch_first = True
        self.attn = nn.MultiheadAttention(embed_dims, num_heads, dropout=drop, bias=True)
        self.proj_drop = nn.Dropout(drop)
        self.dropout_layer = DropPath(drop_path)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = Conv2d(embed_dims, embed_dims, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(embed_dims, eps=EPS)

    def forward(self, x, hw_shape, identity=None):
        reduced = x
        if self.sr_ratio > 1:
            reduced = self.norm(nchw_to_nlc(self.sr(nlc_to_nchw(x, hw_shape))))
        if identity is None:
            identity = x
        query, reduced = x.transpose(0, 1), reduced.transpose(0, 1)
        out = self.attn(query=query, key=reduced, value=reduced)[0].transpose(0, 1)
        return identity + self.dropout_layer(self.proj_drop(out))


class MixFFN(nn.Module):
    """1x1 convolutions in the place of linear layers; the activation has two names."""

    def __init__(self, embed_dims: int, channels: int, drop: float, drop_path: float, act) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.feedforward_channels = channels
        self.activate = act()
        dropout = nn.Dropout(drop)
        self.layers = Sequential(
            Conv2d(embed_dims, channels, kernel_size=1),
            Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels),
            self.activate,
            dropout,
            Conv2d(channels, embed_dims, kernel_size=1),
            dropout,
        )
        self.dropout_layer = DropPath(drop_path)

    def forward(self, x, hw_shape, identity=None):
        out = nchw_to_nlc(self.layers(nlc_to_nchw(x, hw_shape)))
        return (x if identity is None else identity) + self.dropout_layer(out)


class TransformerEncoderLayer(nn.Module):
    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        channels: int,
        drop: float,
        drop_path: float,
        sr_ratio: int,
        act,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dims, eps=EPS)
        self.attn = EfficientMultiheadAttention(embed_dims, num_heads, drop, drop_path, sr_ratio)
        self.norm2 = nn.LayerNorm(embed_dims, eps=EPS)
        self.ffn = MixFFN(embed_dims, channels, drop, drop_path, act)
        self.with_cp = False

    def forward(self, x, hw_shape):
        x = self.attn(self.norm1(x), hw_shape, identity=x)
        return self.ffn(self.norm2(x), hw_shape, identity=x)


class MixVisionTransformer(nn.Module):
    """Pixels (B, 3, H, W) to a list of the maps of the stages in `out_indices`."""

    def __init__(
        self,
        embed_dims=8,
        num_layers=(1, 1, 1, 1),
        num_heads=(1, 2, 5, 8),
        sr_ratios=(8, 4, 2, 1),
        out_indices=(0, 1, 2, 3),
        mlp_ratio=4,
        drop_rate=0.0,
        drop_path_rate=0.1,
        act=nn.GELU,
    ) -> None:
        super().__init__()
        self.out_indices = out_indices
        self.num_stages = len(num_layers)
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(num_layers)).tolist())
        self.layers = ModuleList()
        in_channels = 3
        for stage, depth in enumerate(num_layers):
            dims = embed_dims * num_heads[stage]
            kernel_size, stride = (7, 4) if stage == 0 else (3, 2)
            layers = [
                TransformerEncoderLayer(
                    dims,
                    num_heads[stage],
                    mlp_ratio * dims,
                    drop_rate,
                    next(drop_paths),
                    sr_ratios[stage],
                    act,
                )
                for _ in range(depth)
            ]
            self.layers.append(
                ModuleList(
                    [
                        PatchEmbed(in_channels, dims, kernel_size, stride),
                        ModuleList(layers),
                        nn.LayerNorm(dims, eps=EPS),
                    ]
                )
            )
            in_channels = dims

    def forward(self, x):
        outs = []
        for index, (embed, blocks, norm) in enumerate(self.layers):
            x, hw_shape = embed(x)
            for block in blocks:
                x = block(x, hw_shape)
            x = nlc_to_nchw(norm(x), hw_shape)
            if index in self.out_indices:
                outs.append(x)
        return outs


class SegformerHead(nn.Module):
    """Another network than the paper's: a ReLU stands between a projection and its upsampling."""

    def __init__(
        self,
        in_channels=(8, 16, 40, 64),
        channels=24,
        num_classes=5,
        dropout_ratio=0.1,
        norm=nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.in_index = [0, 1, 2, 3]
        self.interpolate_mode = "bilinear"
        self.align_corners = False
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout_ratio)
        self.convs = nn.ModuleList(ConvModule(width, channels, norm) for width in in_channels)
        self.fusion_conv = ConvModule(len(in_channels) * channels, channels, norm)

    def forward(self, inputs):
        maps = [inputs[index] for index in self.in_index]
        outs = [
            F.interpolate(
                conv(feature_map),
                size=maps[0].shape[2:],
                mode=self.interpolate_mode,
                align_corners=self.align_corners,
            )
            for conv, feature_map in zip(self.convs, maps, strict=True)
        ]
        return self.conv_seg(self.dropout(self.fusion_conv(torch.cat(outs, dim=1))))

"""SegFormer as the paper's authors (NVlabs) build it: their modules' names, tree and epsilons.

Their code wants mmcv 1.x, which does not install beside a torch of today. So this is written from
the paper, and from the names in the published checkpoints. The encoder's numbers agree with
segmentation_models_pytorch 0.6.0, whose encoder is the authors' (`test_smp_models.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

BLOCK_EPS = 1e-6  # and of the norm that ends a stage; the other norms have torch's 1e-5


class DWConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, H, W):
        grid = x.transpose(1, 2).reshape(x.shape[0], -1, H, W)
        return self.dwconv(grid).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float, act: type[nn.Module]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DWConv(hidden)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x, H, W):
        x = self.drop(self.act(self.dwconv(self.fc1(x), H, W)))
        return self.drop(self.fc2(x))


class Attention(nn.Module):
    """Queries from all tokens, keys and values of one linear layer from a reduced grid."""

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool, drop: float, sr_ratio: int
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.sr_ratio = sr_ratio
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x, H, W):
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, -1).transpose(1, 2)
        reduced = x
        if self.sr_ratio > 1:
            grid = x.transpose(1, 2).reshape(B, C, H, W)
            reduced = self.norm(self.sr(grid).flatten(2).transpose(1, 2))
        # (2, B, heads, N_kv, C / heads)
        k, v = (
            self.kv(reduced)
            .reshape(B, -1, 2, self.num_heads, C // self.num_heads)
            .permute(2, 0, 3, 1, 4)
        )
        weights = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        context = (weights @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(context))


class DropPath(nn.Module):
    """Stochastic depth, as timm's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int,
        qkv_bias: bool,
        drop: float,
        drop_path: float,
        sr_ratio: int,
        act: type[nn.Module],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias, drop, sr_ratio)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.mlp = Mlp(dim, mlp_ratio * dim, drop, act)

    def forward(self, x, H, W):
        x = x + self.drop_path(self.attn(self.norm1(x), H, W))
        return x + self.drop_path(self.mlp(self.norm2(x), H, W))


class OverlapPatchEmbed(nn.Module):
    def __init__(self, patch_size: int, stride: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride, padding=patch_size // 2)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x):
        x = self.proj(x)
        H, W = x.shape[2:]
        return self.norm(x.flatten(2).transpose(1, 2)), H, W


class MixVisionTransformer(nn.Module):
    """Pixels (B, 3, H, W) to a list of four maps."""

    def __init__(
        self,
        embed_dims=(8, 16, 40, 64),
        num_heads=(1, 2, 5, 8),
        mlp_ratios=(4, 4, 4, 4),
        qkv_bias=True,
        depths=(1, 1, 1, 1),
        sr_ratios=(8, 4, 2, 1),
        drop_rate=0.0,
        drop_path_rate=0.1,
        act=nn.GELU,
    ) -> None:
        super().__init__()
        self.depths = list(depths)
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        in_chans = 3
        for stage, dim in enumerate(embed_dims):
            patch_size, stride = (7, 4) if stage == 0 else (3, 2)
            embed = OverlapPatchEmbed(patch_size, stride, in_chans, dim)
            blocks = nn.ModuleList(
                Block(
                    dim,
                    num_heads[stage],
                    mlp_ratios[stage],
                    qkv_bias,
                    drop_rate,
                    next(drop_paths),
                    sr_ratios[stage],
                    act,
                )
                for _ in range(depths[stage])
            )
            setattr(self, f"patch_embed{stage + 1}", embed)
            setattr(self, f"block{stage + 1}", blocks)
            setattr(self, f"norm{stage + 1}", nn.LayerNorm(dim, eps=BLOCK_EPS))
            in_chans = dim

    def forward_features(self, x):
        outs = []
        for stage in range(1, 5):
            x, H, W = getattr(self, f"patch_embed{stage}")(x)
            for block in getattr(self, f"block{stage}"):
                x = block(x, H, W)
            x = getattr(self, f"norm{stage}")(x)
            x = x.reshape(x.shape[0], H, W, -1).permute(0, 3, 1, 2).contiguous()
            outs.append(x)
        return outs

    def forward(self, x):
        return self.forward_features(x)


class MLP(nn.Module):
    def __init__(self, input_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(input_dim, embed_dim)

    def forward(self, x):
        return self.proj(x.flatten(2).transpose(1, 2))


class ConvModule(nn.Module):
    """Convolution, norm and activation, named as mmcv's."""

    def __init__(self, in_channels: int, out_channels: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.bn = norm(out_channels)
        self.activate = nn.ReLU()

    def forward(self, x):
        return self.activate(self.bn(self.conv(x)))


class SegFormerHead(nn.Module):
    """A list of four maps, finest first, to logits at the first one's size.

    `conv_seg` comes with the base class of all heads and is never called.
    """

    def __init__(
        self,
        in_channels=(8, 16, 40, 64),
        embedding_dim=24,
        num_classes=5,
        dropout_ratio=0.1,
        norm=nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.in_index = [0, 1, 2, 3]
        self.align_corners = False
        self.conv_seg = nn.Conv2d(embedding_dim, num_classes, kernel_size=1)
        self.dropout = nn.Dropout2d(dropout_ratio)
        for stage in (4, 3, 2, 1):
            setattr(self, f"linear_c{stage}", MLP(in_channels[stage - 1], embedding_dim))
        self.linear_fuse = ConvModule(4 * embedding_dim, embedding_dim, norm)
        self.linear_pred = nn.Conv2d(embedding_dim, num_classes, kernel_size=1)

    def forward(self, inputs):
        maps = [inputs[index] for index in self.in_index]
        size = maps[0].shape[2:]
        projected = []
        for stage in (4, 3, 2, 1):
            c = maps[stage - 1]
            tokens = getattr(self, f"linear_c{stage}")(c)
            grid = tokens.transpose(1, 2).reshape(c.shape[0], -1, *c.shape[2:])
            if stage > 1:
                grid = F.interpolate(
                    grid, size=size, mode="bilinear", align_corners=self.align_corners
                )
            projected.append(grid)
        return self.linear_pred(self.dropout(self.linear_fuse(torch.cat(projected, dim=1))))


class EncoderDecoder(nn.Module):
    """What mmseg calls a segmentor: `backbone` and `decode_head`."""

    def __init__(self, backbone: nn.Module, decode_head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head

    def forward(self, x):
        return self.decode_head(self.backbone(x))

"""Copies of NVlabs' SegFormer as people pass them on: the same names of most parts, small changes.

Written anew from the names and the differences of sithu31296/semantic-segmentation (`head` for
`num_heads`, GELU as a function, forward alone, a tuple of maps), bubbliiiing/segformer-pytorch
(forward alone, a list) and lhoyer/DAFormer (projections in a ModuleDict, the finest map first).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import nvlabs


class Attention(nn.Module):
    def __init__(self, dim: int, head: int, sr_ratio: int) -> None:
        super().__init__()
        self.head = head
        self.sr_ratio = sr_ratio
        self.scale = (dim // head) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x, H, W):
        B, N, C = x.shape
        q = self.q(x).unflatten(2, (self.head, -1)).transpose(1, 2)
        if self.sr_ratio > 1:
            x = self.norm(self.sr(x.transpose(1, 2).reshape(B, C, H, W)).flatten(2).mT)
        k, v = self.kv(x).reshape(B, -1, 2, self.head, C // self.head).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, function=F.gelu) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Module()
        self.dwconv.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self._function = function

    def forward(self, x, H, W):
        grid = self.fc1(x).transpose(1, 2).unflatten(2, (H, W))
        return self.fc2(self._function(self.dwconv.dwconv(grid).flatten(2).transpose(1, 2)))


class Block(nn.Module):
    def __init__(self, dim: int, head: int, sr_ratio: int, function=F.gelu) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, head, sr_ratio)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim, function)

    def forward(self, x, H, W):
        x = x + self.attn(self.norm1(x), H, W)
        return x + self.mlp(self.norm2(x), H, W)


class MiT(nn.Module):
    """As sithu31296's; `embed` is how the patch embeddings are called."""

    def __init__(
        self, unit: int = 8, depths=(2, 1, 1, 1), embed: str = "patch_embed", function=F.gelu
    ) -> None:
        super().__init__()
        self.embed = embed
        channels = 3
        for stage, (head, sr_ratio) in enumerate(zip((1, 2, 5, 8), (8, 4, 2, 1), strict=True)):
            dim, (patch, stride) = unit * head, (7, 4) if stage == 0 else (3, 2)
            embedding = nvlabs.OverlapPatchEmbed(patch, stride, channels, dim)
            blocks = (Block(dim, head, sr_ratio, function) for _ in range(depths[stage]))
            self.add_module(f"{embed}{stage + 1}", embedding)
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim))
            channels = dim

    def forward(self, x):
        maps = []
        for stage in range(1, 5):
            x, H, W = self.get_submodule(f"{self.embed}{stage}")(x)
            for block in self.get_submodule(f"block{stage}"):
                x = block(x, H, W)
            x = self.get_submodule(f"norm{stage}")(x).unflatten(1, (H, W)).permute(0, 3, 1, 2)
            maps.append(x)
        return tuple(maps)


class ListMiT(nn.Module):
    """As bubbliiiing's: NVlabs' own modules, `num_heads` too, under another forward."""

    def __init__(self, unit: int = 8, depths=(2, 1, 1, 1)) -> None:
        super().__init__()
        original = nvlabs.MixVisionTransformer(
            [unit * heads for heads in (1, 2, 5, 8)], (1, 2, 5, 8), depths=depths
        )
        for name, module in original.named_children():
            self.add_module(name, module)

    def forward(self, x):
        return nvlabs.MixVisionTransformer.forward_features(self, x)


class DAFormerHead(nn.Module):
    """DAFormer's copy of SegFormer's head."""

    def __init__(self, in_channels=(8, 16, 40, 64), embedding_dim=24, num_classes=5) -> None:
        super().__init__()
        self.in_index = [0, 1, 2, 3]
        self.conv_seg = nn.Conv2d(embedding_dim, num_classes, 1)
        self.dropout = nn.Dropout2d(0.1)
        projections = zip(self.in_index, in_channels, strict=True)
        self.linear_c = nn.ModuleDict(
            {str(index): nvlabs.MLP(channels, embedding_dim) for index, channels in projections}
        )
        self.linear_fuse = nvlabs.ConvModule(4 * embedding_dim, embedding_dim, nn.BatchNorm2d)
        self.linear_pred = nn.Conv2d(embedding_dim, num_classes, 1)

    def forward(self, inputs):
        size = inputs[0].shape[2:]
        projected = []
        for index in self.in_index:
            c = self.linear_c[str(index)](inputs[index]).transpose(1, 2)
            c = c.unflatten(2, inputs[index].shape[2:])
            if index != 0:
                c = F.interpolate(c, size=size, mode="bilinear", align_corners=False)
            projected.append(c)
        return self.linear_pred(self.dropout(self.linear_fuse(torch.cat(projected, dim=1))))

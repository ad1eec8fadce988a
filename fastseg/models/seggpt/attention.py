"""Attention with decomposed relative positions, without the scores of all heads in memory.

A query's score of a key is `q k s + q R_y + q R_x`: with a row of one table for how many rows of
the grid they are apart, and one of another for how many columns. Two forms of it are here, which
are the same numbers but for rounding:

- In blocks of some rows of the grid and one head, whose scores stay in the cache: the terms, the
  product, the softmax and the product with the values.
- As the product of longer vectors, `[q s, q R_y, q R_x] [k, e_y, e_x]` with unit vectors e, by
  PyTorch's scaled dot product attention: for GPUs, and for half precision on CPUs.

docs/seggpt.md has the maths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_BLOCK = 1_500_000  # bytes of its scores: they stay in a core's own cache, or nearly


def table(relative: torch.Tensor) -> torch.Tensor:
    """(2 S - 1, d) vectors of distances from 1 - S to S - 1 -> (S, d, S): [query, :, key]."""
    side = (len(relative) + 1) // 2
    places = torch.arange(side, device=relative.device)
    return relative[places[:, None] - places + side - 1].transpose(1, 2).contiguous()


def fits_blocks(like: torch.Tensor) -> bool:
    """Return whether attention on such tensors runs in blocks."""
    return like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of streams over a grid of H x W tokens.

    Args:
        query: (B, heads, h W, d), of h rows of the grid.
        key, value: (B, heads, H W, d).
        rows, columns: tables (h, d, H), of the rows that there are queries of, and (W, d, W).
        scale: of the products of queries and keys.

    Returns:
        (B, h W, heads, d).
    """
    if fits_blocks(query) and not torch.compiler.is_exporting():
        out: torch.Tensor = torch.ops.fastseg.attend_in_blocks(
            query, key, value, rows, columns, scale
        )
        return out
    return _by_longer_vectors(query, key, value, rows, columns, scale)


def _terms(
    query: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms (n, h W, H) and (n, h W, W) of the scores of queries (n, h W, d)."""
    height, width = len(rows), len(columns)
    n, tokens, d = query.shape
    grid = query.view(n, height, width, d)
    by_row = torch.bmm(grid.transpose(0, 1).reshape(height, n * width, d), rows)
    by_row = by_row.view(height, n, width, -1).transpose(0, 1).reshape(n, tokens, -1)
    by_column = torch.bmm(grid.permute(2, 0, 1, 3).reshape(width, n * height, d), columns)
    by_column = by_column.view(width, n, height, width).permute(1, 2, 0, 3)
    return by_row, by_column.reshape(n, tokens, width)


def _by_longer_vectors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    batch, heads, tokens, d = query.shape
    height, width = rows.shape[2], len(columns)
    flat = query.reshape(batch * heads, tokens, d)
    terms = [term.view(batch, heads, tokens, -1) for term in _terms(flat, rows, columns)]
    row_of = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, 0)
    column_of = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)
    # Fast kernels want keys and values of one width, a multiple of 8.
    rest = -(d + height + width) % 8
    units = F.pad(torch.cat([row_of, column_of], dim=1), (0, rest)).expand(batch, heads, -1, -1)
    zeros = query.new_zeros(()).expand(batch, heads, tokens, rest)
    out = F.scaled_dot_product_attention(
        torch.cat([query * scale, *terms, zeros], -1),
        torch.cat([key, units], -1),
        F.pad(value, (0, units.shape[-1])),
        scale=1.0,
    )
    return out[..., :d].transpose(1, 2)


def _in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    batch, heads, tokens, d = query.shape
    height, width = rows.shape[2], len(columns)
    keys = height * width
    step = _BLOCK // (width * keys * query.element_size())
    step = width * min(max(step, 1), height)  # tokens of whole rows
    out = query.new_empty(batch, tokens, heads, d)
    memory = query.new_empty(step * keys)
    for q, k, v, to in zip(query, key, value, out, strict=True):
        q = q.contiguous()
        by_row, by_column = _terms(q, rows, columns)
        for head in range(heads):
            of_keys, of_values = k[head].contiguous().t(), v[head].contiguous()
            for start in range(0, tokens, step):
                of = slice(start, min(start + step, tokens))
                bias = memory[: (of.stop - start) * keys].view(-1, height, width)
                torch.add(by_row[head, of, :, None], by_column[head, of, None, :], out=bias)
                scores = bias.view(-1, keys)
                torch.addmm(scores, q[head, of], of_keys, alpha=scale, out=scores)
                torch.softmax(scores, -1, out=scores)
                torch.mm(scores, of_values, out=to[of, head])
    return out


# One operator, so that graphs hold its loops whole.
_LIBRARY = torch.library.Library("fastseg", "FRAGMENT")
_LIBRARY.define(
    "attend_in_blocks(Tensor query, Tensor key, Tensor value, Tensor rows, Tensor columns, "
    "float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("attend_in_blocks", _in_blocks, "CPU")
torch.library.register_fake(
    "fastseg::attend_in_blocks",
    lambda query, *others: query.new_empty(query.transpose(1, 2).shape),
    lib=_LIBRARY,
)

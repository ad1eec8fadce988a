"""The module tree of fastseg's SegFormers, which is that of transformers 4: where tensors go.

Names of another library's modules in memory are those of its files, so one table, `LayerNames`,
serves `accelerate` and checkpoints.
"""

from __future__ import annotations

from fastseg.checkpoints.translation import Table

from ..hosts.names import TRANSFORMERS_EMBED, TRANSFORMERS_OLD, EmbedNames, LayerNames

BASE = "segformer."
ENCODER = BASE + "encoder."

_LAYERS = (
    *("attention_norm", "query", "key", "value", "output", "reduction", "reduction_norm"),
    *("ffn_norm", "fc1", "dwconv", "fc2"),
)


def block_table(host: LayerNames) -> Table:
    """Prefixes of tensors in a layer of a host, and those in a layer of fastseg's."""
    own = TRANSFORMERS_OLD
    query, key, value = (f"{path}." for path in (own.query, own.key, own.value))
    table = {
        f"{getattr(host, layer)}.": [f"{getattr(own, layer)}."]
        for layer in _LAYERS
        if getattr(host, layer)
    }
    if host.key_value:
        table[f"{host.key_value}."] = [key, value]
    if host.in_projection:  # of an nn.MultiheadAttention
        table[f"{host.in_projection}.in_proj_"] = [query, key, value]
    return table


def embedding_table(host: EmbedNames) -> Table:
    """Prefixes of tensors in a patch embedding of a host, and those in one of fastseg's."""
    own = TRANSFORMERS_EMBED
    return {f"{host.proj}.": [f"{own.proj}."], f"{host.norm}.": [f"{own.norm}."]}

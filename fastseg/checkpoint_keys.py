"""Tensor names in checkpoint files, brought to the names of fastseg's modules.

transformers has two module trees for SegFormer. fastseg's modules carry the older one, which every
`save_pretrained` writes; a raw `torch.save(model.state_dict())` of transformers 5.9 and later has
the newer one. DistributedDataParallel and torch.compile put a prefix before all names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BASE_PREFIX = "segformer."
# The top-level modules that a class of the family may have besides the encoder.
HEADS = frozenset(("decode_head", "classifier"))
_WRAPPERS = ("module.", "_orig_mod.")

_NEW_STAGE = re.compile(r"stages\.(\d+)\.(?:blocks\.(\d+)|(patch_embeddings|layer_norm))\.(.+)")
_NEW_IN_BLOCK = (
    ("attention.q_proj.", "attention.self.query."),
    ("attention.k_proj.", "attention.self.key."),
    ("attention.v_proj.", "attention.self.value."),
    ("attention.o_proj.", "attention.output.dense."),
    ("attention.sequence_reduction.sequence_reduction.", "attention.self.sr."),
    ("attention.sequence_reduction.layer_norm.", "attention.self.layer_norm."),
    ("mlp.fc1.", "mlp.dense1."),
    ("mlp.fc2.", "mlp.dense2."),
    ("layernorm_before.", "layer_norm_1."),
    ("layernorm_after.", "layer_norm_2."),
)
_NEW_LINEAR = "decode_head.linear_projections."


def full_names(names: Iterable[str]) -> dict[str, str]:
    """From each name in a file to its name in a model with a head.

    Encoder tensors come out as `segformer.encoder.…` whatever stood before `encoder.` or
    `stages.`; names that are not a SegFormer's come out unchanged.
    """
    names = list(names)
    wrapper = _wrapper_prefix(names)
    return {name: _full_name(name.removeprefix(wrapper)) for name in names}


def _wrapper_prefix(names: list[str]) -> str:
    """What DistributedDataParallel, torch.compile or both put before every name."""
    prefix = ""
    while names:
        longer = [
            prefix + wrapper
            for wrapper in _WRAPPERS
            if all(name.startswith(prefix + wrapper) for name in names)
        ]
        if not longer:
            break
        prefix = longer[0]
    return prefix


def _full_name(name: str) -> str:
    if name.startswith(_NEW_LINEAR):
        return "decode_head.linear_c." + name.removeprefix(_NEW_LINEAR)
    encoder_name = name.removeprefix(BASE_PREFIX)
    if match := _NEW_STAGE.fullmatch(encoder_name):
        stage, block, part, rest = match.groups()
        if part is not None:
            encoder_name = f"encoder.{part}.{stage}.{rest}"
        else:
            for new, old in _NEW_IN_BLOCK:
                if rest.startswith(new):
                    rest = old + rest.removeprefix(new)
                    break
            encoder_name = f"encoder.block.{stage}.{block}.{rest}"
    return BASE_PREFIX + encoder_name if encoder_name.startswith("encoder.") else name


def class_name_of(names: Iterable[str]) -> str:
    """The model class that a file with these names (as from `full_names`) was saved from."""
    parts = {name.partition(".")[0] for name in names}
    if "decode_head" in parts:
        return "SegformerForSemanticSegmentation"
    if "classifier" in parts:
        return "SegformerForImageClassification"
    return "SegformerModel"

"""The published sizes: mit_b0 to mit_b5 and segformer_b0 to segformer_b5.

Depths and widths: Xie et al., SegFormer, arXiv:2105.15203, table 6.
"""

from __future__ import annotations

from typing import Any

from .config import SegformerConfig
from .modeling import (
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)

_WIDTHS_B0 = (32, 64, 160, 256)
_WIDTHS = (64, 128, 320, 512)

# depths, hidden_sizes, width of the decode head in the paper
_SIZES = {
    "b0": ((2, 2, 2, 2), _WIDTHS_B0, 256),
    "b1": ((2, 2, 2, 2), _WIDTHS, 256),
    "b2": ((3, 4, 6, 3), _WIDTHS, 768),
    "b3": ((3, 4, 18, 3), _WIDTHS, 768),
    "b4": ((3, 8, 27, 3), _WIDTHS, 768),
    "b5": ((3, 6, 40, 3), _WIDTHS, 768),
}

PRESETS = tuple(f"{family}_{size}" for family in ("mit", "segformer") for size in _SIZES)


def preset_config(
    name: str,
    num_classes: int | None = None,
    projection_filters: int | None = None,
    **kwargs: object,
) -> SegformerConfig:
    """The configuration of a preset: arguments and errors as of `fastseg.from_preset`."""
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
    family, size = name.split("_")
    depths, hidden_sizes, decoder_hidden_size = _SIZES[size]
    fields: dict[str, Any] = {
        "depths": depths,
        "hidden_sizes": hidden_sizes,
        "decoder_hidden_size": decoder_hidden_size,
    }
    if "num_labels" not in kwargs and "id2label" not in kwargs:
        fields["num_labels"] = 1000 if family == "mit" else 150
    given = {"num_labels": num_classes, "decoder_hidden_size": projection_filters}
    for field, value in given.items():
        if value is not None and field in kwargs:
            raise TypeError(f"{field}: given twice, as {kwargs[field]} and as {value}")
        if value is not None:
            fields[field] = value
    return SegformerConfig(**(fields | kwargs))


def from_preset(
    name: str,
    num_classes: int | None = None,
    projection_filters: int | None = None,
    **kwargs: object,
) -> SegformerForSemanticSegmentation | SegformerForImageClassification | SegformerModel:
    """A SegFormer with newly drawn weights: see `fastseg.from_preset`."""
    if name in PRESETS and name.startswith("mit") and num_classes == 0:
        return SegformerModel(preset_config(name, None, projection_filters, **kwargs))
    config = preset_config(name, num_classes, projection_filters, **kwargs)
    if name.startswith("mit"):
        return SegformerForImageClassification(config)
    return SegformerForSemanticSegmentation(config)

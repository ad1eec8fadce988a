"""Multiply-adds of a SegFormer's forward, pixels to logits, counted from its configuration.

`usual` is the model as the paper and other libraries compute it, `folded` what fastseg computes.
What the fold takes out: with one head the query and output projections of all tokens, which the
few reduced tokens absorb, and in the decode head the fuse convolution, which joins the projections
of the stages at their own resolution.

`published` gives the counts of the paper: 8.4, 15.9, 62.4, 79.0 and 95.7 G at 512x512 for B0 to B4
and 183.3 G at 640x640 for B5, with 150 classes. They are those of the authors' tools/get_flops.py:
mmcv 1.2.7 and the products of the attention. mmcv takes one operation for each bias that a
convolution adds and for each element of a ReLU; without these, one in a thousand, B2, B4 and B5
come to 62.3, 95.6 and 183.1 G. It leaves out, as all forms here, biases of linear layers,
LayerNorm, SyncBN, softmax, GELU and interpolation.

    python -m bench.flops    # the three forms of every variant at 512x512
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fastseg import SegformerConfig
from fastseg.models.segformer.presets import preset_config

from .arguments import VARIANTS

HEAD = "head"


class Term(NamedTuple):
    """The multiply-adds of one kind of product, in all layers of a stage."""

    stage: str  # "1", "2", ... of the encoder, or HEAD for what runs on the finest grid
    kind: str  # "patch embed", "attention", "mix-ffn" or "decode head"
    part: str
    multiply_adds: int


class _Stage(NamedTuple):
    name: str
    tokens: int
    reduced: int  # tokens that make keys and values
    inputs: int  # channels of what the patch embedding reads
    channels: int
    hidden: int  # channels inside the Mix-FFN
    patch: int  # side of the patch embedding's kernel
    ratio: int  # of the spatial reduction
    heads: int
    depth: int


def usual(config: SegformerConfig, size: tuple[int, int], batch: int = 1) -> list[Term]:
    """The terms of the usual model, for images of `size` (H, W), of any size that it takes."""
    stages = _stages(config, size)
    terms = [term for stage in stages for term in _encoder_terms(stage, fold=False)]
    return _times(batch, [*terms, *_head_terms(config, stages, fold=False)])


def folded(config: SegformerConfig, size: tuple[int, int], batch: int = 1) -> list[Term]:
    """The terms of the folded model."""
    stages = _stages(config, size)
    terms = [term for stage in stages for term in _encoder_terms(stage, fold=True)]
    return _times(batch, [*terms, *_head_terms(config, stages, fold=True)])


def published(config: SegformerConfig, size: tuple[int, int], batch: int = 1) -> list[Term]:
    """`usual`, and what the counter of the paper takes beside multiply-adds."""
    stages = _stages(config, size)
    beside = [
        term
        for stage in stages
        for term in (
            Term(stage.name, "patch embed", "bias", stage.tokens * stage.channels),
            Term(stage.name, "attention", "sr bias", _reduced_by_sr(stage) * stage.channels),
            Term(stage.name, "mix-ffn", "dwconv bias", stage.depth * stage.tokens * stage.hidden),
        )
    ]
    finest = stages[0].tokens
    beside.append(Term(HEAD, "decode head", "relu", finest * config.decoder_hidden_size))
    beside.append(Term(HEAD, "decode head", "classifier bias", finest * config.num_labels))
    return usual(config, size, batch) + _times(batch, beside)


def total(terms: Iterable[Term]) -> int:
    """The sum of the multiply-adds; a multiply-add is two FLOPs."""
    return sum(term.multiply_adds for term in terms)


def _times(batch: int, terms: Iterable[Term]) -> list[Term]:
    return [term._replace(multiply_adds=batch * term.multiply_adds) for term in terms]


def _stages(config: SegformerConfig, size: tuple[int, int]) -> list[_Stage]:
    stages: list[_Stage] = []
    grid, inputs = size, config.num_channels
    for index, channels in enumerate(config.hidden_sizes):
        patch, stride = config.patch_sizes[index], config.strides[index]
        height, width = ((side + 2 * (patch // 2) - patch) // stride + 1 for side in grid)
        ratio = config.sr_ratios[index]
        stages.append(
            _Stage(
                name=str(index + 1),
                tokens=height * width,
                reduced=(height // ratio) * (width // ratio),
                inputs=inputs,
                channels=channels,
                hidden=int(channels * config.mlp_ratios[index]),
                patch=patch,
                ratio=ratio,
                heads=config.num_attention_heads[index],
                depth=config.depths[index],
            )
        )
        grid, inputs = (height, width), channels
    return stages


def _reduced_by_sr(stage: _Stage) -> int:
    """Tokens that the spatial reduction gives in all layers; without one, none."""
    return stage.depth * stage.reduced if stage.ratio > 1 else 0


def _encoder_terms(stage: _Stage, fold: bool) -> Iterator[Term]:
    tokens, reduced, channels = stage.tokens, stage.reduced, stage.channels
    embedding = tokens * channels * stage.inputs * stage.patch**2
    yield Term(stage.name, "patch embed", "conv", embedding)
    attention = {
        "sr": _reduced_by_sr(stage) * channels**2 * stage.ratio**2,
        "q": stage.depth * tokens * channels**2,
        "kv": stage.depth * 2 * reduced * channels**2,
        "scores": stage.depth * tokens * reduced * channels,
        "values": stage.depth * tokens * reduced * channels,
        "out": stage.depth * tokens * channels**2,
    }
    if fold and stage.heads == 1:
        attention["out"] = 0
        # What is left of the query projection is its bias: an offset of the scores of each key.
        attention["q"] = stage.depth * reduced * channels
    for part, multiply_adds in attention.items():
        yield Term(stage.name, "attention", part, multiply_adds)
    linear = stage.depth * tokens * channels * stage.hidden
    yield Term(stage.name, "mix-ffn", "fc1", linear)
    yield Term(stage.name, "mix-ffn", "dwconv", stage.depth * tokens * stage.hidden * 3 * 3)
    yield Term(stage.name, "mix-ffn", "fc2", linear)


def _head_terms(config: SegformerConfig, stages: list[_Stage], fold: bool) -> Iterator[Term]:
    finest, width = stages[0].tokens, config.decoder_hidden_size
    for stage in stages:
        projection = stage.tokens * stage.channels * width
        yield Term(stage.name, "decode head", "linear_c", projection)
    fuse = 0 if fold else finest * len(stages) * width**2
    yield Term(HEAD, "decode head", "fuse", fuse)
    yield Term(HEAD, "decode head", "classifier", finest * width * config.num_labels)


def main() -> None:
    """Print a markdown table."""
    print("Multiply-adds of a forward at 512x512, batch 1, 150 classes, in G.\n")
    print("| variant | published | usual | folded |\n|---|---:|---:|---:|")
    for variant in VARIANTS:
        config = preset_config(f"segformer_{variant}", num_classes=150)
        counts = [total(form(config, (512, 512))) / 1e9 for form in (published, usual, folded)]
        print(f"| {variant.upper()} | {' | '.join(f'{count:.2f}' for count in counts)} |")


if __name__ == "__main__":
    main()

"""Plan of an encoder: each half of a layer by its fast form, or by the module's own code.

Nothing is folded but the tables of relative positions, which are small: LayerNorm's affine part
costs nothing where it is, and folded copies of the weights after it would be 1 GB in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fastseg.exporting.folded import ExportedPlan
from fastseg.folding.find import Declined, activation_name, find, find_layer_norm, find_leaf
from fastseg.folding.fold import Folded, Known, Part
from fastseg.kernels.blocks.activations import activated
from fastseg.kernels.blocks.onednn import dense, dense_residual
from fastseg.kernels.core.checks import autocasts
from fastseg.kernels.core.weights import Weights

from .attention import attend, fits_blocks, table


@dataclass(frozen=True)
class Encoded:
    """What an encoder gives.

    last: (B, H, W, C) behind the last layer.
    states: before each layer and behind the last, where asked for; before the merge of batch 2 B.
    features: behind LayerNorm, those that the decoder takes.
    """

    last: torch.Tensor
    states: tuple[torch.Tensor, ...] | None
    features: list[torch.Tensor]


class Halves(NamedTuple):
    """A stream of N prompts (N, H/2, W, C) above one image (1, H/2, W, C)."""

    prompts: torch.Tensor
    query: torch.Tensor

    @classmethod
    def of(cls, stream: torch.Tensor) -> Halves:
        """The halves of (N, H, W, C), whose lower ones are the same."""
        prompts, query = stream.split(stream.shape[1] // 2, dim=1)
        return cls(prompts, query[:1])

    def joined(self) -> torch.Tensor:
        """As (N, H, W, C)."""
        query = self.query.expand(len(self.prompts), -1, -1, -1)
        return torch.cat([self.prompts, query], dim=1)


def mean_of_queries(output: torch.Tensor, groups: int) -> torch.Tensor:
    """Take the mean over prompts of the lower halves of (B, H, W, C), in groups of the batch."""
    prompt, query = output.split(output.shape[1] // 2, dim=1)
    query = query.unflatten(0, (groups, -1))
    query = query.mean(dim=1, keepdim=True).expand_as(query).flatten(0, 1)
    return torch.cat([prompt, query], dim=1)


class LayerPlan(Known):
    """One layer: whole its own, or half by half.

    Known are the layer itself and its stochastic depth.

    Args:
        activation: path of the function between the linear layers.
        refused: why it stays its own, as a check of its kind has found.
    """

    def __init__(self, layer: Any, activation: str, refused: str | None, own: bool) -> None:
        self.layer = layer
        self.refused = refused
        self.reason = refused
        self._activation = activation
        halves = self._halves()
        self.attention = Part(layer, halves[0], self._fold_attention, own)
        self.mlp = Part(layer, halves[1], self._fold_mlp, own)
        inside = {id(root) for half in halves for root in half}
        around = [layer, *(child for child in layer.children() if id(child) not in inside)]
        super().__init__(layer, around, own)

    def _halves(self) -> list[list[nn.Module]]:
        layer = self.layer
        return [[layer.layernorm_before, layer.attention], [layer.layernorm_after, layer.mlp]]

    def is_current(self) -> bool:
        """Return whether the layer still holds the modules that this was made for."""
        then = [*self.attention.roots, *self.mlp.roots]
        return list(map(id, then)) == [id(one) for half in self._halves() for one in half]

    def _fold_attention(self) -> Folded:
        layer = self.layer
        channels = find_layer_norm(layer, "layernorm_before").weight.shape[0]
        find_leaf(layer, "attention.qkv", nn.Linear)
        find_leaf(layer, "attention.proj", nn.Linear)
        heads = find(layer, "attention.num_attention_heads")
        scale = find(layer, "attention.scale")
        if not isinstance(heads, int) or heads < 1 or channels % heads:
            raise Declined(f"attention has {heads!r} heads, no divisor of {channels} channels")
        if not isinstance(scale, float):
            raise Declined(f"attention.scale is {scale!r}, no float")
        tables = []
        for name in ("rel_pos_h", "rel_pos_w"):
            relative = find(layer, f"attention.{name}")
            width = channels // heads
            if relative is None or relative.shape[1:] != (width,) or len(relative) % 2 == 0:
                raise Declined(f"attention.{name} is no odd number of vectors of {width}")
            tables.append(table(relative.detach()))
        return {"rows": tables[0], "columns": tables[1], "heads": heads, "scale": scale}

    def _fold_mlp(self) -> Folded:
        find_layer_norm(self.layer, "layernorm_after")
        for name in ("mlp.lin1", "mlp.lin2"):
            find_leaf(self.layer, name, nn.Linear)
        function = find(self.layer, self._activation)
        activation = activation_name(function)
        if activation is None:
            raise Declined(f"{self._activation} is {function}, unknown here")
        return {"activation": activation}

    def parts(self) -> tuple[Part, Part]:
        return self.attention, self.mlp

    def settle(self, any_mode: bool = False, fold: bool = True) -> None:
        reason = self.refused or self.problem(any_mode)
        for half in self.parts():
            if reason is None:
                half.settle(any_mode, fold)
            else:
                half.decline(f"its layer: {reason}")
        self.reason = reason  # at the end: other threads may be reading it

    def takes(self, height: int, width: int) -> bool:
        """Return whether its tables are for this grid of tokens, or its attention is its own."""
        if self.attention.reason is not None:
            return True
        folded = self.attention.folded()
        return len(folded["rows"]) == height and len(folded["columns"]) == width

    def run(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        """The layer's output for tokens (B, H, W, C).

        Args:
            groups: of the batch, over each of which lower halves have the mean of what attention
                gives; 0 where not.
        """
        if self.reason is not None:
            # Its own condition, batch // 2 >= groups, has been asked before.
            output: torch.Tensor = self.layer(x, groups or 1, groups > 0, False)[0]
            return output
        out = self._attended(x)
        if groups:
            out = mean_of_queries(out, groups)
        return self._through_mlp(out + x)

    def run_halves(
        self, streams: Sequence[Halves], joint: bool = False, last: bool = False
    ) -> list[Halves]:
        """Run streams of N prompts each, whose lower halves, the image's, are the same.

        What attention gives to the image is the mean over the prompts, which is the ensemble: so
        the image's half is computed once for all of them.

        Args:
            joint: that is the mean over the prompts of all streams.
            last: no more than the image's half and the row above it is wanted, of the first prompt.
        """
        if self.reason is not None or self.attention.reason is not None:
            many = len(streams[0].prompts) > 1
            groups = (1 if joint else len(streams)) if many else 0
            out = self.run(torch.cat([one.joined() for one in streams]), groups)
            return [Halves.of(part) for part in out.chunk(len(streams))]
        attended = [self._attended_halves(one, last) for one in streams]
        if joint:
            mean = torch.stack([one.query for one in attended]).mean(0)
            attended = [Halves(one.prompts, mean) for one in attended]
        results = []
        for before, after in zip(streams, attended, strict=True):
            prompts = before.prompts[:1, -1:] if last else before.prompts
            pair = after.prompts + prompts, after.query + before.query
            results.append(Halves(*map(self._through_mlp, pair)))
        return results

    def _attended_halves(self, halves: Halves, last: bool) -> Halves:
        attention = self.layer.attention
        folded = self.attention.folded()
        rows, columns, heads = (folded[name] for name in ("rows", "columns", "heads"))
        _, height, width, channels = halves.prompts.shape
        first = height - 1 if last else 0  # row of the grid that there are queries of
        own = self._qkv(halves.query)
        prompts, query = [], torch.zeros_like(halves.query).flatten(1, 2)
        for index, prompt in enumerate(halves.prompts.split(1)):
            qkv = torch.cat([self._qkv(prompt), own], 1)
            qkv = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            context = attend(
                qkv[0, :, :, first * width :],
                qkv[1],
                qkv[2],
                rows[first:],
                columns,
                folded["scale"],
            ).flatten(2)
            above, below = context.split([(height - first) * width, height * width], dim=1)
            if not last or index == 0:
                prompts.append(above)
            query += below
        proj = attention.proj
        query = dense(query / len(halves.prompts), proj.weight, proj.bias).view(halves.query.shape)
        above = _joined([dense(one, proj.weight, proj.bias) for one in prompts])
        return Halves(above.view(len(prompts), height - first, width, channels), query)

    def _attended(self, x: torch.Tensor) -> torch.Tensor:
        layer, attention = self.layer, self.layer.attention
        if self.attention.reason is not None:
            output: torch.Tensor = attention(layer.layernorm_before(x))[0]
            return output
        folded = self.attention.folded()
        out = []
        for some in _streams(x):
            qkv = self._qkv(some).unflatten(2, (3, folded["heads"], -1)).permute(2, 0, 3, 1, 4)
            tables = folded["rows"], folded["columns"]
            context = attend(qkv[0], qkv[1], qkv[2], *tables, folded["scale"])
            out.append(dense(context.flatten(2), attention.proj.weight, attention.proj.bias))
        return _joined(out).view(x.shape)

    def _qkv(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (B, H, W, C) -> queries, keys and values (B, H W, 3 C)."""
        qkv = self.layer.attention.qkv
        normalized = self.layer.layernorm_before(x).flatten(1, 2)
        return dense(normalized, qkv.weight, qkv.bias)

    def _through_mlp(self, x: torch.Tensor) -> torch.Tensor:
        layer, mlp = self.layer, self.layer.mlp
        if self.mlp.reason is not None:
            return x + mlp(layer.layernorm_after(x))
        activation = self.mlp.folded()["activation"]
        out = []
        for some in _streams(x):
            hidden = dense(layer.layernorm_after(some), mlp.lin1.weight, mlp.lin1.bias)
            hidden = activated(activation, hidden)
            out.append(dense_residual(hidden, mlp.lin2.weight, mlp.lin2.bias, some))
        return _joined(out)


def _streams(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The batch one by one on a CPU, for the sake of memory; whole on a GPU and in an export."""
    return x.split(1) if x.device.type == "cpu" and not torch.compiler.is_exporting() else (x,)


def _joined(streams: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(streams) if len(streams) > 1 else streams[0]


class EncoderPlan(ExportedPlan):
    """An encoder, layer by layer.

    Args:
        activation: path of the function in a layer.
        refused: why layers stay their own, by their ids, as a check of their kinds has found.
    """

    def __init__(
        self, encoder: Any, activation: str, refused: dict[int, str], own: bool = False
    ) -> None:
        self.encoder = encoder
        self.layers = [
            LayerPlan(layer, activation, refused.get(id(layer)), own) for layer in encoder.layers
        ]

    def is_current(self) -> bool:
        return [id(plan.layer) for plan in self.layers] == list(
            map(id, self.encoder.layers)
        ) and all(plan.is_current() for plan in self.layers)

    def settle(self, any_mode: bool = False, fold: bool = True) -> str | None:
        for layer in self.layers:
            layer.settle(any_mode, fold)
        if not self.folded_parts():
            reasons = (f": {name} {reason}" for name, reason in self.reasons())
            return "none of its parts can be folded" + next(reasons, "")
        return None

    def parts(self) -> list[Part]:
        return [part for layer in self.layers for part in layer.parts()]

    def known(self) -> list[Known]:
        return [*self.parts(), *self.layers]

    def reasons(self) -> Iterator[tuple[str, str]]:
        for index, layer in enumerate(self.layers):
            name = f"layers.{index}"
            if layer.reason is not None:
                yield name, layer.reason
                continue
            for half, kind in ((layer.attention, "attention"), (layer.mlp, "MLP")):
                if half.reason is not None:
                    yield f"{name}, {kind}", half.reason

    def weights(self) -> Iterator[tuple[str, Weights]]:
        return iter(())

    def runs_by(self) -> str:
        form = "in blocks" if fits_blocks(self.encoder.layernorm.weight) else "by PyTorch's SDPA"
        return f"eager: there are no kernels for this family; attention {form}"

    def takes(self, hidden_states: torch.Tensor) -> bool:
        """Return whether the tables are for this grid, which no autocast is to round."""
        height, width = hidden_states.shape[1:3]
        return all([layer.takes(height, width) for layer in self.layers]) and not autocasts(
            hidden_states.device
        )

    def run(
        self, hidden_states: torch.Tensor, feature_ensemble: bool, output_hidden_states: bool
    ) -> Encoded:
        """Encode both streams (2 B, H, W, C), images first."""
        if feature_ensemble and _is_of_one_image(hidden_states):
            return self._run_halves(hidden_states, output_hidden_states)
        runs = [layer.run for layer in self.layers]
        return encode(self.encoder, runs, hidden_states, feature_ensemble, output_hidden_states)

    def _run_halves(self, hidden_states: torch.Tensor, output_hidden_states: bool) -> Encoded:
        """The same of several prompts for one image, whose half is computed once."""
        config = self.encoder.config
        streams = [Halves.of(one) for one in hidden_states.chunk(2)]
        states: list[torch.Tensor] = []
        features = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(torch.cat([one.joined() for one in streams]))
            if index < config.merge_index:
                streams = [layer.run_halves([one])[0] for one in streams]
            else:
                streams = layer.run_halves(streams, joint=True)
            if index == config.merge_index:
                streams = [Halves(*((a + b) * 0.5 for a, b in zip(*streams, strict=True)))]
            if index in config.intermediate_hidden_state_indices:
                features.append(self.encoder.layernorm(streams[0].joined()))
        last = streams[0].joined()
        if output_hidden_states:
            states.append(last)
        return Encoded(last, tuple(states) if output_hidden_states else None, features)


def _is_of_one_image(hidden_states: torch.Tensor) -> bool:
    """Return whether two prompts or more are above the same image, in both streams.

    Not on a GPU, where a comparison would wait for it, nor in a graph.
    """
    if hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    lower = hidden_states.unflatten(0, (2, -1))[:, :, hidden_states.shape[1] // 2 :]
    return lower.shape[1] > 1 and torch.equal(lower[:, 1:], lower[:, :1].expand_as(lower[:, 1:]))


def encode(
    encoder: Any,
    layers: Sequence[Callable[[torch.Tensor, int], torch.Tensor]],
    hidden_states: torch.Tensor,
    feature_ensemble: bool,
    output_hidden_states: bool,
) -> Encoded:
    """Run `layers`, each (tokens, groups of the ensemble) -> tokens, on both streams.

    The groups are those of transformers: each stream by itself before the merge, where there are
    two prompts; both together at the merge; the batch behind it.
    """
    config = encoder.config
    x = hidden_states
    states: list[torch.Tensor] = []
    features = []
    for index, layer in enumerate(layers):
        if output_hidden_states:
            states.append(x)
        groups = 2 if index < config.merge_index else 1
        x = layer(x, groups if feature_ensemble and len(x) // 2 >= groups else 0)
        if index == config.merge_index:
            images, masks = x.unflatten(0, (2, -1))  # slices would bind an exported program
            x = (images + masks) * 0.5
        if index in config.intermediate_hidden_state_indices:
            features.append(encoder.layernorm(x))
    if output_hidden_states:
        states.append(x)
    return Encoded(x, tuple(states) if output_hidden_states else None, features)

"""The decode head with gradients on a CPU, a stripe of rows at a time.

With s the sum of the resized maps of all stages (`head.py`), BatchNorm over the batch, ReLU,
dropout and a 1x1 classifier follow:

    logits = K z + k,    z = m relu(a s' + c) / p,    s' = s - mean,    a = gain / deviation

with m the mask of dropout and p the share that it keeps. Nothing D wide is kept but s' and m: z is
made again in backward. Two pieces of algebra:

- The mean of s is that of the maps, weighted by how much each position counts in the resized map,
  times W_i. So it is known before s is made, and taken off as s is made: the variance is a sum of
  squares, which does not cancel.
- BatchNorm takes the bias b of s off again: it needs no pass, and its gradient is 0.

With g the gradient behind BatchNorm, 0 where ReLU or dropout cut, that in front of it is
a (g - mean(g) - s' mean(g s') / variance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.kernels.core.registry import register_differentiable, register_plain

from .masks import draw_mask
from .resizing import Stage

STRIPE_BYTES = 1 << 20
_LEAST_ROWS = 4  # of a stripe: the next one reads rows of the coarser maps again
_ONCE = (
    "decode_head: in stripes there are no gradients of gradients; inside fastseg.plain_path() "
    "there are"
)
Tensors = Sequence[torch.Tensor]


class _Stripes:
    """What both passes go by: sizes, stripes, stages."""

    def __init__(self, tokens: Tensors, channels: int) -> None:
        self.batch, self.height, self.width = tokens[0].shape[:3]
        self.channels, self.kept = channels, tokens[0].dtype
        self.dtype = torch.promote_types(self.kept, torch.float32)
        self._like = tokens[0].new_empty((), dtype=self.dtype)
        size = self.height, self.width
        self.stages = [Stage.of(size, one.shape[1:3], self._like) for one in tokens[1:]]
        row_bytes = self.width * channels * self.dtype.itemsize
        self._most = min(max(STRIPE_BYTES // row_bytes, _LEAST_ROWS), self.height)
        tops = range(0, self.height, self._most)
        self.rows = [slice(top, min(top + self._most, self.height)) for top in tops]

    def places(self, rows: slice) -> slice:
        """Where they lie in the (H W) of a map."""
        return slice(rows.start * self.width, rows.stop * self.width)

    def everywhere(self) -> Iterator[tuple[int, slice]]:
        """The image and the places of all stripes."""
        for image in range(self.batch):
            for rows in self.rows:
                yield image, self.places(rows)

    def buffer(self) -> torch.Tensor:
        """Memory for a stripe, (places, D)."""
        return self._like.new_empty(self._most * self.width, self.channels)

    def sums(self) -> torch.Tensor:
        """(D,), zeros."""
        return self._like.new_zeros(self.channels, dtype=torch.float64)


def _column_sums(rows: torch.Tensor) -> torch.Tensor:
    return (rows.new_ones(1, len(rows)) @ rows)[0]


class _Activation:
    """z of a stripe."""

    def __init__(
        self,
        stripes: _Stripes,
        centred: torch.Tensor,
        slope: torch.Tensor,
        offset: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> None:
        self.centred, self.slope, self.offset = centred, slope, offset
        self.mask = None if mask is None else mask.flatten(1, 2).expand(centred.shape)
        self._z, self._mask = stripes.buffer(), stripes.buffer()

    def at(self, where: tuple[int, slice]) -> torch.Tensor:
        """(places, D), valid until the next call."""
        s = self.centred[where]
        z = torch.addcmul(self.offset, s, self.slope, out=self._z[: len(s)]).relu_()
        if self.mask is not None:
            # Widened first: torch multiplies by bytes four times slower than it widens them.
            z *= self._mask[: len(s)].copy_(self.mask[where])
        return z


def _forward(
    tokens: Tensors,
    weights: Tensors,
    bias: torch.Tensor | None,
    gain: torch.Tensor,
    shift: torch.Tensor,
    class_weight: torch.Tensor,
    class_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    share: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """Logits (B, H W, K); s' (B, H W, D); mean and variance of s, with the bias, (D,) each."""
    with torch.autocast(tokens[0].device.type, enabled=False):
        stripes = _Stripes(tokens, len(weights[0]))
        first = tokens[0].flatten(0, 2).mean(0, dtype=stripes.dtype)
        means = [first, *(s.mean(one) for s, one in zip(stripes.stages, tokens[1:], strict=True))]
        mean = stripes.sums().to(stripes.dtype)
        for one, weight in zip(means, weights, strict=True):
            mean += weight.to(stripes.dtype) @ one
        places = stripes.height * stripes.width
        centred = tokens[0].new_empty(stripes.batch, places, stripes.channels)
        squares, buffer = stripes.sums(), stripes.buffer()
        for s in _sums(tokens, weights, -mean, stripes, centred):
            squares += _column_sums(torch.mul(s, s, out=buffer[: len(s)]))
        variance = (squares / (stripes.batch * places)).to(stripes.dtype)
        slope = gain * (variance + eps).rsqrt()
        activation = _Activation(stripes, centred, slope / share, shift / share, mask)
        logits = class_weight.new_empty(stripes.batch, places, len(class_weight))
        for where in stripes.everywhere():
            z = activation.at(where).to(class_weight.dtype)
            if class_bias is None:
                torch.mm(z, class_weight.t(), out=logits[where])
            else:
                torch.addmm(class_bias, z, class_weight.t(), out=logits[where])
        return logits, centred, mean if bias is None else mean + bias, variance


def _sums(
    tokens: Tensors,
    weights: Tensors,
    centre: torch.Tensor,
    stripes: _Stripes,
    into: torch.Tensor,
) -> Iterator[torch.Tensor]:
    """Write s + centre (B, H W, D) into `into`; of each stripe (places, D), unrounded."""
    rounds = into.dtype != stripes.dtype
    buffer = stripes.buffer() if rounds else into
    for image in range(stripes.batch):
        wides = []
        for stage, one, weight in zip(stripes.stages, tokens[1:], weights[1:], strict=True):
            projected = F.linear(one[image], weight).to(stripes.dtype)
            if stage is stripes.stages[-1]:  # whose shares add up to 1 everywhere
                projected += centre
            wides.append(stage.widen(projected))
        source = tokens[0][image].flatten(0, 1)
        for rows in stripes.rows:
            places = stripes.places(rows)
            if rounds:
                s = buffer[: places.stop - places.start].copy_(source[places] @ weights[0].t())
            else:
                s = torch.mm(source[places], weights[0].t(), out=into[image, places])
            flat = s.view(rows.stop - rows.start, -1)
            for stage, wide in zip(stripes.stages, wides, strict=True):
                flat.addmm_(stage.down[rows, stage.rows(rows)], wide[stage.rows(rows)])
            if rounds:
                into[image, places] = s
            yield s


def _backward(
    grad: torch.Tensor,
    tokens: Tensors,
    weights: Tensors,
    gain: torch.Tensor,
    shift: torch.Tensor,
    class_weight: torch.Tensor,
    mask: torch.Tensor | None,
    centred: torch.Tensor,
    variance: torch.Tensor,
    share: float,
    eps: float,
) -> list[torch.Tensor]:
    """Gradients of tokens, weights, gain, shift and the classifier's weight, in a row."""
    stripes = _Stripes(tokens, len(weights[0]))
    deviation = (variance + eps).rsqrt()
    slope = gain * deviation / share
    activation = _Activation(stripes, centred, slope, shift / share, mask)
    behind = torch.empty_like(centred)  # the gradient behind BatchNorm, times `share`
    g_buffer, buffer = stripes.buffer(), stripes.buffer()
    of_classifier = class_weight.new_zeros(class_weight.shape, dtype=stripes.dtype)
    sum_g, sum_gs = stripes.sums(), stripes.sums()
    for where in stripes.everywhere():
        z, outer = activation.at(where), grad[where]
        g = g_buffer[: len(z)]
        if outer.dtype == stripes.dtype:
            of_classifier.addmm_(outer.t(), z)
            torch.mm(outer, class_weight, out=g)
        else:
            of_classifier += outer.t() @ z.to(outer.dtype)
            g.copy_(outer @ class_weight)
        # z is 0 where ReLU or dropout cut.
        torch.ops.aten.threshold_backward.grad_input(g, z, 0, grad_input=g)
        behind[where] = g
        sum_g += _column_sums(g)
        sum_gs += _column_sums(torch.mul(g, centred[where], out=buffer[: len(g)]))
    sum_g, sum_gs = (one.to(stripes.dtype) for one in (sum_g, sum_gs))
    count = stripes.batch * stripes.height * stripes.width
    constant, along = -slope * sum_g / count, -slope * deviation.square() * sum_gs / count

    def before(where: tuple[int, slice]) -> torch.Tensor:
        """(places, D) the gradient of s."""
        g = behind[where]
        g = torch.addcmul(constant, g, slope, out=g_buffer[: len(g)])
        return g.addcmul_(centred[where], along)

    of_sum = _sums_backward(tokens, weights, before, stripes)
    of_norm = sum_gs * deviation / share, sum_g / share
    return [*of_sum, *(one.to(gain.dtype) for one in of_norm), of_classifier.to(class_weight.dtype)]


def _sums_backward(
    tokens: Tensors,
    weights: Tensors,
    before: Callable[[tuple[int, slice]], torch.Tensor],
    stripes: _Stripes,
) -> list[torch.Tensor]:
    """Gradients of tokens and weights, from that of a stripe of their sum."""
    of_tokens = [torch.empty_like(one) for one in tokens]
    of_weights = [one.new_zeros(one.shape, dtype=stripes.dtype) for one in weights]

    def project(index: int, image: int, places: slice, g: torch.Tensor) -> None:
        """Add the gradients of a projection."""
        source, weight = tokens[index][image].flatten(0, 1)[places], weights[index]
        g = g.to(weight.dtype)
        if g.dtype == stripes.dtype:
            of_weights[index].addmm_(g.t(), source)
        else:
            of_weights[index] += g.t() @ source
        torch.mm(g, weight, out=of_tokens[index][image].flatten(0, 1)[places])

    for image in range(stripes.batch):
        wides = [
            one.down.new_zeros(one.down.shape[1], stripes.width * stripes.channels)
            for one in stripes.stages
        ]
        for rows in stripes.rows:
            places = stripes.places(rows)
            g = before((image, places))
            flat = g.view(rows.stop - rows.start, -1)
            for stage, wide in zip(stripes.stages, wides, strict=True):
                wide[stage.rows(rows)].addmm_(stage.down[rows, stage.rows(rows)].t(), flat)
            project(0, image, places, g)
        for index, (stage, wide) in enumerate(zip(stripes.stages, wides, strict=True), start=1):
            project(index, image, slice(None), stage.narrow(wide))
    return [*of_tokens, *(g.to(w.dtype) for g, w in zip(of_weights, weights, strict=True))]


# ------------------------------------------------------------------------------- registration


def _forward_fake(
    tokens: Tensors, weights: Tensors, bias: Any, gain: Any, shift: Any, classifier: Any, *_: Any
) -> tuple[torch.Tensor, ...]:
    batch, height, width = tokens[0].shape[:3]
    places, channels = height * width, len(weights[0])
    logits = classifier.new_empty(batch, places, len(classifier))
    dtype = torch.promote_types(tokens[0].dtype, torch.float32)
    mean, variance = (gain.new_empty(channels, dtype=dtype) for _ in range(2))
    return logits, tokens[0].new_empty(batch, places, channels), mean, variance


def _backward_fake(
    grad: torch.Tensor, tokens: Tensors, weights: Tensors, *vectors: Any
) -> list[torch.Tensor]:
    return [torch.empty_like(one) for one in (*tokens, *weights, *vectors[:3])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    tokens, weights, bias, gain, shift, classifier, class_bias, mask, ctx.share, ctx.eps = inputs
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)  # zeros for each of them
    ctx.bias, ctx.class_bias = bias is not None, class_bias is not None
    ctx.count = len(tokens)
    centred, _, variance = others
    ctx.save_for_backward(*tokens, *weights, gain, shift, classifier, mask, centred, variance)


def _run_backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(_ONCE)
    if grad is None:
        return [None] * ctx.count, [None] * ctx.count, *[None] * 8
    count, saved = ctx.count, ctx.saved_tensors
    tokens, weights, others = saved[:count], saved[count : 2 * count], saved[2 * count :]
    grad = grad.contiguous()
    found = torch.ops.fastseg.head_in_stripes_backward(
        grad, tokens, weights, *others, ctx.share, ctx.eps
    )
    *of_sum, of_gain, of_shift, of_classifier = found
    # Zeros, not None: a parameter without a gradient would stop DistributedDataParallel.
    of_bias = torch.zeros_like(of_gain) if ctx.bias else None
    of_class_bias = grad.sum((0, 1)) if ctx.class_bias else None
    of_norm = of_bias, of_gain, of_shift
    return of_sum[:count], of_sum[count:], *of_norm, of_classifier, of_class_bias, None, None, None


register_plain(
    "head_in_stripes_backward(Tensor grad, Tensor[] tokens, Tensor[] weights, Tensor gain, "
    "Tensor shift, Tensor class_weight, Tensor? mask, Tensor centred, Tensor variance, "
    "float share, float eps) -> Tensor[]",
    run=_backward,
    fake=_backward_fake,
)
register_differentiable(
    "head_in_stripes(Tensor[] tokens, Tensor[] weights, Tensor? bias, Tensor gain, Tensor shift, "
    "Tensor class_weight, Tensor? class_bias, Tensor? mask, float share, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    run=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_run_backward,
)


def logits_in_stripes(
    maps: Tensors,
    weights: Tensors,
    bias: torch.Tensor | None,
    norm: nn.BatchNorm2d,
    dropout: Any,
    classifier: nn.Conv2d,
) -> torch.Tensor:
    """The logits (B, K, H, W) of maps (B, C_i, H_i, W_i), finest first, two at least.

    Args:
        weights: (D, C_i) each.
        bias: (D,) of their sum.
        norm: in training mode, with a weight and a bias.
        dropout: Dropout, Dropout2d or None.
    """
    tokens = [one.permute(0, 2, 3, 1).contiguous() for one in maps]
    class_weight, class_bias = classifier.weight.flatten(1), classifier.bias
    device = tokens[0].device.type
    if torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
        tokens, weights = ([one.to(kind) for one in some] for some in (tokens, weights))
        class_weight = class_weight.to(kind)
        class_bias = None if class_bias is None else class_bias.to(kind)
    batch, height, width, _ = tokens[0].shape
    mask, share = draw_mask(dropout, (batch, height, width, len(weights[0])), device)
    logits, _, mean, variance = torch.ops.fastseg.head_in_stripes(
        *(tokens, weights, bias, norm.weight, norm.bias, class_weight, class_bias),
        *(mask, share, norm.eps),
    )
    if norm.track_running_stats:
        _update(norm, mean, variance, batch * height * width)
    return logits.unflatten(1, (height, width)).permute(0, 3, 1, 2)


@torch.no_grad()
def _update(norm: Any, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Move the running statistics as BatchNorm does."""
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:  # the mean over all batches
        momentum = 1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
    unbiased = variance * (count / (count - 1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)

"""Mix-FFN with gradients as one operator, which makes its hidden tensors again in backward.

    y = x + f (W2 act(a) + b2),   a = D h,   h = W1 N(x) + b1

N is a LayerNorm, D a depthwise 3x3 convolution with a bias, act a form of GELU, f the factor of a
picture's branch: stochastic depth's 0 or 1 / (share that it keeps). Where f is 0 neither direction
computes anything for that picture.

torch keeps for backward what each operator read: x, N(x), h, a and act(a), of which three are four
or more times as wide as x. This keeps x, and h too where it is asked to.

Both directions go a stripe of rows at a time on a CPU, so that what is so wide stays in the cache,
in memory that the allocator has at hand. D looks one row beyond a stripe, so h is made of these two
rows as well. In backward a stripe of `a` has a share in the gradient of those rows of h: the last
two rows of it wait for what the next stripe adds.

In half precision N, D and act are in float32 on a CPU. torch's LayerNorm sums up gradients in
bfloat16 there; its convolutions go channel by channel without AVX512, and are wrong on some CPUs
with AMX.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fastseg.kernels.blocks.bilinear import row_stripes
from fastseg.kernels.core.checks import autocasts
from fastseg.kernels.core.registry import register_differentiable, register_plain

# The form of GELU by the names in `ACTIVATIONS` of what has a derivative here.
GELU_FORMS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_LEAST_ROWS = 8  # of a stripe, as two rows of h are made again
_DEPTHWISE: Any = ([1, 1], [1, 1], [1, 1], False, [0, 0])  # stride, padding, dilation, transposed
_ONCE = (
    "mix_ffn: its hidden tensors are made again in backward, and so there are no gradients of "
    "gradients (create_graph=True); inside fastseg.plain_path() there are"
)
Factor = float | torch.Tensor


def mix_ffn(
    x: torch.Tensor,
    height: int,
    width: int,
    parameters: list[torch.Tensor],
    *,
    eps: float,
    activation: str,
    factors: torch.Tensor | None = None,
    keep_hidden: bool = False,
) -> torch.Tensor:
    """Tokens after a Mix-FFN with its LayerNorm and residual.

    Under autocast products are in its dtype; gradients are summed up in float32 at least.

    Args:
        x: (B, H W, C), floating.
        parameters: LayerNorm's weight and bias (C,); W1 (E, C), b1 (E,); D's weight (E, 1, 3, 3)
            and bias (E,); W2 (C, E), b2 (C,): of one dtype.
        activation: a name in `GELU_FORMS`.
        factors: (B,) what the branch of each picture is multiplied by; it gets no gradient.
        keep_hidden: keep h for backward. It takes E numbers a token, and spares a product.

    Returns:
        (B, H W, C) in the dtype of x. It can be differentiated once.
    """
    is_asked = torch.is_grad_enabled() and any(one.requires_grad for one in (x, *parameters))
    output, _ = torch.ops.fastseg.mix_ffn_with_gradients(
        *(x, factors, *parameters, height, width, eps, GELU_FORMS[activation]),
        product_dtype(parameters[2]),
        keep_hidden and is_asked,
    )
    return output


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of products with `weight`, which autocast may choose."""
    if autocasts(weight.device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


class _Call:
    """What both directions go by; `kept` is h, where it was kept."""

    def __init__(
        self,
        x: torch.Tensor,
        parameters: list[torch.Tensor],
        height: int,
        width: int,
        eps: float,
        form: str,
        dtype: torch.dtype,
        kept: torch.Tensor | None,
    ) -> None:
        self.grid = x.contiguous().view(x.shape[0], height, width, x.shape[2])
        # Of products, of D and act, and of N.
        self.dtype = self.inner = dtype
        self.outer = torch.promote_types(x.dtype, parameters[0].dtype)
        if x.device.type == "cpu":
            self.inner = torch.promote_types(dtype, torch.float32)
            self.outer = torch.promote_types(self.outer, torch.float32)
        self.gain, self.shift = (one.to(self.outer) for one in parameters[:2])
        self.w1, self.b1, self.w2, self.b2 = (parameters[i].to(dtype) for i in (2, 3, 6, 7))
        self.taps, self.tap_bias = (one.to(self.inner) for one in parameters[4:6])
        self.eps, self.form, self.kept = eps, form, kept

    def pieces(
        self, factors: torch.Tensor | None
    ) -> Iterator[tuple[slice, Factor, list[tuple[int, int]]]]:
        """Pictures that are computed at once, their factor, and stripes [top, bottom) of rows.

        Factors are numbers on a CPU. Elsewhere reading them would wait for the device.
        """
        batch, height, width, _ = self.grid.shape
        device, row_bytes = self.grid.device, width * self.taps.numel() // 9 * self.taps.itemsize
        rows = row_stripes(height, row_bytes, device, _LEAST_ROWS)
        numbers = [1.0] * batch
        if factors is not None and device.type == "cpu":
            numbers, factors = factors.tolist(), None
        together = [(i, i + 1) for i in range(batch)]
        if batch and len(rows) == 1 and len(set(numbers)) == 1:
            together = row_stripes(batch, height * row_bytes, device)
        for first, last in together:
            factor: Factor = numbers[first]
            if factors is not None:
                factor = factors[first:last].view(-1, 1, 1, 1)
            yield slice(first, last), factor, rows

    def around(self, top: int, bottom: int) -> tuple[slice, slice]:
        """The rows that D reads for a stripe, and the stripe in them."""
        first = max(top - 1, 0)
        return slice(first, bottom + 1), slice(top - first, bottom - first)

    def normalized(
        self, pictures: slice, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """N(x) (B, rows, W, C) of those rows, and the mean and 1 / deviation of x."""
        source = self.grid[pictures, rows].to(self.outer)
        z, mean, rstd = torch.native_layer_norm(
            source, source.shape[3:], self.gain, self.shift, self.eps
        )
        return z.to(self.dtype), mean, rstd

    def hidden(self, z: torch.Tensor) -> torch.Tensor:
        """h (B, rows, W, E)."""
        return F.linear(z, self.w1, self.b1)

    def convolved(self, h: torch.Tensor, inside: slice) -> torch.Tensor:
        """The rows `inside` of a."""
        a = F.conv2d(
            h.permute(0, 3, 1, 2), self.taps, self.tap_bias, padding=1, groups=len(self.taps)
        )
        return a.permute(0, 2, 3, 1)[:, inside]

    def activated(self, a: torch.Tensor) -> torch.Tensor:
        """What W2 takes."""
        return F.gelu(a, approximate=self.form).to(self.dtype)


def _times(factor: Factor, y: torch.Tensor) -> torch.Tensor:
    return y if isinstance(factor, float) and factor == 1 else factor * y


def _is_dropped(factor: Factor) -> bool:
    return isinstance(factor, float) and factor == 0


def _forward(
    x: torch.Tensor,
    factors: torch.Tensor | None,
    gain: torch.Tensor,
    shift: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    taps: torch.Tensor,
    tap_bias: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    height: int,
    width: int,
    eps: float,
    form: str,
    dtype: torch.dtype,
    keep_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = [gain, shift, w1, b1, taps, tap_bias, w2, b2]
    with torch.autocast(x.device.type, enabled=False):
        call = _Call(x, parameters, height, width, eps, form, dtype, None)
        output = torch.empty_like(call.grid)
        kept = _kept_like(x, height, width, w1, dtype, keep_hidden)
        for pictures, factor, stripes in call.pieces(factors):
            if _is_dropped(factor):
                output[pictures] = call.grid[pictures]
                continue
            for top, bottom in stripes:
                rows, inside = call.around(top, bottom)
                h = call.hidden(call.normalized(pictures, rows)[0])
                if keep_hidden:
                    kept[pictures, top:bottom] = h[:, inside]
                a = call.convolved(h.to(call.inner), inside)
                y = _times(factor, F.linear(call.activated(a), call.w2, call.b2))
                output[pictures, top:bottom] = call.grid[pictures, top:bottom] + y
        return output.view(x.shape), kept


def _kept_like(
    x: torch.Tensor, height: int, width: int, w1: torch.Tensor, dtype: torch.dtype, keep: bool
) -> torch.Tensor:
    """Memory for h, or none."""
    shape = (x.shape[0], height, width, w1.shape[0]) if keep else (0,)
    return x.new_empty(shape, dtype=dtype)


def _gradients(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    factors: torch.Tensor | None,
    kept: torch.Tensor,
    parameters: list[torch.Tensor],
    height: int,
    width: int,
    eps: float,
    form: str,
    dtype: torch.dtype,
    of_parameters: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of x and, where they are asked for, of the parameters."""
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        call = _Call(x, parameters, height, width, eps, form, dtype, kept if kept.numel() else None)
        grad_output = grad_output.contiguous().view(call.grid.shape)
        grad_x = torch.empty_like(call.grid)
        sums = [torch.zeros_like(one, dtype=wide) for one in parameters] if of_parameters else []
        for pictures, factor, stripes in call.pieces(factors):
            if _is_dropped(factor):
                grad_x[pictures] = grad_output[pictures]
                continue
            waiting = None
            for top, bottom in stripes:
                waiting = _stripe_gradients(
                    call, pictures, factor, top, bottom, waiting, grad_output, grad_x, sums
                )
        return grad_x.view(x.shape), [
            one.to(like.dtype) for one, like in zip(sums, parameters, strict=False)
        ]


def _stripe_gradients(
    call: _Call,
    pictures: slice,
    factor: Factor,
    top: int,
    bottom: int,
    waiting: torch.Tensor | None,
    grad_output: torch.Tensor,
    grad_x: torch.Tensor,
    sums: list[torch.Tensor],
) -> torch.Tensor | None:
    """Write and add the gradients of a stripe; return the last two rows of that of h.

    Args:
        waiting: what the stripe before has returned.
    """
    rows, inside = call.around(top, bottom)
    z, mean, rstd = call.normalized(pictures, rows)
    h = call.hidden(z) if call.kept is None else call.kept[pictures, rows]
    h = h.to(call.inner)
    a = call.convolved(h, inside)
    g = _times(factor, grad_output[pictures, top:bottom]).to(call.dtype)
    g_activated = _product(g, call.w2).to(call.inner)
    g_a = torch.empty_like(h)
    g_a[:, : inside.start] = 0  # D has no such rows here
    g_a[:, inside.stop :] = 0
    torch.ops.aten.gelu_backward.grad_input(
        g_activated, a, approximate=call.form, grad_input=g_a[:, inside]
    )
    g_h, g_taps, g_tap_bias = torch.ops.aten.convolution_backward(
        *(g_a.permute(0, 3, 1, 2), h.permute(0, 3, 1, 2), call.taps, [len(call.taps)]),
        *(*_DEPTHWISE, len(call.taps), [True, bool(sums), bool(sums)]),
    )
    g_h = g_h.permute(0, 2, 3, 1)
    if waiting is not None:
        g_h[:, :2] += waiting
    is_last = bottom == call.grid.shape[1]
    count = g_h.shape[1] if is_last else g_h.shape[1] - 2
    done = slice(rows.start, rows.start + count)
    g_done = g_h[:, :count].to(call.dtype)
    g_z = _product(g_done, call.w1).to(call.outer)
    g_x, g_gain, g_shift = torch.ops.aten.native_layer_norm_backward(
        *(g_z, call.grid[pictures, done].to(call.outer).contiguous(), g_z.shape[3:]),
        *(mean[:, :count].contiguous(), rstd[:, :count].contiguous()),
        *(call.gain, call.shift, [True, bool(sums), bool(sums)]),
    )
    grad_x[pictures, done] = g_x + grad_output[pictures, done]
    if sums:
        of_gain, of_shift, of_w1, of_b1, of_taps, of_tap_bias, of_w2, of_b2 = sums
        of_gain += g_gain
        of_shift += g_shift
        of_taps += g_taps
        of_tap_bias += g_tap_bias
        _add_linear(of_w1, of_b1, g_done, z[:, :count])
        _add_linear(of_w2, of_b2, g, call.activated(a))
    return None if is_last else g_h[:, count:]


def _product(grid: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return (grid.flatten(0, 2) @ matrix).view(*grid.shape[:3], -1)


def _add_linear(
    of_weight: torch.Tensor, of_bias: torch.Tensor, g: torch.Tensor, inputs: torch.Tensor
) -> None:
    """Add the gradients of a linear map of `inputs` whose output has the gradient `g`."""
    g, inputs = g.flatten(0, 2), inputs.flatten(0, 2)
    if g.dtype == of_weight.dtype:
        of_weight.addmm_(g.t(), inputs)
    else:
        of_weight += g.t() @ inputs
    of_bias += g.sum(0, dtype=of_bias.dtype)


# ------------------------------------------------------------------------------- registration

_PARAMETERS = (
    "Tensor gain, Tensor shift, Tensor w1, Tensor b1, Tensor taps, Tensor tap_bias, Tensor w2, "
    "Tensor b2"
)
_OPTIONS = "SymInt height, SymInt width, float eps, str form, ScalarType dtype"


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, factors, *parameters = inputs[:10]
    kept = output[1]
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(x, factors, kept, *parameters)
    ctx.options = inputs[10:15]


def _backward(ctx: Any, grad_output: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(_ONCE)
    x, factors, kept, *parameters = ctx.saved_tensors
    of_parameters = any(ctx.needs_input_grad[2:10])
    grad_x, gradients = torch.ops.fastseg.mix_ffn_gradients(
        grad_output, x, factors, kept, parameters, *ctx.options, of_parameters
    )
    return grad_x, None, *(gradients if of_parameters else [None] * 8), *[None] * 6


def _fake_forward(
    x: torch.Tensor, factors: torch.Tensor | None, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    w1 = arguments[2]
    height, width, _, _, dtype, keep_hidden = arguments[8:]
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    return output, _kept_like(x, height, width, w1, dtype, keep_hidden)


def _fake_gradients(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    factors: torch.Tensor | None,
    kept: torch.Tensor,
    parameters: list[torch.Tensor],
    *options: Any,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    contiguous = torch.contiguous_format
    gradients = [torch.empty_like(one, memory_format=contiguous) for one in parameters]
    return grad_x, gradients if options[-1] else []


register_differentiable(
    f"mix_ffn_with_gradients(Tensor x, Tensor? factors, {_PARAMETERS}, {_OPTIONS}, "
    "bool keep_hidden) -> (Tensor, Tensor)",
    run=_forward,
    fake=_fake_forward,
    setup_context=_keep,
    backward=_backward,
)
register_plain(
    "mix_ffn_gradients(Tensor grad_output, Tensor x, Tensor? factors, Tensor kept, "
    f"Tensor[] parameters, {_OPTIONS}, bool of_parameters) -> (Tensor, Tensor[])",
    run=_gradients,
    fake=_fake_gradients,
)

"""Activation functions of the Mix-FFN by transformers' names: eager callables, and in kernels.

In kernels every function is a handful of float32 instructions around `exp2`, in forms that neither
overflow to NaN nor cancel. GELU is exact, not the tanh form: its erf is Abramowitz and Stegun's
7.1.26, with which GELU is at most 4.3e-7 off in float32. With the C library's erf it would cost
more than the convolution that it is fused to.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..core.optional_triton import tl, triton


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, "gelu_new" in transformers."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """The product x * sigmoid(1.702 x), an approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "silu": F.silu,
    "swish": F.silu,
}


def activated(name: str, x: torch.Tensor) -> torch.Tensor:
    """`ACTIVATIONS[name]` of `x`, which nobody needs any more: GELU in its memory."""
    if name == "gelu" and not torch.compiler.is_compiling():
        return torch.ops.aten.gelu.out(x, out=x)
    return ACTIVATIONS[name](x)


@triton.jit
def reciprocal(x):
    """Reciprocal of positive x, up to rounding; 0 from 2^64 on.

    One instruction of the special-function unit and one product, where a division takes seven: it
    scales its operands, lest they leave float32's range on the way.
    """
    return tl.rsqrt(x * x)


@triton.jit
def gelu(x):
    """GELU: x times the normal distribution's integral up to x."""
    LOG2_E: tl.constexpr = 1.4426950408889634  # not a global: see primitives.py
    t = reciprocal(1.0 + 0.23164189 * tl.abs(x))
    # erfc / 2: half of the published coefficients, z = |x| / sqrt(2).
    series = 0.5307027145 * t - 0.7265760135
    series = series * t + 0.7107068705
    series = series * t - 0.142248368
    series = series * t + 0.127414796
    tail = series * t * tl.exp2(x * x * (-0.5 * LOG2_E))
    return x * tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def times_sigmoid(x, y):
    """The product x * sigmoid(y); where exp2 overflows to infinity the sigmoid is 0."""
    LOG2_E: tl.constexpr = 1.4426950408889634  # not a global: see primitives.py
    return x * reciprocal(1.0 + tl.exp2(y * -LOG2_E))


@triton.jit
def mish(x):
    """Mish: x * tanh(softplus(x)), the tanh as a ratio in exp(-|x|), which cannot overflow."""
    LOG2_E: tl.constexpr = 1.4426950408889634  # not a global: see primitives.py
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    numerator = tl.where(x > 0, 1.0 + 2.0 * e, e * (e + 2.0))
    return x * numerator * reciprocal(numerator + tl.where(x > 0, 2.0 * e * e, 2.0))


@triton.jit
def selu(x):
    """SELU; exp(x) - 1 by its series near 0, where the difference would cancel."""
    LOG2_E: tl.constexpr = 1.4426950408889634  # not a global: see primitives.py
    series = 1.0 + x * (0.2 + x * 0.0333333333)
    series = 1.0 + x * (0.5 + x * (0.1666666667 + x * 0.0416666667 * series))
    negative = tl.where(x > -0.3, x * series, tl.exp2(x * LOG2_E) - 1.0)
    return 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * negative)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The function of `ACTIVATIONS` of that name, on float32."""
    if ACTIVATION == "gelu":
        y = gelu(x)
    elif ACTIVATION == "gelu_new" or ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        y = times_sigmoid(x, x * (1.5957691216057308 + 0.07135481627 * x * x))
    elif ACTIVATION == "mish":
        y = mish(x)
    elif ACTIVATION == "quick_gelu":
        y = times_sigmoid(x, 1.702 * x)
    elif ACTIVATION == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "relu6":
        y = tl.where(x > 6.0, 6.0, tl.where(x < 0, 0.0, x))
    elif ACTIVATION == "selu":
        y = selu(x)
    else:
        tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "swish")
        y = times_sigmoid(x, x)
    return y

"""Cross-entropy of logits that are first resized to the labels: the resized logits never exist.

    loss = sum_i w[y_i] (logsumexp_k u_ki - u_{y_i, i}) / sum_i w[y_i],     u = resize(logits)

Its gradient has the size of the logits, and is made in the same pass: the loss is a number, so
backward has but to multiply by its gradient, and nothing is resized or exponentiated twice. The
eager twin is in `tiles.py`, the kernels in `kernels.py` and `gradient.py`; each begins with its
algebra.

One class, with u its logit, is two with the logits 0 and u: softplus(u) - u y.

It is no `Op` of the registry: those make up a forward, have one result and no gradient.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch

from ..core.checks import KERNEL_DTYPES
from ..core.configurations import Candidates, Config, look_up, product
from ..core.dispatch import select_backend, use_triton
from ..core.launch import ceil_div, launch
from ..core.optional_triton import interpreting
from ..core.registry import register_differentiable
from ..core.semaphores import is_capturing
from .axis import Axis
from .gradient import upsample_cross_entropy_gradient_kernel
from .kernels import upsample_cross_entropy_kernel
from .tiles import eager, is_channels_last, raise_wrong_label

NAME = "upsample_cross_entropy"
_MAX_COLUMNS = 8  # pixels of a cell's row that one lane takes
_GRADIENT_PIXELS = 16  # of a cell that are taken at once
_MOST_CLASSES = 2**15 - 1  # labels are kept as int16
_NONE_WRONG = 2**63 - 1
_ONCE = (
    f"{NAME}: there are no gradients of gradients, and so neither create_graph=True nor "
    "torch.func; cross_entropy(interpolate(logits, size), labels) has them, and "
    "so has a model's loss inside fastseg.plain_path()"
)
_KERNEL_LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def fused(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernels: what `eager` returns, and the index of the first wrong label.

    With a wrong label the loss is NaN.
    """
    if logits.shape[1] == 1:
        both = torch.cat([torch.zeros_like(logits), logits], dim=1)
        options = weight, ignore_index, label_smoothing, align_corners, wants_gradient
        total, count, gradient, wrong = fused(both, labels, *options)
        gradient = gradient[:, 1:].contiguous() if wants_gradient else gradient
        return total, count, gradient, wrong
    batch, classes, height, width = logits.shape
    size, device = labels.shape[1:], logits.device
    gradient_shape = logits.shape if wants_gradient else (0,)
    gradient = torch.empty(gradient_shape, dtype=torch.float32, device=device)
    if batch == 0:
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return zero, zero.clone(), gradient, torch.full((), _NONE_WRONG, device=device)
    labels = labels.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    spread = all_weights = None
    if label_smoothing:
        class_weight = torch.ones(classes, device=device) if weight is None else weight
        spread = (logits.float() * class_weight.view(-1, 1, 1)).sum(1).contiguous()
        all_weights = class_weight.sum()
    kept = torch.empty(labels.shape, dtype=torch.float32, device=device)
    kept_labels = torch.empty(labels.shape, dtype=torch.int16, device=device)
    axes = [Axis.of(*pair, align_corners) for pair in zip(size, (height, width), strict=True)]
    sizes = {"classes": classes, "outputs": labels.numel()}
    strides_and_sizes = (*logits.stride(), height, width, *size, *axes[0], *axes[1])
    smoothing = (1 - label_smoothing, label_smoothing / classes)
    cell = [ceil_div(axis.step, axis.divisor) for axis in axes]  # the most pixels that one has

    config = look_up(NAME, device, logits.dtype, sizes)
    rows, columns, row_parts, column_parts = _parts(cell, config.pop("LANE_OUTPUTS"))
    blocks = ceil_div((height + 1) * (width + 1), config["BLOCK"])
    grid = (batch * blocks, row_parts, column_parts)
    programs = grid[0] * grid[1] * grid[2]
    partials = torch.empty(2, programs, dtype=torch.float32, device=device)
    wrong = torch.empty(programs, dtype=torch.int64, device=device)
    launch(
        upsample_cross_entropy_kernel,
        grid,
        *(logits, logits.amax(1).float().contiguous(), spread, labels, weight),
        *(kept, kept_labels, partials, wrong, *strides_and_sizes),
        *(ignore_index, *smoothing, all_weights, blocks),
        CLASSES=classes,
        KEEP=wants_gradient,
        ROWS=rows,
        COLUMNS=columns,
        APPROXIMATE=_approximates(),
        **config,
    )
    if wants_gradient:
        config = look_up(f"{NAME}_gradient", device, logits.dtype, sizes)
        rows, columns, row_parts, column_parts = _parts(cell, _GRADIENT_PIXELS)
        column_blocks = ceil_div(width, config["BLOCK"] - 1)
        row_chunks = ceil_div(height, config["CHUNK"])
        launch(
            upsample_cross_entropy_gradient_kernel,
            (batch * column_blocks * row_chunks, ceil_div(classes, config["GROUP"])),
            *(logits, kept, kept_labels, weight, gradient, *strides_and_sizes),
            *(*smoothing, column_blocks, row_chunks),
            CLASSES=classes,
            SMOOTH=label_smoothing > 0,
            ROWS=rows,
            COLUMNS=columns,
            ROW_PARTS=row_parts,
            COLUMN_PARTS=column_parts,
            APPROXIMATE=_approximates(),
            **config,
        )
    total, count = (one.sum(dtype=torch.float64).float() for one in partials)
    return total, count, gradient, wrong.amin()


def _parts(cell: list[int], lane_outputs: int) -> tuple[int, int, int, int]:
    """Rows and columns of a cell that a lane takes at once, and how many times."""
    column_parts = ceil_div(cell[1], _MAX_COLUMNS)
    columns = ceil_div(cell[1], column_parts)
    row_parts = ceil_div(cell[0], max(lane_outputs // columns, 1))
    return ceil_div(cell[0], row_parts), columns, row_parts, column_parts


def _approximates() -> bool:
    return torch.version.hip is None and not interpreting()


def supports(logits: torch.Tensor, labels: torch.Tensor) -> str | None:
    """Reason why the kernels cannot take these; None where they can."""
    if logits.dtype not in KERNEL_DTYPES:
        return f"there are no kernels for {logits.dtype}"
    classes, *grid = logits.shape[1:]
    if classes > _MOST_CLASSES:
        return f"{classes} classes are more than {_MOST_CLASSES}"
    for source, target in zip(grid, labels.shape[1:], strict=True):
        if target * (2 * source + 3) >= 2**31:
            return "32-bit positions pass their end"
        if target > 65535 * source:
            return "more parts of a cell than a grid's axis has places"
    return None


def _gradient_candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    # One warp: a lane's neighbour is reached without shared memory.
    return product(BLOCK=(32,), GROUP=(2, 3, 5, 8), CHUNK=(8, 16, 32), num_warps=(1,))


CANDIDATES: dict[str, Candidates] = {
    NAME: lambda half, sizes: product(
        BLOCK=(64, 128, 256), LANE_OUTPUTS=(8, 16), PREFETCH=(1, 2, 4), num_warps=(2, 4)
    ),
    f"{NAME}_gradient": _gradient_candidates,
}


# ------------------------------------------------------------------------------- registration


def _run(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The registered op, on any device."""
    device = logits.device
    arguments = (logits, labels, weight, ignore_index, label_smoothing, align_corners)
    kernels = select_backend(device)[0] == "triton"
    if kernels and use_triton(NAME, device, supports(logits, labels)):
        total, count, gradient, first_wrong = fused(*arguments, wants_gradient)
        # A capture cannot wait for an answer; the loss is NaN there.
        if device.type != "cuda" or not is_capturing(device):
            index = int(first_wrong)
            if index != _NONE_WRONG:
                raise_wrong_label(labels, index, max(logits.shape[1], 2), ignore_index)
        return total, count, _as_logits(gradient, logits)
    labels = labels.to(torch.int64)  # which alone compares with any `ignore_index`
    # Autocast would round the products inside, which are in float32 on purpose.
    with torch.autocast(device.type, enabled=False):
        total, count, gradient = eager(logits, labels, *arguments[2:], wants_gradient)
    return total, count, _as_logits(gradient, logits)


def _fake(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    number, shape = (), logits.shape if wants_gradient else (0,)
    made = [torch.empty(one, dtype=dtype, device=logits.device) for one in (number, number, shape)]
    return made[0], made[1], _as_logits(made[2], logits)


def _as_logits(gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """It in the memory format of channels-last logits of a CPU, whose backward would turn it."""
    if gradient.numel() and is_channels_last(logits):
        return gradient.contiguous(memory_format=torch.channels_last)
    return gradient


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, count, gradient = output
    ctx.mark_non_differentiable(count, gradient)
    ctx.set_materialize_grads(False)  # zeros for each of them
    ctx.save_for_backward(gradient)
    ctx.dtype, ctx.shape = inputs[0].dtype, inputs[0].shape


def _backward(ctx: Any, of_total: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(_ONCE)
    if of_total is None:
        return (None,) * 7
    (gradient,) = ctx.saved_tensors
    # Not rounded before it is multiplied: a GradScaler's factor is in `of_total`.
    return (gradient * of_total).to(ctx.dtype), *[None] * 6


register_differentiable(
    f"{NAME}(Tensor logits, Tensor labels, Tensor? weight, int ignore_index, "
    "float label_smoothing, bool align_corners, bool wants_gradient) -> (Tensor, Tensor, Tensor)",
    run=_run,
    fake=_fake,
    setup_context=_keep_gradient,
    backward=_backward,
)


# ------------------------------------------------------------------------- the public function


def upsample_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = 255,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
    empty: str = "nan",
) -> torch.Tensor:
    """Cross-entropy of logits resized to their labels, with a gradient of the logits' own size.

    Equal to `cross_entropy(interpolate(logits, labels.shape[1:], mode="bilinear"), labels, ...)`
    of torch.nn.functional with the same options, without ever having the resized logits in memory.
    Inside it computes in float32 (float64 for float64 logits), under autocast too.

    With one class it is `binary_cross_entropy_with_logits`, of labels 0 and 1; negative labels are
    ignored as well, and the mean is over all pixels, ignored ones as zeros: as transformers has it.

    Args:
        logits: (B, K, h, w), floating, of any strides.
        labels: (B, H, W) class numbers, of any integer type; H x W may be smaller than h x w.
        ignore_index: the label of pixels that do not count; transformers' 255, not torch's -100.
        weight: (K,) of the classes, for K > 1; it gets no gradient.
        label_smoothing: from 0 to 1, for K > 1.
        reduction: "mean", of K > 1 classes over the weights of the pixels that count; or "sum".
        align_corners: as of `interpolate`.
        empty: the mean where no pixel counts: "nan" as torch has it, or "zero". The gradient is 0.

    Returns:
        The loss, (), float32, or float64 of float64 logits. It can be differentiated once.

    Raises:
        TypeError: `logits` is not a floating tensor, `labels` not one of integers.
        ValueError: shapes or devices do not match, an option is unknown, or a label is neither a
            class nor ignored: the first such one is named, with its place. Inside a CUDA graph
            capture, which cannot stop, the loss is NaN instead.
        RuntimeError: inside of a transform of torch.func; for backward with create_graph=True.
    """
    _check(logits, labels, weight, label_smoothing, reduction, empty)
    if torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(_ONCE)
    classes = logits.shape[1]
    if classes == 1 or labels.dtype not in _KERNEL_LABELS:
        labels = labels.to(torch.int64)
    if classes == 1:
        labels = torch.where(labels < 0, ignore_index, labels)
    # Asked here: inside of the op nothing requires gradients.
    wants_gradient = torch.is_grad_enabled() and logits.requires_grad
    total, count, _ = torch.ops.fastseg.upsample_cross_entropy(
        *(logits, labels, weight, ignore_index, float(label_smoothing), align_corners),
        wants_gradient,
    )
    if reduction == "sum":
        return total
    if classes == 1:
        return total / labels.numel()
    # The gradient of 0 / 0 would be NaN, where torch's is 0.
    mean = total / torch.where(count > 0, count, 1.0)
    return mean if empty == "zero" else torch.where(count > 0, mean, torch.nan)


def _check(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    label_smoothing: float,
    reduction: str,
    empty: str,
) -> None:
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        got = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"logits: expected a floating-point tensor, got {got}")
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits: expected shape (batch, classes, height, width), got {tuple(logits.shape)}"
        )
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.is_complex():
        got = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"labels: expected a tensor of integers, got {got}")
    batch, classes = logits.shape[:2]
    if labels.ndim != 3 or labels.shape[0] != batch or 0 in labels.shape[1:]:
        raise ValueError(
            f"labels: expected shape ({batch}, height, width), got {tuple(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels: expected a tensor on {logits.device}, got {labels.device}")
    if classes == 1 and (weight is not None or label_smoothing):
        name = "weight" if weight is not None else "label_smoothing"
        raise ValueError(f"{name}: there is none for one class, the binary form")
    if weight is not None:
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            got = getattr(weight, "dtype", type(weight).__name__)
            raise TypeError(f"weight: expected a floating-point tensor, got {got}")
        if tuple(weight.shape) != (classes,) or weight.device != logits.device:
            raise ValueError(
                f"weight: expected shape ({classes},) on {logits.device}, "
                f"got {tuple(weight.shape)} on {weight.device}"
            )
    if not isinstance(label_smoothing, numbers.Real) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if empty not in ("nan", "zero"):
        raise ValueError(f"empty: expected 'nan' or 'zero', got {empty!r}")

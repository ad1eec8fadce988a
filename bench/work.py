"""The least work of ops and of whole forwards, and the least time that it takes on a device.

Bytes: each input, weight and output of an op passes once between memory and chip. What a fused op
need not write does not count: hidden tensors, keys and values, projections of coarse maps. FLOPs:
of matrix products and convolutions, two for a multiply-add, as torch's FlopCounterMode counts the
eager twin on meta tensors. A kernel may do more of either; none can do with less, but for inputs
that were left in a cache.

Not in it: instructions that are no matrix product (softmax, activation, interpolation, comparison),
which bound some of the ops before bytes and FLOPs do.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import fastseg
from fastseg.kernels.core import configurations, dispatch, registry
from fastseg.kernels.core.launch import Launch, record_launches
from fastseg.kernels.tune.calls import OpCall, OpRecorder

from .setting import CLASSES, DTYPES


class Work(NamedTuple):
    """What has to be done at least."""

    bytes: int
    flops: int


class Ceilings(NamedTuple):
    """What a device can do at best."""

    bytes_per_second: float
    flops_per_second: float

    def floor_ms(self, works: Iterable[Work]) -> float:
        """The least time of one after another: of each the larger of that of bytes and of FLOPs."""
        return sum(
            1e3 * max(one.bytes / self.bytes_per_second, one.flops / self.flops_per_second)
            for one in works
        )


def total(works: Iterable[Work]) -> Work:
    """The sum of bytes and that of FLOPs."""
    return Work(*map(sum, zip(*works, strict=True)))


def work(call: OpCall) -> Work:
    """The least work of `call`; nothing of it is computed."""
    arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), call.arguments)
    on_meta = OpCall(call.op, arguments)
    op = registry.OPS[call.op]
    derived = () if op.weights is None else op.weights.derived
    needed = [value for name, value in arguments.items() if name not in derived]
    moved = tree_leaves([*needed, on_meta.bind(getattr(torch.ops.fastseg, call.op))()])
    flops = 0
    if op.multiplies:
        flops = counted_flops(on_meta.bind(registry.eager_twin(call.op)))
    return Work(sum(one.nbytes for one in moved if isinstance(one, torch.Tensor)), flops)


def counted_flops(function: Callable[[], Any]) -> int:
    """FLOPs of the matrix products and convolutions in a call, which makes meta tensors."""

    def of_product_with_a_vector(matrix: Any, vector: Any, **rest: Any) -> int:
        return 2 * matrix[0] * matrix[1]

    missing_in_torch = {torch.ops.aten.mv: of_product_with_a_vector}
    counter = FlopCounterMode(display=False, custom_mapping=missing_in_torch)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return int(counter.get_total_flops())


@contextlib.contextmanager
def pretend_gpu(family: str = "default") -> Iterator[None]:
    """Meta tensors inside the block dispatch to kernels, configured for `family`."""
    with (
        mock.patch.object(dispatch, "_device_reason", return_value=None),
        mock.patch.object(configurations, "device_family", return_value=family),
        torch.no_grad(),
    ):
        yield


@functools.cache
def forward_work(
    variant: str, size: tuple[int, int], batch: int, dtype: str, labels: bool = False
) -> Sequence[Work]:
    """The least work of each op of a forward, pixels to logits or `labels`, in order.

    It needs neither a GPU nor Triton.
    """
    calls: list[OpCall] = []
    # Outside of inference mode, in which edits of weights are not counted, nor folds kept.
    with torch.inference_mode(False), pretend_gpu(), fastseg.backend("auto"):
        model, pixels = meta_model(variant, size, batch, DTYPES[dtype])
        with OpRecorder(calls.append):
            logits = model(pixels).logits
            if labels:
                fastseg.kernels.upsample_argmax(logits, size)
        works = {call.key(): work(call) for call in {call.key(): call for call in calls}.values()}
        return [works[call.key()] for call in calls]


def meta_model(
    variant: str, size: tuple[int, int], batch: int, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model without memory, and pixels for it."""
    with torch.device("meta"):
        model = fastseg.from_preset(f"segformer_{variant}", num_classes=CLASSES)
    return model.eval().to(dtype), torch.empty(batch, 3, *size, device="meta", dtype=dtype)


class Trace(NamedTuple):
    """Of a forward: its kernels in order, and the compute operators of torch beside them."""

    launches: list[Launch]
    torch_operators: list[str]


def trace(function: Callable[..., Any], *arguments: Any) -> Trace:
    """Call `function` on meta tensors that are dispatched to kernels, and tell what it launches.

    It is called twice, and the second call counts: the first folds weights and makes buffers.
    """
    with record_launches(dry=True), registry.RunsLaunchers():
        function(*arguments)
    with record_launches(dry=True) as launches, registry.RunsLaunchers() as mode:
        function(*arguments)
    return Trace(launches, mode.torch_operators)


def trace_model(
    variant: str, size: tuple[int, int], batch: int, dtype: torch.dtype, family: str
) -> Trace:
    """What a forward of `variant` to its label map would launch on `family`."""
    with pretend_gpu(family):
        model, pixels = meta_model(variant, size, batch, dtype)
        return trace(lambda: fastseg.kernels.upsample_argmax(model(pixels).logits, size))


def labels_work(classes: int, size: tuple[int, int]) -> Work:
    """From float32 logits, a quarter as high and wide, to a label map of `size` (H, W).

    Comparing classes is no FLOP here.
    """
    height, width = size
    logits, labels = 4 * classes * (height // 4) * (width // 4), 8 * height * width  # int64
    return Work(logits + labels, 0)


def seggpt_config(layers: int) -> fastseg.SegGptConfig:
    """The published model's configuration with a multiple of 4 layers."""
    step = layers // 4
    taken = [step * (index + 1) - 1 for index in range(4)]
    return fastseg.SegGptConfig(
        num_hidden_layers=layers,
        merge_index=min(2, taken[0]),
        intermediate_hidden_state_indices=taken,
    )


def seggpt_work(layers: int, dtype: str) -> Sequence[Work]:
    """The least work of each op of a SegGPT's forward, pixel values to painted masks.

    An op is a product with the norm before it and the activation or residual behind it, an
    attention with its relative positions, and the decoder's convolutions with what is between.
    """
    config = seggpt_config(layers)
    (height, width), channels, patch = config.grid, config.hidden_size, config.patch_size
    tokens, hidden = height * width, config.decoder_hidden_size
    size = DTYPES[dtype].itemsize

    def product(rows: int, inputs: int, outputs: int, residual: bool = False) -> Work:
        moved = rows * inputs + (inputs + 1) * outputs + (1 + residual) * rows * outputs
        return Work(size * moved, 2 * rows * inputs * outputs)

    tables = (2 * height - 1 + 2 * width - 1) * channels // config.num_attention_heads
    attention = Work(
        size * (4 * tokens * channels + tables),
        2 * tokens * channels * (2 * tokens + height + width),
    )
    layer = [
        product(tokens, channels, 3 * channels),
        attention,
        product(tokens, channels, channels, residual=True),
        product(tokens, channels, config.mlp_dim),
        product(tokens, config.mlp_dim, channels, residual=True),
    ]
    pixels = tokens * patch**2
    colours, taken = config.num_channels, len(config.intermediate_hidden_state_indices)
    weights = (9 * hidden + 3) * hidden + (hidden + 1) * colours  # with those of the norm
    painting = Work(
        size * (pixels * (hidden + colours) + weights),
        2 * pixels * hidden * (9 * hidden + colours),
    )
    return [
        product(2 * tokens, colours * patch**2, channels),  # both streams
        *(layers + config.merge_index + 1) * layer,
        product(tokens, taken * channels, patch**2 * hidden),
        painting,
    ]


# What a device does at best

H200 = Ceilings(bytes_per_second=4.3e12, flops_per_second=790e12)  # as docs/compiles.md says
_SECONDS = 1.0  # that a ceiling is measured for, warm-up included
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}  # beyond any cache
_PIECE_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}
# Short products and copies of short pieces escape what else runs on a CPU; long products fill its
# cores.
_SIDES = {"cuda": (8192,), "cpu": (256, 512, 2048)}


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """What a large copy and a large matrix product reach on `device`, with the threads set."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = source.clone()  # in memory, before any time is taken
    # Piece after piece: each has left the caches before its turn comes again.
    piece = _PIECE_BYTES[device.type]
    pieces = itertools.cycle(zip(target.split(piece), source.split(piece), strict=True))

    def copy() -> None:
        to, source = next(pieces)
        to.copy_(source)

    bytes_per_second = 2 * piece / least_seconds(copy, device)  # read and written
    best = 0.0
    for side in _SIDES[device.type]:
        if best and 2 * side**3 / best > _SECONDS:
            break  # a CPU has no fast product of this dtype
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = functools.partial(torch.mm, left, right)
        best = max(best, 2 * side**3 / least_seconds(product, device))
    return Ceilings(bytes_per_second, best)


def least_seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Of many runs, with warm clocks, the fastest: what else runs only adds to a run.

    A ceiling still follows the machine, whose clock and neighbours may change between it and what
    it is compared with.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    least, stop = float("inf"), time.perf_counter() + _SECONDS
    while (start := time.perf_counter()) < stop:
        function()
        wait()
        least = min(least, time.perf_counter() - start)
    return least

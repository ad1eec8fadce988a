"""Calls of ops that a small model makes, and torch's count of FLOPs, for tests of benchmarks."""

from __future__ import annotations

import math

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fastseg
from bench import op_cases, pairs
from fastseg.kernels.core import registry

DEPTHS = [1, 2, 1, 3]
SIZE, BATCH = (64, 96), 2
CPU = torch.device("cpu")


def tiny_model(variant="b0", device=CPU, dtype=torch.float32):
    config = fastseg.SegformerConfig(
        depths=DEPTHS,
        hidden_sizes=[32, 64, 64, 128],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        num_labels=5,
    )
    model = fastseg.SegformerForSemanticSegmentation(config).eval()
    pairs.draw_weights(model)
    return model.to(device, dtype)


def recorded(dtype=torch.float32, size=SIZE, batch=BATCH):
    pixels = op_cases.build_pixels(size, batch, CPU, dtype)
    with torch.no_grad():
        return op_cases.record(tiny_model(dtype=dtype), pixels)


def eager(call):
    return call.bind(registry.EAGER[call.op])()


class _Counter(TorchDispatchMode):
    """torch's FlopCounterMode hooks modules, and a model with hooks does not run folded."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet is torch.ops.aten.mv:  # which torch does not count
            self.flops += 2 * math.prod(args[0].shape)
        return result


def counted_flops(function):
    """FLOPs of the matrix products and convolutions in a call of `function`, by torch's formulas.

    Given meta tensors, it counts what the eager twins do for a GPU: on a CPU they interpolate by
    products, and compute borders of stripes twice.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
        function()
    return counter.flops

"""bench.work: the least work of ops and forwards against torch's own counts and the paper's."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import work
from bench.machine import ROOT
from bench.setting import preset
from bench.work import Ceilings, Work
from fastseg.kernels.core import registry
from tests.bench.cases import CPU, KNOWN, recorded

# G of multiply-adds, at 512x512 and for B5 at 640x640.
PAPER = {"b0": 8.4, "b1": 15.9, "b2": 62.4, "b3": 79.0, "b4": 95.7, "b5": 183.3}


class Counter(TorchDispatchMode):
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


@pytest.mark.parametrize("variant", PAPER)
def test_counts_of_transformers_are_the_published_ones(variant):
    side = 640 if variant == "b5" else 512
    names = ("depths", "hidden_sizes", "decoder_hidden_size", "num_labels")
    known = {name: getattr(preset(variant), name) for name in names}
    config = transformers.SegformerConfig(**known, attn_implementation="eager")
    with torch.device("meta"):
        model = transformers.SegformerForSemanticSegmentation(config).eval()
        pixels = torch.empty(1, 3, side, side)
    found = work.counted_flops(lambda: model(pixels)) / 2e9
    assert found == pytest.approx(PAPER[variant], rel=3e-3)


@pytest.mark.parametrize(("variant", "share"), [("b0", 0.48), ("b2", 0.373)])
def test_what_the_fold_leaves(variant, share):
    """As README.md says."""
    folded = work.total(work.forward_work(variant, (512, 512), 1, "float32")).flops
    assert folded / 2e9 / PAPER[variant] == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(
    ("variant", "size", "batch"),
    [("b0", (512, 512), 1), ("b0", (33, 97), 3), ("b2", (517, 389), 2)],
)
@pytest.mark.slow
def test_flops_of_a_forward_are_what_torch_counts(variant, size, batch):
    """Also where the spatial reduction does not divide the grid."""
    model, pixels = work.meta_model(variant, size, batch, torch.bfloat16)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(pixels)  # folds the weights, which takes products too
        with Counter() as counter:
            model(pixels)
    counted = work.total(work.forward_work(variant, size, batch, "bfloat16"))
    assert counted.flops == counter.flops
    to_labels = work.total(work.forward_work(variant, size, batch, "bfloat16", labels=True))
    logits = 2 * 150 * batch * -(-size[0] // 4) * -(-size[1] // 4)
    assert to_labels.flops == counter.flops
    assert to_labels.bytes == counted.bytes + logits + 8 * batch * size[0] * size[1]


# What an op can do without: it follows from the weights that it gets too.
SUMS = ("query_weight_sum", "key_value_weight_sum", "sr_weight_sum", "fc1_weight_sum")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_an_op_are_those_of_inputs_and_result(dtype):
    """Counted by storage: nothing twice, and nothing but sums of weights left out."""
    for call in recorded(dtype):
        output = call.bind(registry.eager_twin(call.op))()
        needed = [value for name, value in call.arguments.items() if name not in SUMS]
        tensors = [one for one in tree_leaves(needed) if isinstance(one, torch.Tensor)]
        found = [one.untyped_storage() for one in tensors]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in found}
        expected = sum(sizes.values()) + output.untyped_storage().nbytes()
        assert work.work(call).bytes == expected, call.op


def test_work_of_label_maps():
    logits, labels = torch.empty(1, 19, 16, 24), torch.empty(1, 64, 96, dtype=torch.int64)
    assert work.labels_work(19, (64, 96)) == Work(logits.nbytes + labels.nbytes, 0)


def test_a_floor_is_the_larger_of_bytes_and_flops():
    known = Ceilings(bytes_per_second=1e12, flops_per_second=1e14)
    by_bytes, by_flops = Work(bytes=10**7, flops=10**9), Work(bytes=10**6, flops=10**10)
    assert known.floor_ms([by_bytes]) == pytest.approx(0.01)
    assert known.floor_ms([by_flops]) == pytest.approx(0.1)
    assert known.floor_ms([by_bytes, by_flops]) == pytest.approx(0.11)


@pytest.mark.slow
def test_ops_need_no_other_library_and_floors_no_triton():
    code = f"""
import sys; sys.modules["triton"] = sys.modules["transformers"] = None
import torch; torch.set_grad_enabled(False)
import bench.measure.ops
from bench.work import Ceilings, forward_work
with torch.inference_mode():
    print({KNOWN}.floor_ms(forward_work("b0", (64, 96), 2, "bfloat16")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120, capture_output=True
    )
    assert float(done.stdout) == KNOWN.floor_ms(work.forward_work("b0", (64, 96), 2, "bfloat16"))


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr(work, "_SECONDS", 0.05)
    known = work.ceilings(CPU, torch.float32)
    assert 1e8 < known.bytes_per_second < 1e13
    assert 1e8 < known.flops_per_second < 1e14

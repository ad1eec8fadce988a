"""Sizes of 1, which Triton makes constants of a kernel, compile too, on the oldest Triton as well.

Where a stride or the width of a decode head is 1 another kernel is compiled than elsewhere. Models
of common images have none, so no other ahead-of-time test sees such kernels; nor grids so small.
"""

from __future__ import annotations

import pytest
import torch

from fastseg.kernels.core import optional_triton

if not optional_triton.HAS_TRITON or optional_triton.interpreting():
    pytest.skip("compiling needs Triton, not its interpreter", allow_module_level=True)

from bench.ahead_of_time import SHARED_LIMIT, compile_launch
from bench.work import pretend_gpu, trace, trace_model
from fastseg.kernels import layer_norm, upsample_argmax
from fastseg.kernels.core.launch import Launch
from fastseg.kernels.tune.precompile import key
from tests.kernels.triton.attention.attention_cases import sr_attention
from tests.kernels.triton.attention.attention_cases import weights as attention_weights
from tests.kernels.triton.embed.embed_cases import parameters, patch_embed
from tests.kernels.triton.ffn.ffn_cases import mix_ffn
from tests.kernels.triton.ffn.ffn_cases import weights as ffn_weights
from tests.kernels.triton.head.head_cases import B0, decode_head, head
from tests.kernels.triton.kernel_cases import GRIDS, randn

META, HALF = torch.device("meta"), torch.bfloat16
LAYERS = ((32, 1, 8), (64, 1, 8), (64, 2, 4), (128, 2, 4), (160, 5, 2), (320, 5, 2), (512, 8, 1))
MOST, PARTS = 50, 4


def calls():
    """Calls of ops with small and odd sizes."""
    for height, width in GRIDS:
        for channels, heads, sr_ratio in LAYERS:
            x = randn(1, height * width, channels, dtype=HALF, device=META)
            yield lambda x=x: layer_norm(x)
            folded = ffn_weights(channels, HALF, META)
            yield lambda x=x, f=folded, g=(height, width): mix_ffn(x, *g, **f)
            if min(height, width) >= sr_ratio:
                folded = attention_weights(channels, heads, sr_ratio, HALF, META)
                yield lambda x=x, f=folded, g=(height, width): sr_attention(x, *g, **f)
        for channels, kernel, stride in ((3, 7, 4), (64, 3, 2)):
            x = randn(1, channels, height, width, dtype=HALF, device=META)
            layer = parameters(channels, 160, kernel, HALF, META)
            how = {"stride": stride, "padding": kernel // 2, "eps": 1e-6}
            yield lambda x=x, layer=layer, how=how: patch_embed(x, *layer, **how)
        maps = [(-(-height // s), -(-width // s)) for s in (1, 2, 4, 8)]
        for classes in (1, 2, 19):
            arguments = head(1, maps, B0, 256, classes, HALF, META)
            yield lambda a=arguments: decode_head(*a)
            logits = randn(1, classes, height, width, dtype=HALF, device=META)
            yield lambda x=logits, g=(4 * height, 4 * width): upsample_argmax(x, g)
            yield lambda x=logits, g=(height + 1, 3 * width): upsample_argmax(x, g)


def ones(launch: Launch) -> int:
    """How many arguments Triton takes for constants because they are 1."""
    pairs = zip(launch.kernel.params, launch.arguments, strict=False)
    return sum(type(x) is int and x == 1 and not one.do_not_specialize for one, x in pairs)


@pytest.fixture(scope="module")
def launches():
    """Those with most ones, each kernel once."""
    found = []
    with pretend_gpu("sm_90"):
        for call in calls():
            found += trace(call).launches
    for size in ((32, 32), (32, 64), (33, 75)):
        found += trace_model("b0", size, 1, HALF, "sm_90").launches
    unique = list({key(launch): launch for launch in found}.values())
    return sorted(unique, key=ones, reverse=True)[:MOST]


@pytest.mark.oldest
@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_sizes_of_one_compile(part, launches, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing from before hides a failure
    assert len(launches) == MOST
    assert ones(launches[19]) >= 1  # strides, the head's width; other sizes are no constants
    assert len({launch.name for launch in launches}) >= 8
    for launch in launches[part::PARTS]:
        compiled = compile_launch(launch, "sm_90", count=False)
        assert compiled.spill_bytes == 0, (launch.name, launch.options)
        assert compiled.shared_bytes <= SHARED_LIMIT["sm_90"], (launch.name, launch.options)

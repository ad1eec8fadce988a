"""Races of shared memory in compiled kernels, found in their PTX by SentryWard, without a GPU.

One CTA of each kernel, compiled for sm_80: SentryWard 0.1 does not know sm_90's wgmma. Two lanes
that write one address between barriers are a race too, though a harmless one where both hold the
same value, as lanes of a reduction do: Triton does that, and compute-sanitizer only tells it. Such
kernels are listed. Between a read and a write there may be none.
"""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch

from fastseg.kernels.core import optional_triton

if not optional_triton.HAS_TRITON or optional_triton.interpreting():
    pytest.skip("compiling needs Triton, not its interpreter", allow_module_level=True)

ptx_native = pytest.importorskip("sentryward.frontend.ptx_native", reason="no sentryward")

from bench.ahead_of_time import text_of  # noqa: E402
from bench.work import trace_model  # noqa: E402

pytestmark = pytest.mark.slow
_SECONDS = 400.0  # per_head's pairs take 145

# Kernels in which lanes with equal values write one address, by triton 3.9; 3.7 makes two fewer.
EQUAL_WRITES = {
    *("linear_kernel", "patch_embed_pixels_kernel", "patch_embed_whole_row_kernel"),
    *("per_head_kernel", "sr_partials_kernel", "tail_kernel"),
}
UNCHECKED = {"sr_key_value_kernel": "SentryWard 0.1.1 does not know atom.acq_rel"}


@functools.cache
def launches():
    """The first launch of each kernel in B0 and B2."""
    found = {}
    for variant, batch in (("b0", 1), ("b2", 1), ("b0", 8)):
        for launch in trace_model(variant, (512, 512), batch, torch.bfloat16, "sm_80").launches:
            found.setdefault(launch.name, launch)
    return found


def check(launch, text, folder, **options):
    """What SentryWard says of one CTA of `launch`, whose PTX is `text`."""
    names = re.findall(r"\.param \.(\w+)(?: \.ptr \.global \.align \d+)? (\w+_param_\d+)", text)
    values = [
        value
        for parameter, value in zip(launch.kernel.params, launch.arguments, strict=False)
        if not (parameter.is_constexpr or value is None or (type(value) is int and value == 1))
    ]
    arguments = [
        {"parameter": name, "type": kind, "value": value}
        for (kind, name), value in zip(names, values, strict=False)  # Triton adds some of its own
        if not isinstance(value, torch.Tensor)
    ]
    dimensions = {"grid_dim": [1, 1, 1], "block_dim": [32 * launch.options["num_warps"], 1, 1]}
    given = {"schema": "spverify.kernel-input/v1", "launch": dimensions, "arguments": arguments}
    (folder / "kernel.ptx").write_text(text)
    (folder / "input.json").write_text(json.dumps(given))
    return ptx_native.run_ptx(
        str(folder / "kernel.ptx"),
        str(folder / "input.json"),
        pipeline_timeout_seconds=_SECONDS,
        wellsync_timeout_seconds=_SECONDS,
        semantic_assumptions={"representative_branches": True},
        sync_threads=2,
        **options,
    )


def pairs(result):
    """Of each race: what its sides do, as "write/write", and whether in one line of the source."""
    found = []
    for race in result.get("races") or []:
        first, second = race["first"], race["second"]
        where = [(side["location"]["file"], side["location"]["line"]) for side in (first, second)]
        found.append((f"{first['mode']}/{second['mode']}", where[0] == where[1]))
    return found


@pytest.mark.parametrize("name", sorted(launches()))
def test_no_read_meets_a_write(name, tmp_path):
    launch = launches()[name]
    text = text_of(launch, "sm_80", "ptx")
    result = check(launch, text, tmp_path)
    if name in UNCHECKED:
        assert result["result"] == "unsupported"  # else it can be checked now
        pytest.skip(UNCHECKED[name])
    if result["result"] == "potential_race":
        result = check(launch, text, tmp_path, exhaustive_memory_search=True)
    if result["result"] == "timeout":
        pytest.skip(f"no verdict within {_SECONDS:.0f} s")
    if name in EQUAL_WRITES and result["result"] == "potential_race":
        assert set(pairs(result)) == {("write/write", True)}
    else:
        assert result["result"] == "race_free", (result, pairs(result))


def test_a_missing_barrier_is_found(tmp_path):
    launch = launches()["one_head_kernel"]
    text = text_of(launch, "sm_80", "ptx")
    assert "bar.sync" in text
    result = check(launch, re.sub(r"bar\.sync\s+\d+;", "", text), tmp_path)
    assert result["result"] == "potential_race"
    assert any("read" in kinds for kinds, _ in pairs(result))

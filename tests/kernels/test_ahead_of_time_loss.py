"""The loss's kernels compiled for GPUs that are not here: nothing runs."""

from __future__ import annotations

import pytest
import torch

from fastseg.kernels.core import optional_triton

if not optional_triton.HAS_TRITON or optional_triton.interpreting():
    pytest.skip("compiling needs Triton, not its interpreter", allow_module_level=True)

from bench.ahead_of_time import SHARED_LIMIT, text_of
from bench.measure import compiles
from bench.work import pretend_gpu
from fastseg.kernels.core.launch import record_launches
from fastseg.kernels.loss.op import fused
from tests.kernels.test_ahead_of_time import complaints, launch_ranges, overflows

GRID = (128, 128)


def launches(target, dtype, classes, size, smoothing=0.0, batch=2, grid=GRID):
    logits = torch.empty(batch, classes, *grid, device="meta", dtype=dtype)
    labels = torch.empty(batch, *size, device="meta", dtype=torch.int64)
    weight = torch.empty(classes, device="meta") if smoothing else None
    with pretend_gpu(compiles.family_of(target)), record_launches(dry=True) as found:
        fused(logits, labels, weight, 255, smoothing, False, True)
    if target.startswith("gfx"):  # AMD has no such instruction, which a launcher there knows
        found = [one._replace(options={**one.options, "APPROXIMATE": False}) for one in found]
    assert len(found) == 2
    return found


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    """Nothing that an earlier run compiled may hide a failure."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("target", "dtype", "classes", "size", "smoothing"),
    [
        ("sm_90", torch.bfloat16, 150, (256, 256), 0.0),
        ("sm_80", torch.float32, 19, (128, 256), 0.1),
        *(
            pytest.param(target, dtype, 150, (512, 512), smoothing, marks=pytest.mark.slow)
            for target in SHARED_LIMIT
            for dtype, smoothing in ((torch.float32, 0.1), (torch.bfloat16, 0.0))
        ),
        pytest.param("sm_90", torch.float32, 2, (1024, 1024), 0.0, marks=pytest.mark.slow),
        pytest.param("sm_90", torch.float16, 19, (683, 512), 0.0, marks=pytest.mark.slow),
        pytest.param("sm_90", torch.float32, 21, (4096, 4096), 0.0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiles(target, dtype, classes, size, smoothing):
    assert not complaints(launches(target, dtype, classes, size, smoothing), target, half=False)


@pytest.mark.slow
def test_offsets_pass_32_bits():
    """A batch whose logits, labels and gradient have more than 2^31 elements each."""
    sizes = {"batch": 1100, "grid": (1024, 1024)}
    for launch in launches("sm_90", torch.float32, 19, (2048, 2048), **sizes):
        text = text_of(launch, "sm_90", "ttir")
        assert not overflows(text, launch_ranges(launch, text)), launch.name

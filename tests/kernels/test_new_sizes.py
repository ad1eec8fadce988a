"""What compiles when an image of another size comes, and what loads lose by serving any size."""

from __future__ import annotations

import random
import re

import pytest
import torch

from fastseg.kernels.core import optional_triton

if not optional_triton.HAS_TRITON or optional_triton.interpreting():
    pytest.skip("compiling needs Triton, not its interpreter", allow_module_level=True)

from bench.ahead_of_time import text_of
from bench.work import trace_model
from fastseg.kernels.tune.precompile import key


def kernels(size: tuple[int, int]) -> dict[str, object]:
    launches = trace_model("b0", size, 1, torch.bfloat16, "sm_90").launches
    return {key(launch): launch for launch in launches}


def test_a_second_size_compiles_little():
    """Of 34 kernels; it was 27 with the sizes specialised."""
    first, odd = kernels((512, 512)), kernels((517, 389))
    new = [launch.name for name, launch in odd.items() if name not in first]
    assert len(new) <= 3, new


@pytest.mark.slow
def test_twelve_sizes_at_random():
    """165 kernels where sizes are specialised; they differ in the tiles of their configurations."""
    draw = random.Random(0)
    sizes = [(draw.randint(200, 1100), draw.randint(200, 1900)) for _ in range(12)]
    assert len(set().union(*map(kernels, sizes))) <= 80


_WIDE = r"(?:ld|st)\.global[\w.:]*\.v4\.\w+|(?:ld|st)\.global[\w.:]*\.v2\.b64|cp\.async\.c[ag]"


@pytest.mark.slow
def test_loads_are_as_wide_as_for_one_size(monkeypatch, tmp_path):
    """The same counts of wide loads and stores as where Triton knows that sizes divide by 16."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in kernels((512, 512)).values():
        ours = re.findall(_WIDE, text_of(launch, "sm_90", "ptx"))
        with monkeypatch.context() as patch:
            for parameter in launch.kernel.params:
                patch.setattr(parameter, "do_not_specialize", False)
            specialized = re.findall(_WIDE, text_of(launch, "sm_90", "ptx"))
        assert len(ours) == len(specialized), launch.name

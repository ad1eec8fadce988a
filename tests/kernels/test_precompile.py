"""What is compiled in processes beforehand is what launches find in Triton's cache."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from concurrent.futures import BrokenExecutor

import pytest
import torch

import fastseg
from fastseg.kernels.core import optional_triton

if not optional_triton.HAS_TRITON or optional_triton.interpreting():
    pytest.skip("compiling needs Triton, not its interpreter", allow_module_level=True)

import triton

from bench.work import trace_model
from fastseg.kernels.tune.precompile import Precompiler, key

# In a fresh process a forward goes through Triton's own JIT, up to a launcher that does nothing.
FORWARD = """
import json, torch
from triton import knobs
from triton.runtime import driver
from bench.work import pretend_gpu
import fastseg
from fastseg.kernels.core.registry import RunsLaunchers
from fastseg.kernels.tune.precompile import pretend_device

class Utils:
    def load_binary(self, *arguments):
        return 1, 1, 32, 0, 1024
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

class Launcher:
    def __init__(self, source, metadata):
        pass
    def __call__(self, *arguments):
        pass

pretend_device("sm_90")
driver.active.utils, driver.active.launcher_cls = Utils(), Launcher
hits = []
knobs.compilation.listener = lambda *, src, cache_hit, **rest: hits.append((src.name, cache_hit))
model = fastseg.from_preset("segformer_b0", num_classes=150).eval().to(torch.bfloat16)
pixels = torch.zeros(1, 3, 512, 512, dtype=torch.bfloat16)
with pretend_gpu("sm_90"), RunsLaunchers():
    fastseg.kernels.upsample_argmax(model(pixels).logits, (512, 512))
print(json.dumps(hits))
"""


# A program without a guard for its main module, whose processes must not run it again.
PROGRAM = """
import torch
from triton import knobs
from fastseg.kernels.tune.precompile import compile_missing, pretend_device
from bench.work import trace_model
print("main runs")
pretend_device("sm_90")
launches = trace_model("b0", (512, 512), 1, torch.bfloat16, "sm_90").launches[:8]
print(compile_missing(launches))
hits = []
knobs.compilation.listener = lambda *, src, cache_hit, **rest: hits.append(cache_hit)
print(compile_missing(launches), len(hits) >= 4 and all(hits))
"""


@pytest.fixture(scope="module")
def launches():
    return trace_model("b0", (512, 512), 1, torch.bfloat16, "sm_90").launches


@pytest.mark.slow
def test_launches_of_a_fresh_process_hit_the_cache(launches, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with Precompiler("sm_90", processes=2) as pool:
        done = [one.result() for one in pool.begin(launches)]
    assert len(done) == len({key(launch) for launch in launches})
    assert not [one for one in done if one.error]
    program = [sys.executable, "-c", FORWARD]
    said = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    hits = json.loads(said.splitlines()[-1])
    missed = [name for name, hit in hits if not hit]
    assert len(hits) >= 34
    # On a CPU the weights of depthwise convolutions are laid out otherwise, and only theirs.
    assert set(missed) <= {"tail_kernel", "depthwise_kernel"}
    assert len(missed) <= 6


@pytest.mark.oldest
def test_keys_do_not_depend_on_what_was_used_before():
    """With triton 3.6 a function's globals are in a kernel's key if they are known by then."""
    functions = {}
    for module in pkgutil.walk_packages(fastseg.kernels.__path__, "fastseg.kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, triton.JITFunction):
                functions[f"{value.fn.__module__}.{value.__name__}"] = value
    assert len(functions) > 40

    def keys(names):
        for function in functions.values():
            function.hash, function.used_global_vals = None, {}
        return {name: functions[name].cache_key for name in names}

    forth, back = keys(sorted(functions)), keys(sorted(functions, reverse=True))
    alone = {name: keys([name])[name] for name in functions}
    assert forth == back == alone


@pytest.mark.slow
def test_what_the_cache_lacks_is_compiled_by_a_pool(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    said = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=True, env=environment
    ).stdout.split("\n")
    assert said[0] == "main runs"
    assert int(said[1]) >= 4
    assert said[2:] == ["0 True", ""]


@pytest.mark.slow
def test_a_compiler_that_dies_is_no_error(launches):
    with Precompiler("sm_90", processes=1) as pool:
        assert isinstance(pool._pool.submit(os._exit, 1).exception(), BrokenExecutor)
        with pytest.warns(UserWarning, match="nothing is compiled beforehand any more"):
            assert pool.begin(launches) == []


@pytest.mark.slow
def test_each_kernel_is_compiled_once_and_failures_are_told(launches, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    norm = next(launch for launch in launches if launch.name == "layer_norm_kernel")
    wrong = norm._replace(options={**norm.options, "BLOCK_M": 3})  # no power of two
    with Precompiler("sm_90", processes=1) as pool:
        first = pool.begin([norm, norm, wrong])
        assert pool.begin([norm]) == first[:1]
        right, failed = (one.result() for one in first)
    assert (right.kernel, right.error) == ("layer_norm_kernel", None)
    assert right.seconds > 0
    assert "power of 2" in failed.error

"""What only a GPU can show: streams, graphs, devices, the sanitizer. Not run in the interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseg
from fastseg.kernels import upsample_argmax
from tests.kernels.triton.kernel_cases import HAS_GPU
from tests.kernels.triton.test_model import tiny_model

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")

SIZE = (160, 96)


@pytest.fixture(params=["b0", "b1"])
def model(request, device):
    return tiny_model(request.param).to(device, torch.bfloat16)


def pixels(device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, *SIZE, generator=generator).to(device, torch.bfloat16)


def label_map(model, image):
    return upsample_argmax(model(image).logits, SIZE)


def logits(model, image):
    return model(image).logits


def test_forwards_are_bitwise_repeatable(model, device):
    image = pixels(device, 0)
    first = logits(model, image)
    for _ in range(20):
        assert torch.equal(logits(model, image), first)


def test_a_forward_does_not_wait_for_the_gpu(model, device):
    image = pixels(device, 0)
    label_map(model, image)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        label_map(model, image)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_streams(model, device):
    images = [pixels(device, seed) for seed in range(2)]
    expected = [logits(model, image) for image in images]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in images]
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(logits(model, images[index]))
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        assert all(torch.equal(one, expected[index]) for one in result)


def capture(function, static_image):
    """A CUDA graph of `function(static_image)` and its static result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(static_image)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(static_image)
    return graph, result


def test_graph_replay_with_changing_inputs(model, device):
    static = pixels(device, 0).clone()
    graph, result = capture(lambda image: label_map(model, image), static)
    for seed in range(1, 6):
        image = pixels(device, seed)
        static.copy_(image)
        result.fill_(-1)
        graph.replay()
        assert torch.equal(result, label_map(model, image))


def test_two_graphs_at_once(model, device):
    statics = [pixels(device, seed) for seed in range(2)]
    graphs = [capture(lambda image: logits(model, image), static) for static in statics]
    expected = [logits(model, static) for static in statics]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, result), reference in zip(graphs, expected, strict=True):
        assert torch.equal(result, reference)


def test_a_device_that_is_not_the_current_one(model):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    image = pixels(torch.device("cuda:0"), 0)
    expected = logits(model.to("cuda:0"), image)
    with torch.cuda.device(0):
        result = logits(model.to("cuda:1"), image.to("cuda:1"))
    assert torch.equal(result.cpu(), expected.cpu())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_forward_has_no_graph_breaks(mode, model, device):
    """In "reduce-overhead" torch warms up on a stream and in a memory pool of its own."""
    compiled = torch.compile(
        lambda image: logits(model, image), fullgraph=True, dynamic=False, mode=mode
    )
    for seed in range(5):
        image = pixels(device, seed)
        assert torch.equal(compiled(image).clone(), logits(model, image))


def test_warmup(model, device):
    fastseg.warmup(model, [(1, 3, 64, 64), (2, 3, *SIZE)])
    assert logits(model, pixels(device, 0)).isfinite().all()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    """Out-of-bounds accesses and races of shared memory, over a small model in each dtype."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [
            *(program, "--tool", tool, "--error-exitcode", "99"),
            *(sys.executable, "-m", "tests.kernels.triton.sanitizer_cases"),
        ],
        cwd=Path(__file__).parents[3],
        # Each tensor an allocation of its own, so that memcheck sees where it ends.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

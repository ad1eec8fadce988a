"""`fastseg.graphed` with real CUDA graphs; the rest of its tests need no GPU."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
import transformers
from torch import nn

import fastseg
from tests.kernels.triton.kernel_cases import HAS_GPU
from tests.kernels.triton.test_model import tiny_model

pytestmark = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")

SIZE = (160, 96)


@pytest.fixture
def model(device):
    return tiny_model("b0").to(device, torch.bfloat16)


def pixels(seed, size=SIZE, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator).to("cuda", torch.bfloat16)


def capture(runner, *args, **kwargs):
    before = len(runner._graphs)
    for _ in range(2):
        runner(*args, **kwargs)
    assert len(runner._graphs) == before + 1, runner.report()


def replays(runner):
    return runner._counts["replays"]


def test_replays_with_changing_inputs(model):
    runner = fastseg.graphed(model)
    sizes = [SIZE, (64, 64), (33, 75)]
    for size in sizes:
        capture(runner, pixels(0, size))
    images = [pixels(seed, size) for seed in range(5) for size in sizes]
    results = [runner(image).logits for image in images]  # all kept: none is overwritten
    assert replays(runner) == len(images), runner.report()
    for image, result in zip(images, results, strict=True):
        expected = model(image).logits
        assert torch.equal(result, expected)
        assert result.stride() == expected.stride()


def test_a_replay_does_not_wait_for_the_gpu(model):
    runner = fastseg.graphed(model)
    image = pixels(0)
    capture(runner, image)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner(image)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert replays(runner) == 1


def test_weights_that_change(model):
    runner = fastseg.graphed(model)
    image = pixels(0)
    for step in range(3):
        for _ in range(4):
            assert torch.equal(runner(image).logits, model(image).logits)
        layer = model.segformer.encoder.block[step][0]
        layer.mlp.dense1.weight.mul_(-1)
        layer.attention.self.query.weight.data.mul_(2)
        model.refold()
    assert replays(runner) == 5, runner.report()


def test_folded_weights_outlive_the_model_that_folded_them(model):
    """Dropped folds are folded into other memory; what takes their place must not be read."""
    runner = fastseg.graphed(model)
    image = pixels(0)
    capture(runner, image)
    expected = model(image).logits
    runner.train()
    runner.eval()
    junk = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(200)]
    for _ in range(4):
        assert torch.equal(runner(image).logits, expected)
    del junk


def test_streams_and_threads(model):
    runner = fastseg.graphed(model, max_graphs=2)
    images = [pixels(index, (64, 32 * (1 + index % 3))) for index in range(6)]
    expected = [model(image).logits for image in images]
    torch.cuda.synchronize()
    failures = []

    def work(index):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for round_ in range(30):
                which = (index + round_) % len(images)
                result = runner(images[which]).logits
                junk = torch.full_like(result, float("nan"))
                if not torch.equal(result, expected[which]):
                    failures.append(which)
                del junk

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not failures
    assert replays(runner) > 0


def test_memory_comes_back(model):
    image = pixels(0, (256, 256))
    model(image)
    runner = fastseg.graphed(model, max_graphs=1)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    capture(runner, image)
    held = torch.cuda.memory_allocated() - before
    assert held > 0
    for size in ((128, 128), (64, 64)):
        for _ in range(2):
            runner(pixels(0, size))
    assert torch.cuda.memory_allocated() - before < held
    assert "2 evictions" in runner.report()
    runner.clear()
    gc.collect()
    # What is left: the counters of a capture's stream, never freed.
    assert torch.cuda.memory_allocated() - before < 1 << 20
    capture(runner, image)
    assert torch.equal(runner(image).logits, model(image).logits)


class Synchronizing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(x) * x.sum().item()


class Raising(nn.Module):
    def forward(self, x):
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("not while a graph is captured")
        return x + 1


@pytest.mark.parametrize("failing", [Synchronizing, Raising])
def test_nothing_is_left_of_a_failed_capture(failing, model):
    runner = fastseg.graphed(failing().eval().cuda())
    x = torch.randn(8, 64, device="cuda")
    stream = torch.cuda.current_stream()
    runner(x)
    with pytest.warns(RuntimeWarning, match=r"inputs \(8, 64\) run without a graph"):
        runner(x)
    assert torch.equal(runner(x), runner.model(x))
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    torch.randn(8, device="cuda")  # the generator is not in capture
    torch.cuda.synchronize()
    good = fastseg.graphed(model)
    image = pixels(0)
    capture(good, image)
    assert torch.equal(good(image).logits, model(image).logits)


def test_workspaces_of_libraries():
    """What anybody frees, or takes, is not what a graph uses."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64 * 30 * 30, 512)).eval()
    runner = fastseg.graphed(model.cuda())
    images = [torch.randn(4, 3, 32, 32, device="cuda") for _ in range(3)]
    expected = [model(image) for image in images]
    capture(runner, images[0])
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    junk = [torch.full((1 << 20,), 7, device="cuda") for _ in range(50)]
    for image, reference in zip(images, expected, strict=True):
        torch.testing.assert_close(runner(image), reference, rtol=1e-4, atol=1e-4)
    assert all((tensor == 7).all() for tensor in junk)
    assert replays(runner) == 3


def test_autocast(model):
    model = model.float()
    runner = fastseg.graphed(model)
    image = pixels(0).float()
    with fastseg.backend("auto"), torch.autocast("cuda", torch.bfloat16):
        capture(runner, image)
        torch.testing.assert_close(runner(image).logits, model(image).logits, rtol=2e-2, atol=2e-2)
    assert replays(runner) == 1


def test_inside_another_capture(model):
    runner = fastseg.graphed(model)
    image = pixels(0)
    capture(runner, image)
    expected = runner(image).logits
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = runner(image).logits
    graph.replay()
    assert torch.equal(result, expected)
    assert "the current stream is capturing a graph" in runner.report()


def test_a_compiled_model(model):
    runner = fastseg.graphed(torch.compile(model, fullgraph=True, dynamic=False))
    image = pixels(0)
    capture(runner, image)
    for seed in range(3):
        image = pixels(seed)
        assert torch.equal(runner(image).logits, model(image).logits)
    assert replays(runner) == 3


def test_warmup_and_segment(model):
    runner = fastseg.graphed(model)
    runner.warmup([(1, 3, 64, 64)])
    processor = fastseg.SegformerImageProcessor(size={"height": 64, "width": 64})
    image = torch.randint(0, 256, (48, 80, 3), dtype=torch.uint8).numpy()
    (labels,) = fastseg.segment(runner, [image], processor=processor)
    (expected,) = fastseg.segment(model, [image], processor=processor)
    assert torch.equal(labels, expected)
    assert replays(runner) == 1


def test_a_device_that_is_not_the_current_one(model):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    runner = fastseg.graphed(model.to("cuda:1"))
    image = pixels(0).to("cuda:1")
    with torch.cuda.device(0):
        capture(runner, image)
        assert torch.equal(runner(image).logits, model(image).logits)
    runner.to("cuda:0")
    for _ in range(4):
        assert torch.equal(runner(pixels(0)).logits, model(pixels(0)).logits)
    assert replays(runner) == 3


@pytest.fixture
def by_default(model):
    """A model that replays graphs without being asked to, as users have it."""
    with fastseg.graphs(True):
        yield model


def test_graphs_by_default(by_default, model):
    images = [pixels(seed) for seed in range(5)]
    results = [by_default(image).logits for image in images]
    assert replays(by_default.fastseg_graphs()) == 3, fastseg.report(by_default)
    with fastseg.graphs(False):
        for image, result in zip(images, results, strict=True):
            assert torch.equal(result, model(image).logits)


def test_graphs_by_default_see_changes(by_default):
    image = pixels(0)
    for step in range(3):
        for _ in range(4):
            result = by_default(image).logits
            with fastseg.graphs(False):
                assert torch.equal(result, by_default(image).logits)
        by_default.segformer.encoder.block[step][0].mlp.dense1.weight.mul_(-1)


def test_graphs_by_default_are_bounded(by_default):
    for side in range(64, 64 + 32 * 7, 32):
        for _ in range(2):
            by_default(pixels(0, (side, 64)))
    report = fastseg.report(by_default)
    assert "4 graphs of at most 4; 0 replays, 4 captures, 0 evictions" in report
    assert " MiB held" in report


def test_an_accelerated_model_replays(device):
    plain = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(hidden_sizes=[32, 64, 160, 256], decoder_hidden_size=64)
    )
    model = fastseg.accelerate(plain.to(device, torch.bfloat16).eval(), strict=True)
    image = pixels(1)
    with fastseg.graphs(True):
        results = [model(image).logits for _ in range(4)]
    assert replays(model.fastseg_graphs()) == 2, fastseg.report(model)
    assert all(torch.equal(result, results[0]) for result in results)


def test_launch_plans(model):
    """What runs without a graph: a third call of a key by a plan, a sliced input by its own."""
    wide = pixels(3, (SIZE[0], SIZE[1] + 1))
    inputs = [pixels(1), pixels(2), wide[..., 1:].contiguous(), wide[..., 1:]]
    expected = [copy.deepcopy(model)(image).logits for image in inputs]  # without a plan
    for _ in range(4):
        for image, logits in zip(inputs, expected, strict=True):
            assert torch.equal(model(image).logits, logits)

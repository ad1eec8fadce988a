"""Graphs by default, on recordings: models replay unasked, and stay what they are."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import fastseg
from fastseg.cuda_graphs.default import MAX_GRAPHS, SIGHTINGS_WHEN_FULL, Graphed
from fastseg.folding.swap import Accelerated
from tests.cuda_graphs.graph_cases import SHAPE, runner_of
from tests.model_cases import TINY, randomize, relative_error, tiny_model
from tests.models.hosts.test_parallel import replica_of


def hugging_face() -> nn.Module:
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**TINY))
    randomize(model.eval())
    return fastseg.accelerate(model)


@pytest.fixture(params=[tiny_model, hugging_face])
def model(request):
    return request.param()


def replays(model) -> int:
    held = model.fastseg_graphs()
    return 0 if held is None else held._counts["replays"]


def test_the_third_call_replays_and_equals_float64(model):
    reference = copy.deepcopy(model).double()
    results = []
    for number in range(5):
        pixels = torch.randn(SHAPE)
        logits = model(pixels).logits
        assert replays(model) == max(0, number - 1)
        with fastseg.plain_path(), fastseg.graphs(False):
            assert relative_error(logits, reference(pixels.double()).logits) <= 1e-5
        results.append((logits, logits.clone()))
    for logits, kept in results:
        assert torch.equal(logits, kept)  # the caller's own


def test_keyword_arguments_and_outputs(model):
    pixels = torch.randn(SHAPE)
    for _ in range(4):
        output = model(pixel_values=pixels, output_hidden_states=True, return_dict=True)
    assert replays(model) == 2
    with fastseg.graphs(False):
        expected = model(pixel_values=pixels, output_hidden_states=True, return_dict=True)
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_it_stays_the_same_module(model):
    plain = transformers.SegformerForSemanticSegmentation
    if isinstance(model, plain):
        assert type(model).__name__ == plain.__name__
        assert isinstance(model, transformers.PreTrainedModel)
        names = list(model.state_dict())
        for _ in range(2):
            model(torch.randn(SHAPE))
        capturer = model.fastseg_graphs()._capturer
        assert capturer.live == 1
        assert fastseg.restore(model) is model
        assert capturer.live == 0
        assert type(model) is plain
        assert not [name for name in vars(model) if "fastseg" in name]
        assert list(model.state_dict()) == names
    for _ in range(4):
        model(torch.randn(SHAPE))
    assert (replays(model) if isinstance(model, Graphed) else 0) == 2 * isinstance(model, Graphed)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_capture_for_themselves(model, copied):
    pixels = torch.randn(SHAPE)
    other = copied(model)  # transformers' hooks cannot be pickled after its first forward
    for _ in range(3):
        expected = model(pixels).logits
    other = copied(model) if isinstance(model, fastseg.SegformerForSemanticSegmentation) else other
    assert type(other) is type(model)
    assert other.fastseg_graphs() is None
    for _ in range(4):
        torch.testing.assert_close(other(pixels).logits, expected, rtol=1e-5, atol=1e-6)
    assert replays(other) == 2
    assert replays(model) == 1


def test_switched_off(model):
    pixels = torch.randn(SHAPE)
    with fastseg.graphs(False):
        for _ in range(3):
            model(pixels)
        assert model.fastseg_graphs() is None
        with fastseg.graphs(True):
            model(pixels)
        assert model.fastseg_graphs() is not None
    with pytest.raises(TypeError, match="enabled: expected a bool, got 1"), fastseg.graphs(1):
        pass
    with pytest.raises(TypeError, match="graphs: expected a bool, got None"):
        fastseg.accelerate(model, graphs=None)
    model(pixels)
    capturer = model.fastseg_graphs()._capturer
    assert capturer.live == 1
    fastseg.accelerate(model, graphs=False)
    assert capturer.live == 0
    for _ in range(3):
        model(pixels)
    assert model.fastseg_graphs() is None
    assert "no CUDA graphs, as fastseg.accelerate(graphs=False) says" in fastseg.report(model)
    assert not copy.deepcopy(model)._fastseg_graphs
    fastseg.accelerate(model)
    for _ in range(3):
        model(pixels)
    assert replays(model) == 1


@pytest.mark.every(2)
def test_memory_is_bounded_and_told(model):
    for width in range(64, 64 + 32 * (MAX_GRAPHS + 2), 32):
        for _ in range(3):
            model(torch.randn(1, 3, 64, width))
    held = model.fastseg_graphs()
    assert len(held._graphs) == held._capturer.live == MAX_GRAPHS
    label = type(model).__name__
    assert f"{label}: {MAX_GRAPHS} graphs of at most {MAX_GRAPHS}; " in fastseg.report(model)
    seldom = "4 calls ran eagerly: all graphs are of other inputs, and these come seldom"
    assert f"{label}: {seldom}" in fastseg.report(model)
    assert held._counts["captures"] == MAX_GRAPHS
    for _ in range(SIGHTINGS_WHEN_FULL):  # a size that comes often gets its graph all the same
        model(torch.randn(1, 3, 64, width))
    assert (held._counts["captures"], held._counts["evictions"]) == (MAX_GRAPHS + 1, 1)
    assert len(held._graphs) == held._capturer.live == MAX_GRAPHS


def test_changing_sizes_run_without(model):
    for width in range(64, 64 + 32 * 6, 32):
        model(torch.randn(1, 3, 64, width))
    held = model.fastseg_graphs()
    assert not held._graphs
    assert "6 calls ran eagerly: first with such inputs" in held.report()


@pytest.mark.every(2)
def test_training_gradients_and_tracing_run_without(model):
    pixels = torch.randn(SHAPE)
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    for number in range(3):
        with torch.enable_grad():
            model.train()(pixels, labels=labels).loss.backward()
        assert number > 0 or model.fastseg_graphs() is None
        model.eval()
        with torch.enable_grad():
            assert model(pixels).logits.requires_grad
    assert replays(model) == 0
    assert "gradients are on, and its weights or its input require them" in fastseg.report(model)
    for _ in range(3):
        logits = model(pixels).logits
    assert replays(model) == 1
    with torch.inference_mode():
        inference = model(pixels).logits
        assert torch.equal(inference, logits)
    model.zero_grad()


@pytest.mark.slow
def test_compiled_and_captured_by_others(model):
    pixels = torch.randn(SHAPE)
    compiled = torch.compile(model, backend="eager")
    expected = model(pixels).logits
    for _ in range(3):
        assert torch.equal(compiled(pixels).logits, expected)
    assert replays(model) == 0
    runner = fastseg.graphed(model)  # on a CPU without graphs of its own
    for _ in range(3):
        runner(pixels)
    assert replays(model) == 0


def test_a_replica_of_data_parallel(model):
    pixels = torch.randn(SHAPE)
    for _ in range(3):
        expected = model(pixels).logits
    replica = replica_of(model)
    torch.testing.assert_close(replica(pixels).logits, expected, rtol=1e-5, atol=1e-5)
    assert replays(model) == 1


def test_threads(model):
    images = [torch.randn(SHAPE) for _ in range(4)]
    with fastseg.graphs(False):
        expected = [model(image).logits for image in images]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(8):
                if not torch.equal(model(images[index]).logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert replays(model) == 30


def test_a_users_module_around_is_left_alone():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.SegformerForSemanticSegmentation(
                transformers.SegformerConfig(**TINY)
            )
            self.calls = 0

        def forward(self, pixels):
            self.calls += 1  # a graph would leave this out
            return self.model(pixels).logits

    around = fastseg.accelerate(Around().eval())
    assert not isinstance(around, Graphed)
    for _ in range(4):
        around(torch.randn(SHAPE))
    assert around.calls == 4
    assert replays(around.model) == 2
    encoder = next(m for m in around.model.segformer.modules() if isinstance(m, Accelerated))
    fastseg.restore(around)
    assert "no CUDA graphs by default" in fastseg.report(fastseg.accelerate(encoder))


def test_segment_and_warmup_use_them():
    model = tiny_model()
    fastseg.warmup(model, [(2, 3, 64, 64)])
    assert len(model.fastseg_graphs()._graphs) == 1
    image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    processor = fastseg.SegformerImageProcessor(size={"height": 64, "width": 64})
    for _ in range(4):
        labels = fastseg.segment(model, image, processor=processor)
    assert replays(model) == 2
    with fastseg.graphs(False):
        assert np.array_equal(labels, fastseg.segment(model, image, processor=processor))


def test_a_runner_that_was_captured_leaves_no_trace():
    """A capture of a model with a runner inside, after which others still have their graphs."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.runner = runner_of(tiny_model())

        def forward(self, pixels):
            return self.runner(pixels).logits

    outer, model = runner_of(Outer().eval()), tiny_model()
    for _ in range(3):
        outer(torch.randn(SHAPE))
        model(torch.randn(SHAPE))
    assert replays(model) == 1


def test_a_capture_that_fails_is_told_once(model):
    pixels = torch.randn(SHAPE)
    model(pixels)
    model.fastseg_graphs()._capturer.error = torch.OutOfMemoryError("out of memory")
    with pytest.warns(RuntimeWarning, match="run without a graph.*OutOfMemoryError"):
        model(pixels)
    expected = model(pixels).logits
    assert torch.equal(model(pixels).logits, expected)
    assert "calls ran eagerly: its capture failed: OutOfMemoryError" in fastseg.report(model)

"""`fastseg.graphed` on a CPU, on recordings in place of CUDA graphs: what its calls give."""

from __future__ import annotations

import contextlib
import copy
import operator
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

import fastseg
from fastseg.cuda_graphs.capture import ReadTensors
from tests.cuda_graphs.graph_cases import (
    SHAPE,
    Wrap,
    capture,
    runner_of,
)
from tests.model_cases import SMALL, TINY, relative_error, tiny_model, twins


def test_replays_equal_the_model_in_float64():
    hf_model, model = twins(**TINY)
    hf_model.double()
    runner = runner_of(model)
    for seed in range(5):
        pixels = torch.randn(2, 3, 33, 70, generator=torch.Generator().manual_seed(seed))
        logits = runner(pixels).logits
        assert relative_error(logits, hf_model(pixels.double()).logits) <= 2e-6
    assert runner._capturer.replays == 3
    assert "1 graphs of at most 8; 3 replays, 1 captures, 0 evictions" in runner.report()


def test_outputs_are_the_callers_own(runner, model):
    capture(runner, torch.randn(SHAPE), output_hidden_states=True)
    images = [torch.randn(SHAPE) for _ in range(2)]
    outputs = [runner(image, output_hidden_states=True) for image in images]
    for image, output in zip(images, outputs, strict=True):
        expected = model(image, output_hidden_states=True)
        assert type(output) is type(expected)
        assert list(output) == list(expected)
        assert output.loss is None
        assert torch.equal(output.logits, expected.logits)
        assert output.logits.stride() == expected.logits.stride()
        for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(ours, theirs)


def test_static_outputs_are_overwritten(model):
    runner = runner_of(model, copy_outputs=False)
    capture(runner, torch.randn(SHAPE))
    first = runner(torch.randn(SHAPE)).logits
    image = torch.randn(SHAPE)
    assert runner(image).logits.data_ptr() == first.data_ptr()
    assert torch.equal(first, model(image).logits)


def test_one_tensor_twice_stays_one():
    runner = runner_of(Wrap(lambda linear, x: dict.fromkeys("ab", linear(x))).eval())
    capture(runner, torch.ones(2, 4))
    output = runner(torch.ones(2, 4))
    assert output["a"] is output["b"]


@pytest.mark.parametrize("class_name", ["SegformerModel", "SegformerForImageClassification"])
def test_models_of_transformers(class_name):
    hf_model, _ = twins(class_name, **TINY)
    runner = runner_of(hf_model)
    capture(runner, torch.randn(SHAPE))
    image = torch.randn(SHAPE)
    output, expected = runner(pixel_values=image), hf_model(image)
    assert type(output) is type(expected)
    assert torch.equal(output[0], expected[0])
    assert runner._capturer.replays == 1


def test_accelerated_model_of_transformers():
    hf_model, _ = twins(**TINY)
    runner = runner_of(hf_model)
    capture(runner, torch.randn(SHAPE))
    fastseg.accelerate(hf_model)
    image = torch.randn(SHAPE)
    expected = hf_model(image)
    results = [runner(image) for _ in range(3)]
    assert runner._capturer.replays == 2  # that of the first graph was thrown away
    assert "1 times graphs dropped, for this changed: " in runner.report()
    assert all(torch.equal(result.logits, expected.logits) for result in results)


@pytest.mark.parametrize(
    "variant",
    [
        lambda: (contextlib.nullcontext(), torch.randn(1, 3, 64, 96), {}),
        lambda: (contextlib.nullcontext(), torch.randn(2, 3, 64, 64), {}),
        lambda: (
            contextlib.nullcontext(),
            torch.randn(SHAPE).contiguous(memory_format=torch.channels_last),
            {},
        ),
        lambda: (contextlib.nullcontext(), torch.randn(SHAPE), {"return_dict": False}),
        lambda: (contextlib.nullcontext(), torch.randn(SHAPE), {"output_hidden_states": True}),
        lambda: (torch.autocast("cpu", torch.bfloat16), torch.randn(SHAPE), {}),
        lambda: (fastseg.backend("eager"), torch.randn(SHAPE), {}),
        lambda: (fastseg.plain_path(), torch.randn(SHAPE), {}),
    ],
    ids=["size", "batch", "format", "tuple", "states", "autocast", "backend", "plain"],
)
def test_what_tells_graphs_apart(runner, model, variant):
    capture(runner, torch.randn(SHAPE))
    block, image, options = variant()
    with block:
        capture(runner, image, **options)
        image = torch.randn_like(image)
        output, expected = runner(image, **options), model(image, **options)
        assert torch.equal(output[0], expected[0])
    runner(torch.randn(SHAPE))
    assert runner._capturer.replays == 2
    assert runner._capturer.live == 2


@pytest.mark.parametrize("backend", ["cuda.matmul", "cudnn.conv"])
def test_precision_tells_graphs_apart(runner, backend):
    capture(runner, torch.randn(SHAPE))
    settings = operator.attrgetter(backend)(torch.backends)
    before = settings.fp32_precision
    settings.fp32_precision = "ieee" if before == "tf32" else "tf32"
    try:
        capture(runner, torch.randn(SHAPE))
    finally:
        settings.fp32_precision = before
    runner(torch.randn(SHAPE))
    assert runner._capturer.replays == 1


def test_arguments_by_name_and_views_share_a_graph(runner, model):
    capture(runner, torch.randn(SHAPE))
    image = torch.randn(1, 3, 80, 80)[:, :, 8:72, 8:72]
    assert torch.equal(runner(pixel_values=image).logits, model(image).logits)
    assert runner._capturer.replays == 1
    with pytest.raises(TypeError, match="multiple values"):
        runner(image, pixel_values=image)


def test_nested_arguments():
    model = Wrap(lambda linear, x, pairs, scale: linear(x) * scale + sum(p["y"] for p in pairs))
    runner = runner_of(model.eval())
    tensors = [torch.randn(2, 4) for _ in range(3)]
    arguments = [({"y": y}, {"y": y}) for y in tensors]
    capture(runner, tensors[0], arguments[0], scale=2.0)
    for x, pairs in zip(tensors, arguments, strict=True):
        assert torch.equal(runner(x, pairs, scale=2.0), model(x, pairs, scale=2.0))
    assert runner._capturer.replays == 3
    different = ({"y": tensors[0]}, {"y": tensors[1]})  # not the same tensor twice
    assert torch.equal(
        runner(tensors[0], different, scale=2.0), model(tensors[0], different, scale=2.0)
    )
    capture(runner, tensors[0], arguments[0], scale=3.0)


def test_the_graph_used_last_stays(model):
    runner = runner_of(model, max_graphs=2)
    shapes = [(1, 3, 32, 32 * width) for width in (1, 2, 3)]
    capture(runner, torch.randn(shapes[0]))
    capture(runner, torch.randn(shapes[1]))
    runner(torch.randn(shapes[0]))
    for _ in range(2):
        runner(torch.randn(shapes[2]))
    assert [recording.released for recording in runner._capturer.recordings] == [0, 1, 0]
    assert "1 evictions" in runner.report()
    image = torch.randn(shapes[1])
    for _ in range(3):
        assert torch.equal(runner(image).logits, model(image).logits)
    assert runner._capturer.live == 2
    runner.clear()
    assert runner._capturer.live == 0
    assert torch.equal(runner(image).logits, model(image).logits)


def test_warmup_captures_ahead_of_time(runner, model):
    runner.warmup([SHAPE, (2, 3, 33, 70)])
    image = torch.randn(2, 3, 33, 70)
    assert torch.equal(runner(image).logits, model(image).logits)
    assert runner._capturer.replays == 1
    with pytest.raises(ValueError, match="shapes: expected at most max_graphs=8, got 9"):
        runner.warmup([SHAPE] * 9)
    with pytest.raises(ValueError, match="shapes: expected"):
        runner.warmup([(3, 64, 64)])


@pytest.mark.slow
def test_a_compiled_model():
    model = tiny_model(**SMALL)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    runner = runner_of(compiled)
    image = torch.randn(SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        results = [runner(image).logits for _ in range(4)]
        assert all(relative_error(result, model(image).logits) <= 2e-6 for result in results)
        model.decode_head.classifier.weight.mul_(2)
        results = [runner(image).logits for _ in range(4)]
        assert all(relative_error(result, model(image).logits) <= 2e-6 for result in results)
    assert runner._capturer.replays == 5  # one was thrown away


def test_inference_mode(runner, model):
    with torch.inference_mode():
        capture(runner, torch.randn(SHAPE))
        image = torch.randn(SHAPE)
        assert torch.equal(runner(image).logits, model(image).logits)
        assert runner(image).logits.is_inference()
    image = torch.randn(SHAPE)
    result = runner(image).logits
    assert not result.is_inference()
    assert torch.equal(result, model(image).logits)
    assert runner._capturer.replays == 3


def test_threads(model):
    runner = runner_of(model, max_graphs=2)
    images = [torch.randn(1, 3, 32, 32 * (1 + index % 3)) for index in range(6)]
    expected = [model(image).logits for image in images]
    failures = []

    def work(index):
        with torch.no_grad():
            for round_ in range(12):
                which = (index + round_) % len(images)
                if not torch.equal(runner(images[which]).logits, expected[which]):
                    failures.append(which)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures
    assert runner._capturer.replays > 0


def test_a_runner_inside_a_model(model):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = runner_of(model)

        def forward(self, x):
            return self.inner(x).logits * 2

    outer = Outer().eval()
    runner = runner_of(outer)
    image = torch.randn(SHAPE)
    for step in range(4):
        for _ in range(3):
            assert torch.equal(runner(image), 2 * model(image).logits)
        model.decode_head.classifier.bias.add_(step)
    assert runner._capturer.replays > 0


def test_it_stands_in_for_the_model(runner, model):
    image = torch.randint(0, 256, (48, 80, 3), dtype=torch.uint8).numpy()
    processor = fastseg.SegformerImageProcessor(size={"height": 64, "width": 64})
    (expected,) = fastseg.segment(model, [image], processor=processor)
    for _ in range(3):
        (labels,) = fastseg.segment(runner, [image], processor=processor)
        assert torch.equal(labels, expected)
    assert runner._capturer.replays == 1
    fastseg.warmup(runner, [SHAPE])
    assert runner.config is model.config
    assert runner.eval() is runner
    assert runner.to(torch.float64) is runner
    assert model.dtype == torch.float64
    assert list(runner.state_dict()) == list(model.state_dict())
    assert fastseg.report(runner) == fastseg.report(model)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = runner.nothing
    with pytest.raises(AttributeError, match=r"config: set it in the model itself"):
        runner.config = None


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_capture_for_themselves(copier, model):
    runner = fastseg.graphed(model, max_graphs=3, copy_outputs=False)
    twin = copier(runner)
    assert twin.model is not model
    assert "0 graphs of at most 3" in twin.report()
    image = torch.randn(SHAPE)
    assert torch.equal(twin(image).logits, model(image).logits)


def test_wrong_arguments(model, runner):
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got a function"):
        fastseg.graphed(lambda x: x)
    with pytest.raises(TypeError, match="got a GraphedModel"):
        fastseg.graphed(runner)
    with pytest.raises(ValueError, match="max_graphs: expected an integer of at least 1, got 0"):
        fastseg.graphed(model, max_graphs=0)


def test_tensors_that_a_graph_has_to_hold():
    weight, table = torch.randn(4, 4), torch.randn(4)
    x = torch.randn(2, 4)
    with ReadTensors() as reads:
        made = x @ weight.t()
        made += table[1:].sum()
        made.relu_()
    pointers = {tensor.untyped_storage().data_ptr() for tensor in reads.tensors}
    expected = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, table)}
    assert pointers == expected

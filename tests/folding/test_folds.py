"""Folded weights in graphs, of torch.compile and torch.export, swapped in, and on CUDA streams."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from fastseg.folding import fold, state
from tests.folding.fold_cases import every_parameter, folded, plain
from tests.model_cases import SMALL, relative_error, tiny_model


@pytest.fixture(autouse=True)
def no_graphs_of_others():
    torch.compiler.reset()


@pytest.fixture
def model():
    return tiny_model(**SMALL)


@pytest.fixture
def pixels():
    return torch.randn(1, 3, 64, 96)


edit = torch.no_grad()(every_parameter(lambda parameter: parameter.mul_(1.3)))


def assert_near(result, expected):
    assert relative_error(result, expected) < 1e-5  # another set of weights is 1e-1 off


def test_compiled(model):
    """After a forward: two sizes, and an edit in place that the graph must see."""
    pixels = torch.randn(2, 3, 64, 96)
    folded(model, pixels)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for size in (pixels, torch.randn(1, 3, 96, 70)):
            expected = plain(model, size)
            torch.testing.assert_close(compiled(size).logits, expected, rtol=1e-3, atol=1e-4)
        edit(model)
        expected = plain(model, pixels)
        torch.testing.assert_close(compiled(pixels).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_every_edit_is_seen_by_a_graph(model, pixels, backend):
    """The second of these backends passes copies to operators that write."""
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        assert_near(compiled(pixels).logits, plain(model, pixels))
        for _ in range(2):
            edit(model)
            assert_near(compiled(pixels).logits, plain(model, pixels))
            assert_near(compiled(pixels).logits, plain(model, pixels))
        edit(model)
        model(pixels)  # folded outside of the graph first
        assert_near(compiled(pixels).logits, plain(model, pixels))


def test_the_graph_folds_in_place_and_stays(model, pixels):
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled(pixels)
        ffn = model.segformer.encoder.fastseg_state().settled.stages[1].layers[0].ffn
        memory = ffn.folded().fc1_weight.data_ptr()
        edit(model)
        compiled(pixels)
        assert ffn.folded().fc1_weight.data_ptr() == memory
        model.train().eval()
        assert_near(compiled(pixels).logits, plain(model, pixels))


def test_no_parameter_is_written_to(model, pixels):
    """A fold may be a parameter's own memory; a refresh would write into the one before."""
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    norm = model.segformer.encoder.patch_embeddings[0].layer_norm
    with torch.no_grad():
        compiled(pixels)
        before = norm.weight
        kept = before.clone()
        norm.weight = torch.nn.Parameter(torch.randn_like(before))
        assert_near(compiled(pixels).logits, plain(model, pixels))
    assert torch.equal(before, kept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.nn.Parameter])
def test_functional_call(model, pixels, kind):
    other = tiny_model(**SMALL)
    tensors = {
        name: kind(tensor.detach())
        for name, tensor in other.state_dict().items()
        if tensor.is_floating_point()
    }

    def call(tensors, pixels):
        return functional_call(model, tensors, (pixels,)).logits

    with torch.no_grad():
        mine = plain(model, pixels)
        assert_near(model(pixels).logits, mine)
        assert_near(call(tensors, pixels), plain(other, pixels))
        compiled = torch.compile(call, fullgraph=True, backend="eager", dynamic=False)
        assert_near(compiled(tensors, pixels), plain(other, pixels))
        assert_near(model(pixels).logits, mine)


def test_a_model_that_has_changed_otherwise_is_an_error(model, pixels):
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        compiled(pixels)
        linear = model.segformer.encoder.block[1][0].attention.self.query
        linear.register_forward_hook(lambda module, inputs, output: 2 * output)
        with pytest.raises(RuntimeError, match="query has forward hooks.*torch.compiler.reset"):
            compiled(pixels)
        torch.compiler.reset()
        assert_near(compiled(pixels).logits, plain(model, pixels))


def test_an_export_has_the_weights_of_now(model, pixels):
    model.requires_grad_(False)
    with torch.no_grad():
        model(pixels)
        proj = model.decode_head.linear_c[0].proj
        proj.weight = torch.nn.Parameter(torch.randn_like(proj.weight), requires_grad=False)
        program = torch.export.export(model, (pixels,))
        assert_near(program.module()(pixels).logits, plain(model, pixels))


@pytest.mark.slow
def test_graphs_let_go_of_models(model, pixels):
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        compiled(pixels)
    handle = model.decode_head.fastseg_state().traced.handle
    assert handle in state._graphs
    model.to(torch.float64)
    with torch.no_grad():
        compiled(pixels.double())
    assert model.decode_head.fastseg_state().traced.handle != handle


def test_folding_is_finished_before_others_see_it(monkeypatch):
    """Another stream may use folded weights at once; a captured fold is none before a replay."""
    waits = []

    class Stream:
        def synchronize(self):
            waits.append("synchronize")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert fold._is_finished(torch.device("cpu"))
    assert not waits
    assert fold._is_finished(torch.device("cuda", 0))
    assert waits == ["synchronize"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not fold._is_finished(torch.device("cuda", 0))
    assert waits == ["synchronize"]

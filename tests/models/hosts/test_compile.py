"""torch.compile and torch.export on accelerated hosts: whole graphs, parity, no recompiles."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._pytree import tree_leaves

import fastseg

from .checks import FP32_BOUND, assert_parity, errors, fresh, run
from .host_models import FAMILIES, HOSTS, WHOLE

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


# Tests that take a minute, of dynamic shapes and of C++, are for the newest of each.
MAIN = ["transformers"] if "transformers5" in FAMILIES else ["smp"] if "smp" in FAMILIES else []
OWN = ["fastseg"] if "fastseg" in HOSTS else []
CPP = ["transformers"] if "transformers5" in FAMILIES else []

# A stage: graphs are traced in Python, at some 50 ms a layer.
ONE_LAYER = {"depths": (1, 1, 1, 1)}
# With a reduction and without, and one map to upsample: for what takes long to trace or compile.
TWO_STAGES = {
    "num_encoder_blocks": 2,
    "depths": (1, 1),
    "sr_ratios": [4, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}
# Of the hosts in MAIN and OWN, where the number of stages is no part of the test.
FEW = ONE_LAYER if MAIN == ["smp"] else TWO_STAGES


@pytest.fixture(params=WHOLE)
def host(request):
    return HOSTS[request.param]


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(host, config=ONE_LAYER):
    """A plain model that has run once.

    transformers puts hooks into a model at its first forward, under a lock, which torch.compile
    cannot trace.
    """
    model = host.build(**config)
    run(host, model, torch.randn(1, 3, 64, 64))
    return model


def test_whole_graph(host, pixels, calls):
    """Of an unused model with weights that may ask for gradients: they are folded in the graph."""
    model = small(host)
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_parity(host, compiled, plain, pixels)
    assert set(calls) == set(host.calls())
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(host, compiled, plain, torch.randn_like(pixels))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.slow
def test_whole_graph_after_a_forward(host, pixels, calls, frozen):
    """Through AOTAutograd; weights that are frozen are not folded in the graph."""
    if not frozen and host.name not in MAIN + OWN:
        pytest.skip("its weights are folded in the graph of an unused model, above")
    model = small(host, FEW if host.name in MAIN + OWN else ONE_LAYER).requires_grad_(not frozen)
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    calls.clear()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=keep, dynamic=False)
    assert_parity(host, compiled, plain, pixels)
    assert set(calls) == set(host.calls())
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_parity(host, compiled, plain, torch.randn_like(pixels))
    assert len(graphs) == 1
    dtypes = {
        node.meta["example_value"].dtype
        for node in graphs[0].graph.nodes
        if isinstance(node.meta.get("example_value"), torch.Tensor)
    }
    assert torch.float32 in dtypes
    assert not (frozen and torch.float64 in dtypes)  # in which weights are folded


@pytest.mark.parametrize("host", MAIN + OWN, indirect=True)
def test_compiled_graph_sees_changed_weights(host, pixels):
    model = small(host, FEW)
    fastseg.accelerate(model)
    run(host, model, pixels)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    run(host, compiled, pixels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    assert_parity(host, compiled, fresh(host, model, **FEW), pixels)
    model.load_state_dict(small(host, FEW).state_dict())
    assert_parity(host, compiled, fresh(host, model, **FEW), pixels)
    # PyTorch does not count the edits of a fused optimizer.
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    model.eval()
    assert_parity(host, compiled, fresh(host, model, **FEW), pixels)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "config", "norm"),
    # A host whose stages are accelerated, and one whose encoder is.
    [
        ("transformers", TWO_STAGES, "segformer.stages.1.layer_norm"),
        ("nvlabs", ONE_LAYER, "backbone.norm2"),
    ]
    if "transformers5" in FAMILIES
    else [],
    indirect=["host"],
)
def test_a_hook_registered_after_compilation(host, config, norm, pixels):
    """A stage's last LayerNorm is no fold of its own, so its hooks are looked for separately."""
    model = small(host, config)
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    before = run(host, compiled, pixels)
    for each in (model, plain):
        each.get_submodule(norm).register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(RuntimeError, match=r"has forward hooks.*torch\.compiler\.reset"):
        run(host, compiled, pixels)
    torch.compiler.reset()
    assert max(errors(run(host, compiled, pixels), before)) > 1e-2
    assert_parity(host, compiled, plain, pixels)


@pytest.mark.slow
@pytest.mark.parametrize("host", MAIN + OWN, indirect=True)
def test_dynamic_sizes(host):
    """Of fastseg's own, four stages of any size are exported in test_export_torch."""
    model = small(host, FEW)
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    sizes = [(64, 96), (75, 69), (50, 140)]
    if host.multiple > 1:
        sizes = [(64, 96), (96, 160), (128, 64)]
    for batch, size in zip((2, 3, 2), sizes, strict=True):
        assert_parity(host, compiled, plain, torch.randn(batch, 3, *size))


@pytest.mark.slow
@pytest.mark.parametrize("host", MAIN, indirect=True)
def test_training_step_compiled(host, pixels, calls):
    """Under compile, too, gradients take the host's own path."""
    model = small(host, FEW)
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    calls.clear()
    grads = []
    for each in (model, plain):
        compiled = torch.compile(each, backend="eager", dynamic=False)
        host.call(compiled, pixels)[0].square().mean().backward()
        grads.append([p.grad for p in each.parameters()])
        torch._dynamo.reset()
    assert calls == []
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("host", CPP, indirect=True)
@pytest.mark.slow
def test_inductor(host, pixels, calls):
    model = small(host, TWO_STAGES).requires_grad_(False)
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    run(host, model, pixels)
    calls.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    assert_parity(host, compiled, plain, pixels)
    assert set(calls) == set(host.calls())


def exported(host, model, pixels):
    """torch.export, dynamic in batch and size."""
    height, width = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    if host.multiple > 1:
        height, width = (host.multiple * torch.export.Dim(n, min=1, max=64) for n in ("h", "w"))
    shape = {0: torch.export.Dim.DYNAMIC, 2: height, 3: width}
    with torch.no_grad():
        return torch.export.export(model, (pixels,), dynamic_shapes=(shape,))


# smp's is the largest graph: the kind that people serve is enough.
@pytest.mark.parametrize(
    ("host", "frozen"),
    [(name, frozen) for name in MAIN for frozen in (True, False) if frozen or name != "smp"],
    indirect=["host"],
)
@pytest.mark.slow
def test_export_saved_and_loaded(host, pixels, frozen):
    # Four stages once; that gradients may be asked for changes none of their sizes.
    model = small(host, ONE_LAYER if frozen else TWO_STAGES).requires_grad_(not frozen)
    plain = copy.deepcopy(model).double()
    fastseg.accelerate(model)
    run(host, model, pixels)
    stream = io.BytesIO()
    torch.export.save(exported(host, model, pixels), stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    sizes = [(64, 96), (96, 160)] if host.multiple > 1 else [(64, 96), (75, 69), (80, 140)]
    for batch, size in zip((2, 5, 3), sizes, strict=False):
        inputs = torch.randn(batch, 3, *size)
        with torch.no_grad():
            results, expected = tree_leaves(loaded(inputs)), tree_leaves(plain(inputs.double()))
        for error in errors(results, expected):
            assert error <= FP32_BOUND

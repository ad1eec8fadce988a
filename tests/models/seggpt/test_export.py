"""Files of SegGPT: what ONNX Runtime, OpenVINO and torch make of them, against float64."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch

import fastseg
from tests.exporting.test_export_torch import assert_all_readers_know_it
from tests.model_cases import relative_error

from .cases import INPUTS, inputs, theirs, twins

# Layers before the merge, at it and behind it, and one whose state nobody takes.
FEW = {"num_hidden_layers": 4, "merge_index": 1, "intermediate_hidden_state_indices": [1, 2]}
TWO = {"num_hidden_layers": 2, "merge_index": 0, "intermediate_hidden_state_indices": [0, 1]}


def exact(hosts, given, **call):
    """What transformers' plain model paints, in float64."""
    wide = {name: one.double() for name, one in given.items()}
    with torch.no_grad():
        return copy.deepcopy(hosts).double()(**wide, **call).pred_masks


def in_onnxruntime(path):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(INPUTS)
    return lambda given: session.run(["pred_masks"], given)[0]


def in_openvino(path):
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    return lambda given: np.asarray(compiled(given)["pred_masks"])


def assert_result(run, hosts, bound, batches=(1, 3), **call):
    for batch in batches:
        given = inputs(hosts, batch, seed=batch)
        result = run({name: one.numpy() for name, one in given.items()})
        assert result.dtype == np.float32
        assert relative_error(torch.from_numpy(result), exact(hosts, given, **call)) <= bound


@pytest.mark.parametrize("opset", [11, 18, 20])
def test_onnx(opset, tmp_path):
    hosts, ours = twins(**FEW)
    result = fastseg.export(ours, tmp_path / "model.onnx", opset=opset)
    assert [shape for shape, _ in result.checked] == [(1, 3, 32, 32), (2, 3, 32, 32)]
    for open_file in (in_onnxruntime, in_openvino):
        assert_result(open_file(result.path), hosts, 2e-6)


@pytest.mark.parametrize("config", [{"qkv_bias": False}, {"hidden_act": "gelu_new"}], ids=str)
def test_an_accelerated_model_of_transformers(config, tmp_path):
    hosts = theirs(**FEW, **config)
    accelerated = fastseg.accelerate(copy.deepcopy(hosts))
    result = fastseg.export(accelerated, tmp_path / "model.onnx", batch=2)
    assert [shape for shape, _ in result.checked] == [(2, 3, 32, 32)]
    assert_result(in_onnxruntime(result.path), hosts, 2e-6, batches=(2,))


def test_float16(tmp_path):
    hosts, ours = twins(**FEW)
    wide = fastseg.export(ours, tmp_path / "wide.onnx", check=False)
    result = fastseg.export(ours, tmp_path / "model.onnx", dtype=torch.float16)
    assert result.size_bytes < 0.6 * wide.size_bytes
    assert_result(in_onnxruntime(result.path), hosts, 5e-3)


def test_the_semantic_kind_and_a_large_grid(tmp_path):
    """The file has the kind of mask that the model takes by itself, and says so."""
    hosts, ours = twins(**{**FEW, "image_size": [128, 48]})
    semantic = fastseg.SegGPTForSemanticSegmentation(ours.config).eval()
    semantic.load_state_dict(ours.state_dict())
    path = tmp_path / "model.onnx"
    fastseg.export(semantic, path, check=False)
    assert_result(in_onnxruntime(path), hosts, 2e-6, embedding_type="semantic")
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties["embedding_type"] == "semantic"


def test_the_graph_is_small(tmp_path):
    """Tables are constants; nothing is gathered or resized, and the two streams run as one."""
    _, ours = twins(**FEW)
    result = fastseg.export(ours, tmp_path / "model.onnx", check=False)
    graph = onnx.load(result.path).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["Softmax"] == 3
    assert kinds["LayerNormalization"] == 2 * 3 + 2 + 1
    assert {"Erf", "Expand", "Gather", "Resize", "Shape", "Slice", "Where"}.isdisjoint(kinds)
    shape = graph.output[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in shape] == ["batch", 3, 64, 32]
    stored = {tuple(tensor.dims) for tensor in graph.initializer}
    assert {(8, 16, 8), (4, 16, 4), (1, 8, 4, 48), (28, 32)} <= stored


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": True}, "labels: expected False, as the model gives no logits of pixels"),
        ({"height": 64}, "height: expected 32, or None, got 64"),
        ({"width": 33}, "width: expected 32, or None, got 33"),
        ({"opset": 10}, "opset: expected an integer from 11"),
    ],
)
def test_wrong_arguments(options, message, tmp_path):
    _, ours = twins(**FEW)
    with pytest.raises(ValueError, match=message):
        fastseg.export(ours, tmp_path / "model.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported(tmp_path):
    path = tmp_path / "model.onnx"
    hosts, ours = twins(**FEW)
    with pytest.raises(ValueError, match="expected a SegGptForImageSegmentation, got a SegGptMod"):
        fastseg.export(ours.model, path)
    with pytest.raises(TypeError, match="call fastseg.accelerate"):
        fastseg.export(hosts, path)
    fastseg.accelerate(hosts.decoder)
    with pytest.raises(ValueError, match="model.encoder is not"):
        fastseg.export(hosts, path)
    fastseg.accelerate(hosts)
    with pytest.raises(
        ValueError, match="expected a SegGptForImageSegmentation, got .* Sequential"
    ):
        fastseg.export(torch.nn.Sequential(hosts).eval(), path)
    hosts.model.embeddings.patch_embeddings.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model.embeddings.patch_embeddings has forward hooks"):
        fastseg.export(hosts, path)
    ours.model.encoder.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="all of model.encoder folded, but layers.1, MLP: .*hooks"):
        fastseg.export(ours, path)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_more_around_is_not_exported(tmp_path):
    hosts = fastseg.accelerate(theirs(**FEW))
    forward = hosts.forward
    hosts.forward = lambda image, *others, **call: forward(image / 2, *others, **call)
    with pytest.raises(ValueError, match="model: expected .* forward"):
        fastseg.export(hosts, tmp_path / "model.onnx")


def test_a_torch_program_of_a_fixed_batch(tmp_path):
    hosts = theirs(**TWO)
    accelerated = fastseg.accelerate(copy.deepcopy(hosts))
    result = fastseg.export(accelerated, tmp_path / "model.pt2", batch=2)
    assert [shape for shape, _ in result.checked] == [(2, 3, 32, 32)]
    program = torch.export.load(result.path)
    assert_all_readers_know_it(program)
    operators = {str(node.target) for node in program.graph.nodes}
    assert "aten.index.Tensor" not in operators  # of tables of relative positions
    assert not any("upsample" in one for one in operators)  # of position embeddings
    given = inputs(hosts, 2)
    assert relative_error(program.module()(*given.values()), exact(hosts, given)) <= 2e-6


@pytest.mark.slow
def test_a_torch_program_of_any_batch(tmp_path):
    hosts, ours = twins(**TWO)
    program = torch.export.load(fastseg.export(ours, tmp_path / "model.pt2").path)
    for batch in (1, 3):
        given = inputs(hosts, batch)
        assert relative_error(program.module()(*given.values()), exact(hosts, given)) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("way", ["own", "accelerated"])
def test_torch_export_of_the_model_itself(way):
    hosts, ours = twins(**TWO)
    model = ours if way == "own" else fastseg.accelerate(copy.deepcopy(hosts))
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(
            model, (), inputs(hosts, 2), dynamic_shapes={name: {0: batch} for name in INPUTS}
        )
    given = inputs(hosts, 3)
    assert relative_error(program.module()(**given).pred_masks, exact(hosts, given)) <= 2e-6

"""ONNX files: what onnxruntime and OpenVINO make of them, against transformers in float64."""

from __future__ import annotations

import copy
import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import fastseg
from fastseg.kernels.blocks.activations import ACTIVATIONS
from tests.exporting.export_cases import RUNTIMES, SIZES, assert_labels, open_onnxruntime, reference
from tests.model_cases import TINY, WIDE, randomize, relative_error, twins


def relative(result: np.ndarray, expected: torch.Tensor) -> float:
    assert result.dtype == np.float32
    assert result.shape == tuple(expected.shape)
    return relative_error(torch.from_numpy(result), expected)


@pytest.mark.parametrize("config", [TINY, WIDE], ids=["tiny", "widths of real models"])
def test_logits_of_any_number_and_size(config, tmp_path):
    hf_model, model = twins(**config)
    path = tmp_path / "model.onnx"
    checked = [shape for shape, _ in fastseg.export(model, path).checked]
    runs = [open_file(path) for open_file in RUNTIMES.values()]
    for batch, height, width in SIZES:
        assert (batch, 3, height, width) not in checked
        pixels = torch.randn(batch, 3, height, width)
        expected = reference(hf_model, pixels)
        for run in runs:
            assert relative(run(pixels)[0], expected) <= 2e-6


def test_weights_are_second_in_products(tmp_path):
    """As tools that quantise expect them, which scale a weight by its columns."""
    _, model = twins(**WIDE)
    path = tmp_path / "model.onnx"
    fastseg.export(model, path, check=False)
    graph = onnx.load(path).graph
    constants = {constant.name for constant in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert len(products) > 8
    assert not [node.name for node in products if node.input[0] in constants]
    assert sum(node.input[1] in constants for node in products) > 4


OPSETS = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 23)


@pytest.mark.every(5)
@pytest.mark.parametrize("opset", [11, 13, 16, 17, 18, 20])
def test_float16(opset, tmp_path):
    """Half the bytes, input and logits in float32, errors of float16's rounding."""
    hf_model, model = twins(**WIDE)
    wide, path = tmp_path / "wide.onnx", tmp_path / "model.onnx"
    fastseg.export(model, wide, opset=opset, check=False)
    result = fastseg.export(model.half(), path, opset=opset, dtype=torch.float16)
    assert result.dtype == torch.float16
    assert result.size_bytes < 0.55 * wide.stat().st_size
    floats = {
        constant.data_type
        for constant in onnx.load(path).graph.initializer
        if np.prod(constant.dims, dtype=int) > 1
    } - {onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.FLOAT16}
    run = open_onnxruntime(path)
    for shape in SIZES:
        pixels = torch.randn(shape[0], 3, *shape[1:])
        expected = reference(hf_model, pixels)
        assert 1e-5 < relative(run(pixels)[0], expected) < 5e-3


@pytest.mark.parametrize("opset", [11, 14, 20])
def test_float16_labels(opset, tmp_path):
    hf_model, model = twins(**TINY)
    path = tmp_path / "model.onnx"
    fastseg.export(model, path, labels=True, dtype=torch.float16, opset=opset)
    pixels = torch.randn(2, 3, 75, 101)
    (labels,) = open_onnxruntime(path)(pixels)
    logits = torch.nn.functional.interpolate(
        reference(hf_model, pixels), size=(75, 101), mode="bilinear", align_corners=False
    )
    assert (torch.as_tensor(labels) == logits.argmax(1)).double().mean() > 0.98


def test_float16_that_overflows_is_refused(tmp_path):
    _, model = twins(**TINY)
    with torch.no_grad():
        model.decode_head.classifier.weight.fill_(1e6)
    with pytest.raises(fastseg.ExportError, match="does not give what the model gives"):
        fastseg.export(model, tmp_path / "model.onnx", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_labels_of_the_images_own_size(dtype, tmp_path):
    hf_model, model = twins(**TINY)
    path = tmp_path / "model.onnx"
    fastseg.export(model, path, labels=True, label_dtype=dtype)
    runs = [open_file(path) for open_file in RUNTIMES.values()]
    for batch, height, width in SIZES:
        pixels = torch.randn(batch, 3, height, width)
        expected = reference(hf_model, pixels)
        for run in runs:
            (labels,) = run(pixels)
            assert labels.dtype == str(dtype).split(".")[1]
            assert_labels(labels, expected, (height, width))


def test_labels_of_a_given_size(tmp_path):
    hf_model, model = twins(**TINY)
    path = tmp_path / "model.onnx"
    fastseg.export(model, path, labels=(50, 77))
    pixels = torch.randn(2, 3, 64, 101)
    for open_file in RUNTIMES.values():
        (labels,) = open_file(path)(pixels)
        assert_labels(labels, reference(hf_model, pixels), (50, 77))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_one_class_is_there_or_not(dtype, tmp_path):
    hf_model, model = twins(**{**TINY, "num_labels": 1})
    with torch.no_grad():  # a logit that is positive here and negative there
        pixels = torch.randn(2, 3, 64, 75)
        shift = reference(hf_model, pixels).median().float()
        for classifier in (hf_model.decode_head.classifier, model.decode_head.classifier):
            classifier.bias -= shift
    path = tmp_path / "model.onnx"
    fastseg.export(model, path, labels=True, label_dtype=dtype)
    logits = reference(hf_model, pixels)
    for open_file in RUNTIMES.values():
        (labels,) = open_file(path)(pixels)
        assert labels.dtype == str(dtype).split(".")[1]
        assert_labels(labels, torch.cat([torch.zeros_like(logits), logits], dim=1), (64, 75))


@pytest.mark.every(7)
@pytest.mark.parametrize("opset", [11, 17, 18, 20])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_in_every_form(activation, opset, tmp_path):
    # Not transformers': it has no SELU.
    config = fastseg.SegformerConfig(**TINY, hidden_act=activation)
    model = fastseg.SegformerForSemanticSegmentation(config).eval()
    randomize(model)
    path = tmp_path / "model.onnx"
    assert fastseg.export(model, path, opset=opset, check=False).opset == opset
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), fastseg.plain_path():
        expected = model.double()(pixels.double()).logits
    assert relative(open_onnxruntime(path)(pixels)[0], expected) <= 2e-6


@pytest.mark.every(11)
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("opset", OPSETS)
def test_opsets(opset, labels, tmp_path):
    """Of a graph in an old opset, its checker and both runtimes take every operator."""
    hf_model, model = twins(**TINY)
    path = tmp_path / "model.onnx"
    assert fastseg.export(model, path, opset=opset, labels=labels).checked
    graph = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", opset)]
    kinds = {node.op_type for node in graph.graph.node}
    assert ("LayerNormalization" in kinds) == (opset >= 17)
    assert ("Sqrt" in kinds) == (opset < 17)
    assert ("Erf" in kinds) == (opset < 20)
    for batch, height, width in SIZES:
        pixels = torch.randn(batch, 3, height, width)
        expected = reference(hf_model, pixels)
        for open_file in RUNTIMES.values():
            (result,) = open_file(path)(pixels)
            if labels:
                assert_labels(result, expected, (height, width))
            else:
                assert relative(result, expected) <= 2e-6


@pytest.mark.parametrize("opset", [11, 16])
def test_squares_that_pass_float16(opset, tmp_path):
    """LayerNorm of tokens of some 1000, by ONNX's own evaluator: onnxruntime has no float16 on a
    CPU and computes in float32."""
    hf_model, model = twins("SegformerForImageClassification", **TINY)
    with torch.no_grad():
        for one in (hf_model, model):
            first = next(layer for layer in one.modules() if isinstance(layer, torch.nn.Conv2d))
            first.weight *= 1000
            first.bias *= 1000
    path = tmp_path / "model.onnx"
    fastseg.export(model, path, opset=opset, dtype=torch.float16)
    pixels = torch.randn(1, 3, 40, 40)
    (result,) = ReferenceEvaluator(str(path)).run(None, {"pixel_values": pixels.numpy()})
    assert relative(result, reference(hf_model, pixels)) < 1e-2


@pytest.mark.parametrize("opset", [11, 20])
def test_classifier(opset, tmp_path):
    hf_model, model = twins("SegformerForImageClassification", **TINY)
    path = tmp_path / "model.onnx"
    fastseg.export(model, path, opset=opset)
    pixels = torch.randn(3, 3, 75, 101)
    assert relative(open_onnxruntime(path)(pixels)[0], reference(hf_model, pixels)) <= 2e-6


def test_bare_encoder(tmp_path):
    hf_model, model = twins("SegformerModel", **TINY)
    path = tmp_path / "model.onnx"
    fastseg.export(model, path)
    pixels = torch.randn(2, 3, 75, 101)
    with torch.no_grad():
        expected = hf_model.double()(pixels.double(), output_hidden_states=True).hidden_states
    results = open_onnxruntime(path)(pixels)
    assert len(results) == len(expected) == 4
    for result, wanted in zip(results, expected, strict=True):
        assert relative(result, wanted) <= 2e-6
    names = [output.name for output in onnx.load(path).graph.output]
    assert names == [f"feature_map_{stage}" for stage in (1, 2, 3, 4)]


def test_fixed_axes(tmp_path):
    _, model = twins(**TINY)
    path = tmp_path / "model.onnx"
    result = fastseg.export(model, path, batch=2, height=75, width=101)
    assert [shape for shape, _ in result.checked] == [(2, 3, 75, 101)]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [2, 3, 75, 101]
    assert session.get_outputs()[0].shape == [2, 5, 19, 26]
    with pytest.raises(Exception, match="Expected"):
        session.run(None, {"pixel_values": np.zeros((1, 3, 75, 101), np.float32)})


def test_names_of_open_axes(tmp_path):
    _, model = twins(**TINY)
    path = tmp_path / "model.onnx"
    fastseg.export(model, path, labels=True, height=96, check=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 96, "width"]
    assert session.get_outputs()[0].shape == ["batch", 96, "width"]
    assert session.get_outputs()[0].type == "tensor(int64)"


def test_the_graph_is_small(tmp_path):
    """One operator for each norm, activation and convolution, and weights without padding."""
    _, model = twins(**TINY)
    path = tmp_path / "model.onnx"
    result = fastseg.export(model, path)
    graph = onnx.load(path)
    kinds = Counter(node.op_type for node in graph.graph.node)
    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    assert kinds["LayerNormalization"] == norms
    assert kinds["Gelu"] == kinds["Softmax"] == 4
    assert kinds["Resize"] == 3
    assert kinds["Shape"] == 5  # one for each stage and one of the head
    assert {"Erf", "Expand", "Gather", "Slice", "Split", "Where"}.isdisjoint(kinds)
    assert result.nodes == sum(kinds.values()) == len(graph.graph.node)
    assert result.size_bytes == path.stat().st_size
    stored = sum(np.prod(tensor.dims) for tensor in graph.graph.initializer)
    assert stored <= model.num_parameters()  # folding takes some away
    assert len({node.name for node in graph.graph.node}) == result.nodes


def test_class_names_go_along(tmp_path):
    config = fastseg.SegformerConfig(**TINY | {"num_labels": None}, id2label={0: "sky", 1: "road"})
    model = fastseg.SegformerForSemanticSegmentation(config).eval()
    path = tmp_path / "model.onnx"
    fastseg.export(model, path, check=False)
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(properties["id2label"]) == {"0": "sky", "1": "road"}


def test_weights_in_half_precision_are_taken_as_they_are(tmp_path):
    model = fastseg.SegformerForSemanticSegmentation(fastseg.SegformerConfig(**TINY)).eval()
    randomize(model)
    model.half()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "model.onnx"
    assert fastseg.export(model, path).checked
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.float16
    pixels = torch.randn(1, 3, 64, 75)
    with torch.no_grad():
        expected = model.double()(pixels.double()).logits
    assert relative(open_onnxruntime(path)(pixels)[0], expected) <= 2e-6


def test_an_accelerated_model_of_transformers(tmp_path):
    hf_model, _ = twins(**TINY)
    accelerated = fastseg.accelerate(copy.deepcopy(hf_model))
    path = tmp_path / "model.onnx"
    assert len(fastseg.export(accelerated, path).checked) == 2
    for batch, height, width in SIZES:
        pixels = torch.randn(batch, 3, height, width)
        expected = reference(hf_model, pixels)
        assert relative(open_onnxruntime(path)(pixels)[0], expected) <= 2e-6


def test_a_model_that_is_accelerated_in_part_is_not_exported(tmp_path):
    hf_model, _ = twins(**TINY)
    classifier = hf_model.decode_head.classifier
    hf_model.decode_head.classifier = torch.nn.Sequential(classifier).eval()
    with pytest.raises(TypeError, match="fastseg.accelerate has taken"):
        fastseg.export(hf_model, tmp_path / "model.onnx")
    fastseg.accelerate(hf_model)
    with pytest.raises(ValueError, match="expected all of decode_head folded, but classifier"):
        fastseg.export(hf_model, tmp_path / "model.onnx")

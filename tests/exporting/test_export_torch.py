"""`torch.export` of models, files of the format torch-export, and AOTInductor."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
import torch._inductor
from torch.export import Dim
from torch.utils import _pytree as pytree

import fastseg
from fastseg.models.outputs import BaseModelOutput, ImageClassifierOutput, SemanticSegmenterOutput
from tests.exporting.export_cases import assert_labels, reference
from tests.model_cases import SMALL, TINY, randomize, relative_error, twins

ANY_SIZE = {"pixel_values": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
SIZES = [(1, 64, 64), (3, 75, 101), (2, 61, 130)]


def assert_all_readers_know_it(program: torch.export.ExportedProgram) -> None:
    operators = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(getattr(op, "namespace", "aten") == "aten" for op in operators)
    assert any("layer_norm" in str(op) for op in operators)


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.nn.Module:
    assert_all_readers_know_it(program)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


@pytest.mark.slow  # of two stages: test_a_file_for_any_number_and_size
def test_export_of_a_model_for_any_number_and_size():
    hf_model, model = twins(**TINY)
    with torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, 3, 96, 160),), dynamic_shapes=ANY_SIZE)
    loaded = saved_and_loaded(program)
    for batch, height, width in SIZES:
        pixels = torch.randn(batch, 3, height, width)
        result = loaded(pixels)
        assert type(result) is SemanticSegmenterOutput
        assert list(result) == ["logits"]
        assert relative_error(result.logits, reference(hf_model, pixels)) <= 2e-6


@pytest.mark.parametrize(
    ("name", "return_dict"),
    [
        pytest.param("SegformerModel", True, marks=pytest.mark.slow),
        ("SegformerForSemanticSegmentation", True),
        pytest.param("SegformerForImageClassification", False, marks=pytest.mark.slow),
    ],
)
def test_export_of_all_outputs(name, return_dict):
    model = getattr(fastseg, name)(fastseg.SegformerConfig(**SMALL)).eval()
    randomize(model)
    model.requires_grad_(False)
    pixels = torch.randn(2, 3, 64, 96)
    asked = {"output_hidden_states": True, "return_dict": return_dict}
    with fastseg.plain_path():
        expected = model(pixels, **asked)
    result = saved_and_loaded(torch.export.export(model, (pixels,), asked))(pixels, **asked)
    assert type(result) is type(expected)
    values, structure = pytree.tree_flatten(result)
    wanted, same = pytree.tree_flatten(expected)
    assert structure == same
    assert len(values) == 3  # the first output and two hidden states
    for value, other in zip(values, wanted, strict=True):
        assert relative_error(value, other) <= 5e-6  # both in float32


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """transformers' model, the path of fastseg's twin as a file, and what its export told."""
    hf_model, model = twins(**SMALL)
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    return hf_model, path, fastseg.export(model, path, format="torch-export")


@pytest.mark.slow
def test_a_file_for_any_number_and_size(exported):
    hf_model, path, result = exported
    assert len(result.checked) == 2
    assert (result.opset, result.size_bytes) == (None, path.stat().st_size)
    program = torch.export.load(path)
    assert_all_readers_know_it(program)
    module = program.module()
    for batch, height, width in SIZES:
        pixels = torch.randn(batch, 3, height, width)
        logits = module(pixels)
        assert logits.is_contiguous()
        assert relative_error(logits, reference(hf_model, pixels)) <= 2e-6
    with pytest.raises(AssertionError, match=">= 29"):
        module(torch.randn(1, 3, 28, 64))


@pytest.mark.slow
def test_a_file_is_read_without_fastseg(exported):
    hf_model, path, _ = exported
    code = (
        "import sys, torch\n"
        f"logits = torch.export.load({str(path)!r}).module()(torch.ones(1, 3, 64, 64))\n"
        "assert 'fastseg' not in sys.modules\n"
        "print(logits.double().square().mean().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = reference(hf_model, torch.ones(1, 3, 64, 64)).square().mean().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_file_that_gives_labels(tmp_path):
    hf_model, model = twins(**SMALL)
    path = tmp_path / "model.pt2"
    options = {"format": "torch-export", "labels": True, "label_dtype": torch.uint8}
    assert fastseg.export(model, path, **options).checked
    module = torch.export.load(path).module()
    for batch, height, width in SIZES:
        pixels = torch.randn(batch, 3, height, width)
        labels = module(pixels)
        assert labels.dtype == torch.uint8
        assert_labels(labels, reference(hf_model, pixels), (height, width))


@pytest.mark.slow
def test_files_of_other_models(tmp_path):
    path = tmp_path / "model.pt2"
    one = {**SMALL, "num_labels": 1}
    _, segmenter = twins(**one)
    with torch.no_grad():
        segmenter.decode_head.classifier.bias -= segmenter(
            torch.randn(1, 3, 64, 64)
        ).logits.median()
    fixed = {"format": "torch-export", "batch": 1, "height": 64, "width": 75}
    assert fastseg.export(segmenter, path, labels=(50, 70), **fixed).checked
    labels = torch.export.load(path).module()(torch.randn(1, 3, 64, 75))
    assert (labels.shape, labels.dtype) == ((1, 50, 70), torch.int64)
    assert labels.unique().tolist() == [0, 1]
    for name, outputs in (("SegformerModel", 2), ("SegformerForImageClassification", 1)):
        _, model = twins(name, **SMALL)
        assert fastseg.export(model, path, **fixed).checked
        found = torch.export.load(path).module()(torch.randn(1, 3, 64, 75))
        assert len(found) == outputs
    assert not fastseg.export(model, path, check=False, **fixed).checked


@pytest.mark.slow
def test_ahead_of_time_compilation_for_any_number_and_multiples_of_the_stride(tmp_path):
    """AOTInductor of torch 2.13 cannot reason about the grids of sizes that leave a rest."""
    hf_model, model = twins(**SMALL)
    model.requires_grad_(False)
    sizes = {0: Dim("batch"), 2: 8 * Dim("rows", min=8), 3: 8 * Dim("columns", min=8)}
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
        program = torch.export.export(
            model, (torch.zeros(2, 3, 64, 96),), dynamic_shapes={"pixel_values": sizes}
        )
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},  # half the time
        )
        compiled = torch._inductor.aoti_load_package(package)
        for batch, height, width in [(1, 64, 64), (3, 72, 120)]:
            pixels = torch.randn(batch, 3, height, width)
            result = compiled(pixels)
            assert type(result) is SemanticSegmenterOutput
            assert relative_error(result.logits, reference(hf_model, pixels)) <= 2e-6


@pytest.mark.parametrize(
    "output",
    [
        BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.ones(3),)),
        SemanticSegmenterOutput(logits=torch.ones(2), loss=torch.ones(())),
        ImageClassifierOutput(logits=torch.ones(2)),
    ],
)
def test_outputs_are_pytrees_with_named_fields(output):
    mapped = pytree.tree_map(lambda tensor: tensor + 1, output)
    assert type(mapped) is type(output)
    assert list(mapped) == list(output)
    assert all((t == 2).all() for t in pytree.tree_leaves(mapped))
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(output)[0]]
    assert paths[0].startswith(f"['{next(iter(output))}']")
    structure = pytree.tree_structure(output)
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure


def test_fields_that_are_none_stay_so():
    output = pytree.tree_map(torch.neg, SemanticSegmenterOutput(logits=torch.ones(2)))
    assert output.loss is None
    assert "loss" not in output
    with pytest.raises(ValueError):
        pytree.tree_unflatten([], pytree.tree_structure(output))

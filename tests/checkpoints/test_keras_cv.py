"""KerasCV's network: the real library's files, against its own outputs at two sizes."""

from __future__ import annotations

import contextlib
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg.checkpoints.load import CheckpointError
from fastseg.cli import main
from fastseg.kernels.core.registry import OPS
from fastseg.models.auto import from_pretrained
from tests.checkpoints.checkpoint_cases import assert_same_tensors
from tests.model_cases import relative_error

pytestmark = pytest.mark.filterwarnings("error::fastseg.CheckpointWarning")

FIXTURES = Path(__file__).parents[1] / "fixtures"
# Of maps; TensorFlow's own run is in float64 up to its resize, with constants in float32.
MAP_BOUNDS = {torch.float32: 2e-6, torch.float64: 1e-7}
FORMS = ["segformer", "segformer.keras", "segformer.weights.h5"]


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return unpacked("keras_cv", tmp_path_factory.mktemp("keras_cv"))


@pytest.fixture(scope="module")
def outputs(files) -> dict[str, torch.Tensor]:
    with np.load(files / "outputs.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return {name: t.permute(0, 3, 1, 2) if t.ndim == 4 else t for name, t in found.items()}


@pytest.fixture(scope="module")
def model(files):
    return from_pretrained(files / "segformer")


def assert_maps(maps, outputs, side: int) -> None:
    for level, ours in enumerate(maps):
        expected = outputs[f"output_level_{level}_{side}"]
        assert relative_error(ours, expected) <= MAP_BOUNDS[ours.dtype]


@pytest.mark.parametrize("path", ["folded", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", FORMS)
def test_parity(source, dtype, path, files, outputs):
    """From each form of the files, at the size it was saved at and at another one."""
    model = from_pretrained(files / source).to(dtype)
    assert type(model) is fastseg.SegformerForSemanticSegmentation
    assert not model.load_report
    for side in (64, 96):
        pixels = outputs[f"pixels_{side}"].to(dtype) / 255
        with torch.no_grad(), fastseg.plain_path() if path == "plain" else contextlib.nullcontext():
            found = model(pixels, output_hidden_states=True)
        assert_maps(found.hidden_states, outputs, side)
        assert relative_error(found.logits, outputs[f"logits_{side}"]) <= 2e-6
        if side == 64:
            maps = model.image_processor_class().post_process_semantic_segmentation(
                found, [(64, 64)] * 2
            )
            assert torch.equal(torch.stack(maps), outputs["labels_64"].long())


@pytest.mark.parametrize(
    ("source", "given"), [("mit", {}), ("mit.weights.h5", {"source": "keras_cv"})]
)
def test_encoder(source, given, files, outputs):
    model = from_pretrained(files / source, **given)
    assert type(model) is fastseg.SegformerModel
    with torch.no_grad():
        found = model(outputs["pixels_96"] / 255, output_hidden_states=True).hidden_states
    assert_maps(found, outputs, 96)


def test_image_classifier(files, outputs, tmp_path):
    """Its names, as the library's code gives them, around the encoder of the fixture."""
    kernel, bias = torch.randn(16, 7), torch.randn(7)
    path = tmp_path / "model.weights.h5"
    with h5py.File(files / "mit.weights.h5") as encoder, h5py.File(path, "w") as file:
        encoder.copy("layers", file.create_group("layers/mi_t_backbone"))
        file["layers/dense/vars/0"], file["layers/dense/vars/1"] = kernel, bias
    backbone = json.loads((files / "mit" / "config.json").read_text())
    config = {"registered_name": "keras_cv>ImageClassifier", "config": {"backbone": backbone}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = from_pretrained(tmp_path)
    assert type(model) is fastseg.SegformerForImageClassification
    with torch.no_grad():
        logits = model(outputs["pixels_64"] / 255).logits
    expected = outputs["output_level_3_64"].mean((2, 3)) @ kernel + bias
    assert relative_error(logits, expected) <= 2e-6


def test_a_configuration_of_another_network(files, model):
    config = fastseg.SegformerConfig.from_dict({**model.config.to_dict(), "mixes_channels": False})
    with pytest.raises(CheckpointError, match="as config says, got KerasCV's"):
        from_pretrained(files / "segformer.weights.h5", config=config)
    assert from_pretrained(files / "segformer.weights.h5", config=model.config)


def test_gradients(files):
    """Those of the plain path in training mode, along one direction, against differences."""
    model = from_pretrained(files / "segformer", drop_path_rate=0.0, classifier_dropout_prob=0.0)
    model = model.double().train()
    pixels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    labels = torch.randint(5, (2, 64, 64))
    parameters = list(model.parameters())
    directions = [torch.randn_like(one) for one in parameters]
    model(pixels, labels=labels).loss.backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))

    @torch.no_grad()
    def loss(step: float) -> torch.Tensor:
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter += step * direction
        found = model(pixels, labels=labels).loss
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter -= step * direction
        return found

    step = 1e-6
    difference = (loss(step) - loss(-step)) / (2 * step)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("slide", [None, (64, 64)])
def test_segment(slide, files, outputs):
    """With the image processor that config.json describes; images have the size of the model."""
    images = [image.permute(1, 2, 0).numpy() for image in outputs["pixels_64"]]
    for source in FORMS[:2]:
        labels, scores = fastseg.segment(
            *(from_pretrained(files / source), images),
            slide=slide,
            return_scores=True,
            scores_dtype=torch.float32,
        )
        assert torch.equal(torch.stack(labels), outputs["labels_64"].long())
        torch.testing.assert_close(torch.stack(scores), outputs["scores_64"], rtol=0, atol=2e-6)


def test_probabilities_are_upsampled(model, outputs):
    """At 0.5 % of the pixels the label would be another otherwise."""
    with torch.no_grad():
        found = model(outputs["pixels_64"] / 255)
    torch.testing.assert_close(found.probabilities, found.logits.softmax(1))
    processor = model.image_processor_class()
    (one, _) = processor.post_process_semantic_segmentation(
        found, [(64, 64)] * 2, return_segmentation_scores=True
    )
    resized = F.interpolate(found.probabilities, size=(64, 64), mode="bilinear")
    assert torch.equal(one.segmentation_scores, resized[0])
    of_logits = torch.stack(
        processor.post_process_semantic_segmentation(found.logits, [(64, 64)] * 2)
    )
    share = (of_logits != outputs["labels_64"]).double().mean()
    assert 0.002 < share < 0.01


@pytest.mark.parametrize("source", FORMS[:2])
def test_image_processor(source, files):
    processor = fastseg.SegformerImageProcessor.from_pretrained(files / source)
    assert processor.size == {"height": 64, "width": 64}
    assert (processor.do_rescale, processor.do_normalize) == (True, False)


def test_archives_of_others_have_no_image_processor(tmp_path):
    with zipfile.ZipFile(tmp_path / "it.keras", "w") as archive:
        archive.writestr("config.json", '{"registered_name": "keras_hub>SegFormer"}')
        archive.writestr("model.weights.h5", b"")
    with pytest.raises(CheckpointError, match=r"it\.keras: .*not of KerasCV"):
        fastseg.SegformerImageProcessor.from_pretrained(tmp_path / "it.keras")


def test_without_rescaling(files, tmp_path):
    """Such a model takes bytes as they are."""
    shutil.copytree(files / "segformer", tmp_path / "it")
    path = tmp_path / "it" / "config.json"
    path.write_text(path.read_text().replace('"include_rescaling": true', '"other": 1'))
    assert not fastseg.SegformerImageProcessor.from_pretrained(tmp_path / "it").do_rescale


@pytest.mark.parametrize("size", [(48, 48), (72, 72), (100, 100), (64, 128), (64, 256), (16, 16)])
@pytest.mark.parametrize("path", ["folded", "plain"])
def test_other_sizes(size, path, model):
    context = fastseg.plain_path() if path == "plain" else contextlib.nullcontext()
    with torch.no_grad(), context, pytest.raises(ValueError, match="squares .* multiples of 32"):
        model(torch.zeros(1, 3, *size))


def test_an_encoder_alone_may_be_of_either(files):
    path = files / "mit.weights.h5"
    with pytest.raises(CheckpointError, match=r"mit\.weights\.h5: .*KerasCV.*source=\"keras_cv\""):
        from_pretrained(path)
    with pytest.raises(ValueError, match="source: expected None or 'keras_cv', got 'keras'"):
        from_pretrained(path, source="keras")
    with pytest.raises(ValueError, match="source: expected None for .*segformer"):
        from_pretrained(files / "segformer", source="keras_cv")


def test_files_of_keras_hub(tmp_path):
    """Its present network is not KerasCV's, and that of 0.17 is neither."""
    path = unpacked("keras_hub", tmp_path) / "segmenter.weights.h5"
    with pytest.raises(
        CheckpointError, match="expected KerasCV's SegFormer or MiT, got KerasHub's"
    ):
        from_pretrained(path, source="keras_cv")
    with h5py.File(path, "r+") as file:
        found: list[str] = []
        file.visit(lambda name: found.append(name) if name.endswith("/attn/dropout") else None)
        for name in found:
            del file[name]
    with pytest.raises(CheckpointError, match=r"KerasHub 0\.17's MiT, a third network"):
        from_pretrained(path)


def test_the_older_hdf5_format(tmp_path):
    with h5py.File(tmp_path / "it.h5", "w") as file:
        file["model_weights/dense_7/seg_former/dense_7/kernel"] = np.zeros((2, 2), "float32")
    with pytest.raises(CheckpointError, match=r"older HDF5 format.*\.weights\.h5"):
        from_pretrained(tmp_path / "it.h5")


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(registered_name="keras_cv>DeepLabV3Plus"),
        lambda config: config["config"]["backbone"].update(registered_name="keras_cv>ResNet"),
        lambda config: config["config"].update(pooling="max"),
    ],
)
def test_other_models_of_keras_cv(change, files, tmp_path):
    with zipfile.ZipFile(files / "segformer.keras") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(contents["config.json"])
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.weights.h5").write_bytes(contents["model.weights.h5"])
    with zipfile.ZipFile(tmp_path / "it.keras", "w") as archive:
        for name, content in {**contents, "config.json": json.dumps(config)}.items():
            archive.writestr(name, content)
    for path in (tmp_path, tmp_path / "it.keras"):
        with pytest.raises(CheckpointError, match="expected (a preset of|average pooling)"):
            from_pretrained(path)


def test_older_names_in_a_configuration(files, tmp_path):
    shutil.copytree(files / "segformer", tmp_path / "it")
    path = tmp_path / "it" / "config.json"
    path.write_text(path.read_text().replace("keras_cv>", "keras_cv.models>"))
    assert from_pretrained(tmp_path / "it").config.mixes_channels


def test_saved(model, tmp_path, outputs):
    """Under a model type that no other library takes for its SegFormer."""
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "segformer_keras_cv"
    loaded = from_pretrained(tmp_path)
    for config in (loaded.config, fastseg.SegformerConfig.from_pretrained(tmp_path)):
        fields = {**vars(config)}
        assert fields | vars(model.config) == fields  # with `architectures` and such besides
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))
    pixels = outputs["pixels_64"] / 255
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)


def test_no_other_library_has_it(model, files, tmp_path, capsys):
    assert main(["convert", str(files / "segformer"), str(tmp_path / "out")]) == 1
    assert "transformers has no such network" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    encoder = model.segformer
    for library in ("nvlabs", "mmseg", "smp"):
        with pytest.raises(ValueError, match="has no such"):
            encoder.state_dict_for(library)
    with pytest.raises(ValueError, match="KerasCV's network"):
        model.state_dict_for("nvlabs")


def test_kernels_decline_the_mixing(model):
    """Attention runs eagerly where a stage has a reduction, and the report says so."""
    declined = {
        OPS[op].declines(weights)
        for op, weights in model.segformer.encoder.fastseg_state().plan().weights()
        if op == "sr_attention" and weights.sr_ratio > 1
    }
    assert declined == {"its reduction mixes channels, as KerasCV's does"}


@pytest.mark.parametrize("opset", [11, 20])
def test_onnx(opset, model, outputs, tmp_path):
    """Of the size in the configuration; the runtime's labels are the library's."""
    path = tmp_path / "it.onnx"
    result = fastseg.export(model, path, labels=True, opset=opset)
    assert {one.shape[2:] for one in result.checked} == {(64, 64)}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (labels,) = session.run(None, {"pixel_values": (outputs["pixels_64"] / 255).numpy()})
    assert np.array_equal(labels, outputs["labels_64"])


@pytest.mark.slow
def test_torch_export(model, outputs, tmp_path):
    fastseg.export(model, tmp_path / "it.pt2", labels=True, batch=2)
    program = torch.export.load(tmp_path / "it.pt2").module()
    assert torch.equal(program(outputs["pixels_64"] / 255), outputs["labels_64"].long())


def test_export_asks_for_the_size(files, tmp_path):
    model = from_pretrained(files / "segformer.weights.h5")  # which does not say it
    for sizes in ({}, {"height": 64}, {"height": 64, "width": 96}, {"height": 48, "width": 48}):
        with pytest.raises(ValueError, match="height, width: expected equal multiples of 32"):
            fastseg.export(model, tmp_path / "it.onnx", **sizes)
    result = fastseg.export(model, tmp_path / "it.onnx", height=96, width=96, batch=1)
    assert [one.shape for one in result.checked] == [(1, 3, 96, 96)]


def test_a_single_file_has_the_default_processor(files):
    model = from_pretrained(files / "segformer.weights.h5")
    with pytest.warns(UserWarning, match="default SegformerImageProcessor, at 512x512"):
        (labels,) = fastseg.segment(model, np.zeros((20, 30, 3), np.uint8))
    assert labels.shape == (20, 30)


def test_configuration_of_the_fields():
    with pytest.raises(ValueError, match="same_padding: expected odd patch_sizes"):
        fastseg.SegformerConfig(same_padding=True, patch_sizes=[7, 3, 2, 3])
    with pytest.raises(ValueError, match="batch_norm_eps: expected a number between 0 and 1"):
        fastseg.SegformerConfig(batch_norm_eps=0)
    assert fastseg.SegformerConfig().side_multiple == 0
    assert fastseg.SegformerConfig(mixes_channels=True).side_multiple == 32

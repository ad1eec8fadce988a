"""transformers' Trainer and pipelines on fastseg's classes, against the same on transformers' own.

What its guide to semantic segmentation does with a model, a processor and a configuration.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers import Trainer, TrainingArguments, pipeline

import fastseg
from fastseg.models import checkpointing
from tests.model_cases import TINY

NAMES = {0: "wall", 1: "road", 2: "sky"}
CONFIG = {
    **{name: value for name, value in TINY.items() if name != "num_labels"},
    "id2label": NAMES,
    "label2id": {name: label for label, name in NAMES.items()},
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}
SEGMENTATION = "SegformerForSemanticSegmentation"


def pictures(count, seed=0):
    random = np.random.default_rng(seed)
    return [
        Image.fromarray(random.integers(0, 256, (50, 70, 3), dtype=np.uint8)) for _ in range(count)
    ]


@pytest.fixture
def twins(tmp_path):
    """A model of transformers and one of fastseg with the same weights."""
    theirs = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**CONFIG))
    theirs.save_pretrained(tmp_path / "twins")
    return theirs, fastseg.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "twins")


@pytest.fixture
def processor():
    return fastseg.SegformerImageProcessor(size=64, do_reduce_labels=True)


@pytest.fixture
def data(processor):
    random = np.random.default_rng(1)
    maps = [Image.fromarray(random.integers(0, 4, (50, 70), dtype=np.uint8)) for _ in range(4)]
    inputs = processor(pictures(4), maps)
    return [{name: inputs[name][i] for name in inputs} for i in range(4)]


def accuracy(prediction):
    """As the guide computes its metrics."""
    logits, labels = prediction
    resized = nn.functional.interpolate(
        torch.from_numpy(logits), size=labels.shape[-2:], mode="bilinear", align_corners=False
    )
    found = resized.argmax(dim=1).numpy()
    return {"accuracy": float((found == labels)[labels != 255].mean())}


def trainer(model, data, folder, processor=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        eval_accumulation_steps=5,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **options,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=accuracy,
        processing_class=processor,
    )


@pytest.mark.every(4)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True, "every_n_layers": 2},
        },
        {"label_smoothing_factor": 0.0, "remove_unused_columns": False, "bf16": True},
    ],
    ids=["plain", "checkpointing", "every second layer", "bfloat16"],
)
def test_a_trained_model_is_that_of_transformers(options, twins, data, tmp_path):
    # Adam's steps are as long where a gradient is rounding alone.
    options = {**options, "optim": "sgd", "learning_rate": 0.1, "save_strategy": "no"}
    metrics = []
    for name, model in zip(("theirs", "ours"), twins, strict=True):
        run = trainer(model, data, tmp_path / name, **options)
        result = run.train()
        metrics.append(
            {"train_loss": result.training_loss, **run.evaluate(), **run.predict(data).metrics}
        )
    theirs, ours = twins
    if "gradient_checkpointing" in options:
        assert ours.is_activation_checkpointing
    theirs.save_pretrained(tmp_path / "trained")
    expected = fastseg.from_pretrained(tmp_path / "trained").state_dict()
    before = fastseg.from_pretrained(tmp_path / "twins").state_dict()
    # The second is of biases before a BatchNorm, whose gradients are rounding alone.
    bound, least = (0.1, 1e-5) if options.get("bf16") else (1e-3, 1e-6)
    for name, tensor in ours.state_dict().items():
        step = (expected[name] - before[name]).float().norm()
        assert (tensor - expected[name]).float().norm() <= bound * step + least, name
    for name in ("train_loss", "eval_loss", "eval_accuracy", "test_accuracy"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], abs=5e-3)


@pytest.mark.filterwarnings("error:.*Trainer has written:fastseg.CheckpointWarning")
def test_saved_resumed_and_loaded(twins, data, processor, tmp_path):
    _, model = twins
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    run = trainer(model, data, tmp_path / "run", processor, **options)
    run.train()
    run.save_model()
    # Trainer writes the weights of classes that are not its own, and no config.json.
    state = model.state_dict()
    with pytest.warns(fastseg.CheckpointWarning, match="Trainer .*config= or id2label="):
        loaded = fastseg.from_pretrained(tmp_path / "run", num_attention_heads=TINY_HEADS)
    assert loaded.config.id2label[1] == "LABEL_1"
    for again in (
        loaded,
        fastseg.from_pretrained(tmp_path / "run", id2label=NAMES, num_attention_heads=TINY_HEADS),
        fastseg.from_pretrained(tmp_path / "run", config=model.config),
    ):
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    assert again.config.id2label == NAMES
    assert fastseg.SegformerImageProcessor.from_pretrained(tmp_path / "run").do_reduce_labels
    resumed = trainer(again, data, tmp_path / "run", processor, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert resumed.state.global_step == 2
    model.save_pretrained(tmp_path / "model")
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "model")
    assert theirs.config.id2label == NAMES


TINY_HEADS = TINY["num_attention_heads"]


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"subtask": "semantic"}])
def test_pipeline(options, twins, processor, tmp_path):
    theirs, ours = twins
    processor.save_pretrained(tmp_path)
    kind = transformers.models.segformer.image_processing_pil_segformer.SegformerImageProcessorPil
    images = pictures(3)
    expected = pipeline(
        "image-segmentation",
        model=theirs.eval(),
        image_processor=kind.from_pretrained(tmp_path),
        device="cpu",
    )(images, **options)
    segmenter = pipeline("image-segmentation", model=ours, image_processor=processor, device="cpu")
    found = segmenter(images, **options)
    assert SEGMENTATION in repr(segmenter)
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        assert [item["label"] for item in one] == [item["label"] for item in other]
        assert len(one) > 1
        for item, their in zip(one, other, strict=True):
            assert item["mask"].size == (70, 50)
            differing = np.asarray(item["mask"]) != np.asarray(their["mask"])
            assert differing.mean() < 1e-3  # rounding on borders
    segmenter.save_pretrained(tmp_path / "pipeline")
    again = pipeline("image-segmentation", model=str(tmp_path / "pipeline"), device="cpu")
    assert type(again.model) is transformers.SegformerForSemanticSegmentation
    assert {item["label"] for item in again(images[0])} <= set(NAMES.values())


def test_classification_pipeline(processor, tmp_path):
    config = transformers.SegformerConfig(**CONFIG)
    theirs = transformers.SegformerForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = fastseg.from_pretrained(tmp_path)
    found = [
        pipeline("image-classification", model=model, image_processor=processor, device="cpu")(
            pictures(1)
        )[0]
        for model in (ours, theirs)
    ]
    assert [one["label"] for one in found[0]] == [one["label"] for one in found[1]]
    for one, other in zip(*found, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_outputs_as_dictionaries(processor):
    logits = torch.randn(2, 3, 16, 16)
    expected = processor.post_process_semantic_segmentation(logits, [(50, 70), (20, 30)])
    found = processor.post_process_semantic_segmentation({"logits": logits}, [(50, 70), (20, 30)])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(TypeError, match="outputs: expected the output of a model.*got dict"):
        processor.post_process_semantic_segmentation({"scores": logits})


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_layers_that_are_computed_again(every, offload, monkeypatch):
    """Each n-th layer through all stages, and the gradients are the same."""
    moved = []

    def counted(**options):
        moved.append(options)
        return torch.autograd.graph.save_on_cpu(**options)

    monkeypatch.setattr(checkpointing, "save_on_cpu", counted)
    config = fastseg.SegformerConfig(**{**CONFIG, "depths": [2, 1, 2, 1]})
    model = fastseg.SegformerForSemanticSegmentation(config).double().train()
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)

    def gradients():
        model.zero_grad()
        model(pixels).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    layers = [layer for stage in model.segformer.encoder.block for layer in stage]
    calls = dict.fromkeys(range(6), 0)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda *_, number=number: calls.__setitem__(number, calls[number] + 1)
        )
    model.gradient_checkpointing_enable(
        {"use_reentrant": False}, every_n_layers=every, offload=offload
    )
    assert model.is_activation_checkpointing
    assert model.is_gradient_checkpointing
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert list(calls.values()) == [1 if number % every else 2 for number in range(6)]
    assert moved == [{"pin_memory": True}] * (len(range(0, 6, every)) if offload else 0)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


def test_wrong_checkpointing():
    model = fastseg.SegformerForSemanticSegmentation(fastseg.SegformerConfig(**CONFIG))
    with pytest.raises(ValueError, match="every_n_layers: expected .*got 0"):
        model.activation_checkpointing_enable(every_n_layers=0)


def test_adapters_of_peft(twins, data, tmp_path):
    peft = pytest.importorskip("peft")
    _, model = twins
    fresh = fastseg.from_pretrained(tmp_path / "twins")
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], modules_to_save=["decode_head"]
    )
    adapted = peft.get_peft_model(model, config)
    trainer(adapted, data, tmp_path / "run", save_strategy="no").train()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = adapted.eval()(pixel_values=pixels).logits
        torch.testing.assert_close(again(pixel_values=pixels).logits, expected)
        assert not torch.allclose(
            fastseg.from_pretrained(tmp_path / "twins")(pixels).logits, expected
        )


WITH_4 = """
import sys, torch, transformers, fastseg
from PIL import Image
from transformers import Trainer, TrainingArguments, pipeline
assert transformers.__version__.startswith("4."), transformers.__version__
model = fastseg.SegformerForSemanticSegmentation(
    fastseg.SegformerConfig(depths=(1, 1, 1, 1), num_labels=3)
)
data = [
    {"pixel_values": torch.randn(3, 64, 64), "labels": torch.randint(0, 3, (64, 64))}
    for _ in range(2)
]
arguments = TrainingArguments(
    output_dir=sys.argv[1], max_steps=1, report_to=[], use_cpu=True, save_strategy="no",
    disable_tqdm=True, gradient_checkpointing=True,
)
Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data).train()
assert model.is_gradient_checkpointing
processor = fastseg.SegformerImageProcessor(size=64)
segmenter = pipeline(
    "image-segmentation", model=model.eval(), image_processor=processor, device="cpu"
)
print(segmenter(Image.new("RGB", (70, 50)))[0]["mask"].size)
"""


@pytest.mark.slow
def test_with_transformers_4(run_transformers4, tmp_path):
    assert run_transformers4(WITH_4, tmp_path).splitlines()[-1] == "(70, 50)"

"""transformers around an accelerated model: pipelines, Trainer, PEFT."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg

from .checks import assert_parity, same_bits
from .host_models import HOSTS

transformers = pytest.importorskip("transformers")  # this file is collected where it is there
peft = pytest.importorskip("peft")

HOST = HOSTS["transformers"]
TARGETS = ["q_proj", "v_proj"] if transformers.__version__.startswith("5") else ["query", "value"]


@pytest.fixture
def model():
    return HOST.build()


@pytest.fixture
def image():
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(20, axis=0).repeat(17, axis=1))


def pipeline(model):
    """With 64 x 64 pixels inside, and masks at the image's own size."""
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64})
    return transformers.pipeline("image-segmentation", model=model, image_processor=processor)


def test_pipeline_gives_the_same_masks(model, image, calls):
    with torch.no_grad():  # so that several classes win
        pixels = pipeline(model).preprocess(image)["pixel_values"]
        model.decode_head.classifier.bias -= model(pixels).logits.mean((0, 2, 3))
    plain = copy.deepcopy(model)
    theirs = pipeline(plain)(image)
    assert calls == []
    ours = pipeline(fastseg.accelerate(model))(image)
    assert calls.count_and_clear() == HOST.calls()
    assert len(theirs) > 1
    assert [found["label"] for found in ours] == [found["label"] for found in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(mine["mask"]), np.asarray(other["mask"]))


def test_accelerated_inside_a_pipeline(model, image, calls):
    segment = pipeline(model)
    before = segment(image)
    fastseg.accelerate(segment.model)
    after = segment(image)
    assert calls.count_and_clear() == HOST.calls()
    for mine, other in zip(after, before, strict=True):
        assert np.array_equal(np.asarray(mine["mask"]), np.asarray(other["mask"]))


class Scenes(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {
            "pixel_values": torch.randn(3, 64, 64, generator=generator),
            "labels": torch.randint(0, 5, (64, 64), generator=generator),
        }


def trained(model, folder):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        seed=3,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Scenes(), eval_dataset=Scenes()
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"]


@pytest.mark.slow
def test_trainer_trains_identically(model, tmp_path, calls):
    plain = copy.deepcopy(model)
    fastseg.accelerate(model)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    calls.clear()
    (theirs, their_evaluation) = trained(plain, tmp_path / "plain")
    assert calls == []
    ours, our_evaluation = trained(model, tmp_path / "accelerated")
    assert len(ours) == 2
    assert ours == theirs
    assert calls.count_and_clear() == {op: 2 * n for op, n in HOST.calls().items()}  # evaluation
    assert our_evaluation == pytest.approx(their_evaluation, rel=1e-5)
    assert same_bits(list(model.state_dict().values()), list(plain.state_dict().values()))


def lora(model):
    torch.manual_seed(11)
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights=False, modules_to_save=["classifier"]
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("first", ["lora", "accelerated"])
def test_lora(model, pixels, calls, first):
    plain = lora(copy.deepcopy(model)).eval()
    if first == "lora":
        adapted = lora(model).eval()
        assert fastseg.accelerate(adapted) is adapted
    else:
        fastseg.accelerate(model)
        with torch.no_grad():
            model(pixels)
        adapted = lora(model).eval()
    calls.clear()
    assert_parity(HOST, adapted, plain, pixels)
    counts = calls.count_and_clear()
    # The adapted attentions are the host's, the rest is fast.
    assert counts.get("mix_ffn") == HOST.layers
    assert counts.get("patch_embed") == 4
    assert "sr_attention" not in counts
    with torch.no_grad():
        report = fastseg.report(adapted)
    assert report.count("attention: the host's own") == HOST.layers

    # Training the adapters, bit for bit.
    gradients = []
    for each in (adapted, plain):
        each.train()
        torch.manual_seed(2)
        each(pixel_values=pixels).logits.square().mean().backward()
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    assert calls == []
    assert len(gradients[0]) > 4
    assert same_bits(*gradients)

    # Merged, the linear layers are what they were, with other weights. What was left to the host
    # when the model was accelerated is taken when it is accelerated again.
    merged, expected = adapted.eval().merge_and_unload(), plain.eval().merge_and_unload()
    assert_parity(HOST, merged, expected, pixels)
    if first == "lora":
        fastseg.accelerate(merged)
    calls.clear()
    assert_parity(HOST, merged, expected, pixels)
    counts = calls.count_and_clear()
    assert counts.get("sr_attention") == HOST.layers
    assert counts.get("mix_ffn") == HOST.layers


@pytest.mark.parametrize("frozen", [True, False])
def test_adapter_loaded_and_merged(model, pixels, tmp_path, frozen, calls):
    """PEFT merges through `weight.data`, which PyTorch does not count."""
    model.requires_grad_(not frozen)
    lora(copy.deepcopy(model)).save_pretrained(tmp_path)
    plain = copy.deepcopy(model)
    expected = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    fastseg.accelerate(model)
    with torch.no_grad():
        model(pixels)
    calls.clear()
    merged = peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    assert_parity(HOST, merged, expected, pixels)
    assert calls.count_and_clear()["sr_attention"] == HOST.layers


def test_lora_merged_in_place(model, pixels):
    """`merge_adapter` adds to the base layers and leaves the wrappers there."""
    plain, adapted = lora(copy.deepcopy(model)).eval(), lora(model).eval()
    fastseg.accelerate(adapted)
    for step in ("merge_adapter", "unmerge_adapter"):
        assert_parity(HOST, adapted, plain, pixels)
        getattr(adapted, step)()
        getattr(plain, step)()
    with adapted.disable_adapter(), plain.disable_adapter():
        assert_parity(HOST, adapted, plain, pixels)


def test_lora_on_every_linear(model, pixels):
    config = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    models = []
    for each in (model, copy.deepcopy(model)):
        torch.manual_seed(12)
        models.append(peft.get_peft_model(each, peft.LoraConfig(**config)).eval())
    fastseg.accelerate(models[0])
    assert_parity(HOST, models[0], models[1], pixels)


def test_quantised_linears(model, pixels):
    """Dynamic int8 of the linear layers: those are the host's, patch embeddings stay fast."""
    if "qnnpack" not in torch.backends.quantized.supported_engines and not (
        set(torch.backends.quantized.supported_engines) - {"none"}
    ):
        pytest.skip("no quantised engine in this torch")
    quantise = torch.ao.quantization.quantize_dynamic
    plain = quantise(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    quantised = quantise(model, {torch.nn.Linear}, dtype=torch.qint8)
    fastseg.accelerate(quantised)
    with torch.no_grad():
        ours, theirs = quantised(pixels).logits, plain(pixels).logits
    # Rounding to integers makes steps of small differences.
    assert (ours - theirs).abs().mean() <= 0.02 * theirs.abs().mean()

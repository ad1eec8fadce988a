"""Label maps by prompts: against transformers' forwards, by both rules, and what is kept."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import fastseg
from fastseg.models.seggpt import prompts as of_prompts
from fastseg.models.seggpt.encoder_plan import LayerPlan
from fastseg.models.seggpt.prompts import SegGptPrompt, paint, streams_of
from tests.model_cases import relative_error

from .cases import exact_softmax, inputs, twins


def picture(seed=0, size=(40, 50)):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


def mask(classes=3, seed=0, size=(40, 50)):
    coarse = np.random.default_rng(seed).integers(0, classes + 1, (5, 6)).astype(np.uint8)
    coarse.flat[:2] = 0, classes
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.NEAREST))


def kept(model, count, seed=1):
    """Prompts of random pixels."""
    given = inputs(model, count, seed)
    pairs = zip(given["prompt_pixel_values"], given["prompt_masks"], strict=True)
    return [SegGptPrompt(model, a[None], b[None], None, "instance") for a, b in pairs]


def painters_rule(model, given):
    """transformers' layers with Painter's condition, `merge_index >= index`."""
    encoder, count = model.model.encoder, len(given["pixel_values"])
    tokens = given["pixel_values"].shape[2] * given["pixel_values"].shape[3] // 64
    masked = torch.arange(2 * tokens)[None] >= tokens
    x = model.model.embeddings(
        torch.cat([given["prompt_pixel_values"], given["pixel_values"]], 2),
        torch.cat([given["prompt_masks"]] * 2, 2),
        masked,
    )
    features = []
    for index, layer in enumerate(encoder.layers):
        x = layer(x, 2 if index <= model.config.merge_index else 1, True)[0]
        if index == model.config.merge_index:
            x = (x[:count] + x[count:]) * 0.5
        if index in model.config.intermediate_hidden_state_indices:
            features.append(encoder.layernorm(x))
    return model.decoder(torch.cat(features, -1))


WAYS = ("folded", "accelerated", "plain", "host", "hooked")


def of_way(way, hosts, ours):
    if way == "hooked":  # layers half by half by their own code
        ours.model.encoder.layers[0].attention.register_forward_hook(lambda *arguments: None)
        ours.model.encoder.layers[1].mlp.register_forward_hook(lambda *arguments: None)
        ours.model.encoder.layers[4].register_forward_hook(lambda *arguments: None)
    if way == "accelerated":
        return fastseg.accelerate(hosts)
    return hosts if way == "host" else ours


@pytest.mark.parametrize("rule", ["painter", "transformers"])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_ensemble_in_float64(way, count, rule):
    hosts, ours = (one.double() for one in twins())
    given = inputs(hosts, count)
    given["pixel_values"] = given["pixel_values"][:1].expand_as(given["pixel_values"])
    with exact_softmax():
        if rule == "painter":
            expected = painters_rule(hosts, given)
        else:
            expected = hosts(**given, feature_ensemble=count > 1).pred_masks
        expected = expected[:1, :, 32:]
        model = of_way(way, hosts, ours)
        prompts = kept(model, count)
        image = given["pixel_values"][:1]
        if way == "plain":
            with fastseg.plain_path():
                painted = paint(model, image, streams_of(model, prompts, rule), rule)
        else:
            painted = paint(model, image, streams_of(model, prompts, rule), rule)
    assert painted.shape == expected.shape
    assert relative_error(painted, expected) < 1e-12


def test_the_rules_differ():
    model = twins()[1]
    prompts = kept(model, 2)
    image = inputs(model, seed=5)["pixel_values"]
    with torch.no_grad():
        one, two = (
            paint(model, image, streams_of(model, prompts, rule), rule)
            for rule in ("painter", "transformers")
        )
    assert relative_error(one, two) > 0.01


@pytest.mark.parametrize("count", [1, 3])
def test_the_images_half_is_computed_once(monkeypatch, count):
    """And of the last layer no more than is wanted."""
    model = twins()[1]
    tokens = []
    through = LayerPlan._through_mlp

    def counted(plan, x):
        tokens.append(x.numel() // 48)
        return through(plan, x)

    monkeypatch.setattr(LayerPlan, "_through_mlp", counted)
    prompts = kept(model, count)
    image = inputs(model)["pixel_values"]
    with torch.no_grad():
        streams = streams_of(model, prompts, "painter")
        assert sum(tokens) == 2 * 16 * (count + 1)  # layers up to the merge, of masks alone
        tokens.clear()
        paint(model, image, streams, "painter")
    assert sum(tokens) == 4 * 16 * (count + 1) + 16 + 4


def labels_of(hosts, image, prompt, prompt_mask, num_labels):
    """By transformers' own processor, forward and post-processing."""
    processor = transformers.SegGptImageProcessor(size={"height": 32, "width": 32})
    given = processor(
        images=image,
        prompt_images=prompt,
        prompt_masks=prompt_mask,
        num_labels=num_labels,
        return_tensors="pt",
    )
    with torch.no_grad():
        outputs = hosts(**given)
    size = image.size[::-1]
    return processor.post_process_semantic_segmentation(outputs, [size], num_labels)[0]


@pytest.mark.parametrize("way", ["folded", "accelerated", "host"])
def test_label_maps_of_pictures(way):
    hosts, ours = twins()
    images = [picture(3), picture(4, (33, 90))]
    expected = [labels_of(hosts, one, picture(1), mask(), 3) for one in images]
    model = of_way(way, hosts, ours)
    pair = (picture(1), mask())
    prompt = fastseg.keep_prompt(model, *pair)
    assert prompt.num_labels == 3
    for prompts in ([pair], [prompt]):
        found = fastseg.segment(model, images, prompts=prompts)
        for mine, their in zip(found, expected, strict=True):
            assert mine.dtype == torch.int64
            assert (mine == their).float().mean() > 0.999  # but for ties


def test_forms_of_images_and_masks():
    model = twins()[1]
    one = picture(3)
    (expected,) = fastseg.segment(model, one, prompts=[(picture(1), mask(1))])
    floats = np.asarray(one).astype(np.float32) / 255
    first = torch.from_numpy(np.asarray(one).copy()).permute(2, 0, 1)
    for image in (np.asarray(one), floats, first):
        (found,) = fastseg.segment(model, [image], prompts=[(np.asarray(picture(1)), mask(1))])
        assert torch.equal(found, expected)
    for form in (mask(1) * 255, mask(1) > 0, Image.fromarray(mask(1) * 255), mask(1) * 1.0):
        (found,) = fastseg.segment(model, one, prompts=[(picture(1), form)])
        assert torch.equal(found, expected)


def test_the_largest_number_of_all_masks_counts():
    model = twins()[1]
    pairs = [(picture(1), mask(2)), (picture(2), mask(5))]
    (found,) = fastseg.segment(model, picture(3), prompts=pairs)
    (expected,) = fastseg.segment(model, picture(3), prompts=pairs, num_labels=5)
    assert torch.equal(found, expected)
    prompts = [fastseg.keep_prompt(model, *pair) for pair in pairs]
    with pytest.raises(ValueError, match=r"the same num_labels of all, got \[2, 5\]"):
        fastseg.segment(model, picture(3), prompts=prompts)


def test_masks_in_colours():
    model = twins()[1]
    processor = fastseg.SegGptImageProcessor(do_convert_rgb=False)
    painted = np.array(processor.get_palette(3), dtype=np.uint8)[mask()]
    (expected,) = fastseg.segment(model, picture(3), prompts=[(picture(1), mask())])
    (found,) = fastseg.segment(
        model, picture(3), prompts=[(picture(1), painted)], num_labels=3, processor=processor
    )
    assert torch.equal(found, expected)
    (means,) = fastseg.segment(
        model, picture(3), prompts=[(picture(1), painted)], processor=processor
    )
    assert means.dtype == torch.int32


def test_labels_of_8_bits_are_the_same():
    model = twins()[1]
    options = {"prompts": [(picture(1), mask())], "num_labels": 5}
    (found,) = fastseg.segment(model, picture(3), dtype=torch.uint8, **options)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), fastseg.segment(model, picture(3), **options)[0])
    with pytest.raises(ValueError, match="uint8 tells 256 classes apart, the model has 257"):
        fastseg.segment(model, picture(3), dtype=torch.uint8, **{**options, "num_labels": 256})


def test_kept_prompts_give_the_same_bits(monkeypatch):
    model = twins()[1]
    prompt = fastseg.keep_prompt(model, picture(1), mask())
    made = []
    streams = of_prompts.streams_of
    monkeypatch.setattr(
        of_prompts, "streams_of", lambda *arguments: made.append(1) or streams(*arguments)
    )
    first = fastseg.segment(model, [picture(3), picture(4)], prompts=[prompt])
    again = fastseg.segment(model, [picture(4), picture(3)], prompts=[prompt])
    assert made == []
    anew = fastseg.segment(model, [picture(3), picture(4)], prompts=[(picture(1), mask())])
    for one, two, three in zip(first, again[::-1], anew, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def train_a_step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def other_weights(model):
    model.load_state_dict({name: -tensor for name, tensor in model.state_dict().items()})


def hook_that_doubles(model):
    mlp = model.model.encoder.layers[0].mlp
    mlp.register_forward_hook(lambda module, arguments, output: 2 * output)


def uncounted(model):
    model.model.encoder.layers[0].mlp.lin1.weight.data.mul_(-1)
    fastseg.refold(model)


CHANGES = [train_a_step, other_weights, hook_that_doubles, uncounted, torch.nn.Module.double]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["folded", "accelerated"])
def test_a_changed_model_makes_them_anew(way, change):
    model = of_way(way, *twins())
    prompt = fastseg.keep_prompt(model, picture(1), mask())
    before = prompt.streams().masks.prompts
    change(model)
    found = fastseg.segment(model, picture(3), prompts=[prompt])
    assert prompt.streams().masks.prompts is not before
    expected = fastseg.segment(model, picture(3), prompts=[(picture(1), mask())])
    assert torch.equal(found[0], expected[0])


def test_embedding_types():
    model = twins()[1]
    maps = {
        kind: fastseg.segment(
            model, picture(3), prompts=[(picture(1), mask())], embedding_type=kind
        )[0]
        for kind in ("instance", "semantic")
    }
    assert not torch.equal(*maps.values())
    own = fastseg.SegGPTForSemanticSegmentation(model.config).eval()
    own.load_state_dict(model.state_dict())
    (found,) = fastseg.segment(own, picture(3), prompts=[(picture(1), mask())])
    assert torch.equal(found, maps["semantic"])


def test_the_saved_processor_counts(tmp_path):
    model = twins()[1]
    model.save_pretrained(tmp_path)
    fastseg.SegGptImageProcessor(image_mean=[0.1] * 3, num_labels=7).save_pretrained(tmp_path)
    loaded = fastseg.from_pretrained(tmp_path)
    prompt = fastseg.keep_prompt(loaded, picture(1), mask())
    assert prompt.num_labels == 7
    processor = fastseg.SegGptImageProcessor.from_pretrained(tmp_path)
    (found,) = fastseg.segment(loaded, picture(3), prompts=[prompt])
    (expected,) = fastseg.segment(
        model, picture(3), prompts=[(picture(1), mask())], processor=processor
    )
    assert torch.equal(found, expected)


def wrong(model):
    other = copy.deepcopy(model)
    pair = (picture(1), mask())
    prompt = fastseg.keep_prompt(other, *pair)
    segformer = fastseg.from_preset("segformer_b0", num_classes=2).eval()
    return {
        "no prompts": (dict(prompts=None), r"prompts: expected \[\(image, mask\)"),
        "empty": (dict(prompts=[]), "prompts: expected a list"),
        "one": (dict(prompts=prompt), "prompts: expected a list"),
        "no pair": (dict(prompts=[picture(1)]), r"prompts\[0\]: expected \(image, mask\)"),
        "another model's": (dict(prompts=[pair, prompt]), r"prompts\[1\]: expected one of this"),
        "rule": (dict(prompts=[pair], ensemble_rule="mean"), "ensemble_rule: expected one of"),
        "type": (dict(prompts=[pair], embedding_type="both"), "embedding_type: expected one of"),
        "labels": (dict(prompts=[pair], num_labels=2), "labels from 0, the background, to 2"),
        "processor": (
            dict(prompts=[pair], processor=fastseg.SegformerImageProcessor()),
            "processor: expected a SegGptImageProcessor, got a? ?SegformerImageProcessor",
        ),
        "slide": (dict(prompts=[pair], slide=(32, 16)), "slide: expected None with prompts"),
        "no SegGPT": (dict(prompts=[pair], model=segformer), "model: expected a SegGptForImage"),
    }


@pytest.mark.parametrize("case", wrong(twins()[1]))
def test_errors_name_what_is_wrong(case):
    model = twins()[1]
    call, message = wrong(model)[case]
    call = {"model": model, "images": picture(3), **call}
    with pytest.raises((TypeError, ValueError), match=message):
        fastseg.segment(**call)


def test_modules_that_would_be_left_out():
    model = twins()[1]
    handle = model.model.encoder.register_forward_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match="model.encoder has forward hooks"):
        fastseg.keep_prompt(model, picture(1), mask())
    handle.remove()
    with pytest.raises(ValueError, match="expected eval mode"):
        fastseg.keep_prompt(model.train(), picture(1), mask())
    model.eval().decoder.register_forward_hook(lambda module, arguments, output: output * 0)
    (found,) = fastseg.segment(model, picture(3), prompts=[(picture(1), mask())])
    assert len(found.unique()) == 1  # its hooks see their forward


def test_half_precision():
    ours = twins()[1]
    prompts = [(picture(1), mask())]
    (expected,) = fastseg.segment(ours, picture(3), prompts=prompts)
    (found,) = fastseg.segment(ours.bfloat16(), picture(3), prompts=prompts)
    assert (found == expected).float().mean() > 0.9

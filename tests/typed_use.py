"""What users write, for `tests/test_typed_use.py`, which gives it to mypy. Nothing runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import SegformerForSemanticSegmentation
from transformers import SegformerImageProcessor as TheirProcessor

import fastseg
from fastseg.kernels import MixFfnWeights, upsample_argmax


class Streets(Dataset[tuple[Image.Image, torch.Tensor]]):
    """As torch has them, without an `__iter__`."""

    def __getitem__(self, index: int) -> tuple[Image.Image, torch.Tensor]:
        return Image.new("RGB", (64, 64)), torch.zeros(64, 64, dtype=torch.int64)

    def __len__(self) -> int:
        return 4


def of_transformers(pixels: torch.Tensor) -> torch.Tensor:
    model = SegformerForSemanticSegmentation.from_pretrained("folder")
    accelerated = fastseg.accelerate(model)
    print(fastseg.report(accelerated), accelerated.config.id2label)
    fastseg.warmup(model, [(1, 3, 512, 512)])
    fastseg.segment(torch.compile(model), Image.new("RGB", (8, 8)))
    fastseg.segment(fastseg.graphed(model), Image.new("RGB", (8, 8)))
    theirs = TheirProcessor.from_pretrained("folder")
    fastseg.segment(model, Image.new("RGB", (8, 8)), processor=theirs)
    fastseg.segment(nn.DataParallel(model), Image.new("RGB", (8, 8)))
    logits: torch.Tensor = fastseg.restore(accelerated)(pixels).logits
    return logits


def load(pixels: torch.Tensor, path: Path, runtime: str | None) -> None:
    model = fastseg.from_pretrained("nvidia/segformer-b0-finetuned-ade-512-512", dtype="fast")
    print(model(pixels).logits, model.config.id2label[0], model.device, model.load_report)
    model.to("cuda").eval().save_pretrained(path)
    half = fastseg.from_pretrained(path, dtype=torch.float16, num_labels=3, drop_path_rate=0.0)
    print(half.num_parameters(), half(pixel_values=pixels).logits.shape)
    loaded, info = fastseg.from_pretrained(path, output_loading_info=True)
    print(loaded.dtype, info["missing_keys"])
    fast = fastseg.from_pretrained("model.onnx", runtime="openvino")
    print(fast.precision, fast(pixels).logits, fast.config.num_labels)
    fastseg.segment(fastseg.from_pretrained(path, runtime=runtime), np.zeros((8, 8, 3)))
    own = fastseg.SegformerForSemanticSegmentation.from_pretrained(path)
    print(own.segformer.encoder, own.config.hidden_sizes[0] + 1, own(pixels).loss)
    fastseg.export(own, "model.onnx", height=512, width=512)
    new = fastseg.from_preset("segformer_b0", 19, drop_path_rate=0.1)
    optimizer = torch.optim.AdamW(fastseg.accelerate(new, training=True).parameters(), lr=6e-5)
    new(pixels, labels=pixels[:, 0].long()).loss.backward()
    optimizer.step()


def configure() -> fastseg.SegformerForSemanticSegmentation:
    config = fastseg.SegformerConfig(depths=(1, 1, 1, 1), id2label={0: "road", 1: "car"})
    config = fastseg.SegformerConfig(id2label={"0": "road"}, palette=[[0, 0, 0]])
    config = fastseg.SegformerConfig(id2label=["road", "car"], num_labels=2)
    config = fastseg.SegformerConfig.from_dict(config.to_dict())
    print(json.dumps(config.to_dict()))
    return fastseg.SegformerForSemanticSegmentation(config)


def segment(model: nn.Module, arrays: list[np.ndarray], pixels: torch.Tensor) -> None:
    picture = Image.open("street.jpg")
    pictures = [picture, Image.open("road.jpg").convert("RGB")]
    labels = fastseg.segment(model, picture)[0] + 1
    labels = fastseg.segment(model, pictures, slide=(1024, 768), tta=("flip", 0.75))[0]
    fastseg.segment(model, arrays, dtype=torch.uint8, batch_size=4)
    fastseg.segment(model, [*pictures, *arrays, pixels])
    fastseg.segment(model, pixels, input_data_format="channels_first")
    maps, scores = fastseg.segment(model, pictures, return_scores=True, threshold=0.5)
    print(labels.shape, maps[0].shape, scores[0].mean())
    own = fastseg.SegformerImageProcessor(size={"height": 1024, "width": 1024})
    for result in fastseg.segment(model, pictures, processor=own, results=True):
        use(result)


def use(result: fastseg.Result) -> None:
    result.save("overlay.jpg")
    result.overlay(alpha=0.5, legend=False).show()
    result.cutout(["car", 3]).save(Path("car.png"))
    print(result.mask("car").sum(), result.shares()[0].name, result.labels.shape)
    large = [one["bbox"] for one in result.coco() if one["area"] > 100]
    print(large, result.rle()[0]["counts"], result.rle()[0]["size"][0])
    for region in result.to_geojson(simplify=1.0)["features"]:
        print(region["properties"]["name"], region["geometry"]["type"])
    for number, polygon in result.polygons():
        print(number + 1, polygon.area)
    Path("out.json").write_text(json.dumps({"annotations": result.coco()}))


def evaluate(
    model: nn.Module, masks: list[np.ndarray], own: fastseg.SegformerImageProcessor
) -> None:
    pairs = [(Image.open("street.jpg"), masks[0]), (Image.open("road.jpg"), masks[1])]
    found = fastseg.evaluate(model, pairs, processor=own, against="plain", worst=2)
    print(found, found.mean_iou * 100, found.iou.tolist(), found.settings["mode"])
    Path("figures.json").write_text(json.dumps(found.to_dict()))
    fastseg.evaluate(model, "data", split="val", slide=(512, 384), progress=print)
    fastseg.evaluate(model, Path("data"), against=fastseg.from_preset("segformer_b0"))
    fastseg.evaluate(model, zip(masks, masks, strict=True), ignore_index=None)
    fastseg.evaluate(model, ((one, one > 0) for one in masks), boundary=True)
    fastseg.evaluate(model, Streets())
    fastseg.evaluate(model, DataLoader(Streets(), batch_size=None))
    with fastseg.plain_path(), fastseg.graphs(False):
        fastseg.evaluate(model, [[one, one] for one in masks])


def prepare(model: nn.Module, mask: np.ndarray) -> list[torch.Tensor]:
    processor = fastseg.SegformerImageProcessor.from_pretrained("folder", do_reduce_labels=True)
    picture = Image.open("street.jpg")
    inputs = processor(picture, return_tensors="pt").to("cuda")
    inputs = processor([picture], [mask], return_tensors="pt", size=(512, 512), do_rescale=True)
    inputs = processor(images=[picture], segmentation_maps=Image.fromarray(mask))
    print(inputs["pixel_values"].shape, inputs.labels, processor.to_dict()["size"])
    own = fastseg.SegformerImageProcessor(image_mean=[0.5, 0.5, 0.5], image_std=0.5)
    own = fastseg.SegformerImageProcessor(image_mean=np.array([0.5]), image_std=(0.5,), size=512)
    own.save_pretrained("folder")
    outputs = model(**inputs)
    post_process = own.post_process_semantic_segmentation
    sized = post_process(outputs, target_sizes=[picture.size[::-1]])
    sized += post_process(outputs.logits, target_sizes=[(512, 512)])
    sized += post_process(outputs, torch.tensor([[512, 512]]))
    scored = post_process(outputs, return_segmentation_scores=True)
    print(scored[0].segmentation, upsample_argmax(outputs.logits, (512, 512)))
    return sized


def by_example(images: list[Image.Image], mask: np.ndarray) -> None:
    model = fastseg.SegGptForImageSegmentation.from_pretrained("BAAI/seggpt-vit-large")
    fastseg.segment(model, images, prompts=[(images[0], mask)])
    kept = fastseg.keep_prompt(model, images[0], mask, num_labels=2)
    fastseg.segment(model, images, prompts=[kept], ensemble_rule="transformers")
    fastseg.evaluate(model, [(images[0], mask)], prompts=[kept])
    processor = fastseg.SegGptImageProcessor(num_labels=2)
    inputs = processor(images=images[0], prompt_images=images, prompt_masks=[mask, mask])
    print(inputs, processor.post_process_semantic_segmentation(model(**inputs), [(8, 8)])[0] + 1)


def of_kernels(weights: MixFfnWeights) -> int:
    return len(weights.least_input())

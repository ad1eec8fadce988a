"""Make a SegFormer of transformers fast, and see that its masks stay the same.

python examples/accelerate_transformers.py street.jpg --model DIR_OR_ID
"""

from __future__ import annotations

import argparse
import time

import torch
from PIL import Image
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

import fastseg


def label_map(model, processor, image: Image.Image) -> torch.Tensor:
    inputs = processor(image, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        outputs = model(**inputs)
    size = (image.height, image.width)
    return processor.post_process_semantic_segmentation(outputs, target_sizes=[size])[0]


def seconds(model, processor, image: Image.Image, repeats: int = 5) -> float:
    label_map(model, processor, image)  # what is done once
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        label_map(model, processor, image).cpu()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image")
    parser.add_argument("--model", required=True, help="a hub id or a folder of transformers")
    arguments = parser.parse_args()

    model = SegformerForSemanticSegmentation.from_pretrained(arguments.model, dtype=torch.float32)
    if torch.cuda.is_available():
        model.cuda()
    processor = SegformerImageProcessor.from_pretrained(arguments.model)
    image = Image.open(arguments.image).convert("RGB")

    before, slow = label_map(model, processor, image), seconds(model, processor, image)
    fastseg.accelerate(model)
    after, fast = label_map(model, processor, image), seconds(model, processor, image)

    print(fastseg.report(model))
    print(f"{1000 * slow:.0f} ms before, {1000 * fast:.0f} ms after: {slow / fast:.1f}x")
    print(f"{(before == after).double().mean():.4%} of the labels are the same")
    # fastseg.segment does the whole way faster: labels = fastseg.segment(model, [image])


if __name__ == "__main__":
    main()

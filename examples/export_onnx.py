"""Write a SegFormer's folded graph as ONNX, and run it in ONNX Runtime.

python examples/export_onnx.py street.jpg --model DIR_OR_ID
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

import fastseg
from fastseg.images.overlay import label_image
from fastseg.images.palettes import config_palette


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image")
    parser.add_argument("--model", required=True, help="a hub id, a folder or a file")
    parser.add_argument("--output", type=Path, default=Path("model.onnx"))
    arguments = parser.parse_args()

    model = fastseg.from_pretrained(arguments.model)
    # Labels inside, as bytes: from pixels to the label map of the same size.
    print(fastseg.export(model, arguments.output, labels=True, label_dtype=torch.uint8))

    # What a program without PyTorch does: resize, normalise, run.
    session = onnxruntime.InferenceSession(arguments.output, providers=["CPUExecutionProvider"])
    image = Image.open(arguments.image).convert("RGB").resize((512, 512))
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pixels = (np.asarray(image, np.float32) / 255 - mean) / std
    (labels,) = session.run(None, {"pixel_values": pixels.transpose(2, 0, 1)[None]})

    result = arguments.output.with_suffix(".png")
    label_image(labels[0], config_palette(model.config)).save(result)
    print(f"wrote {result}: {len(np.unique(labels))} classes")


if __name__ == "__main__":
    main()

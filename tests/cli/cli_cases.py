"""What tests of the command line share: tiny models and small photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data

import fastseg
from tests.model_cases import randomize

SIZE = (60, 48)  # of most pictures here: width, height


def save_model(folder: Path, num_labels: int = 6, **options) -> Path:
    """A tiny model of random weights whose label maps of photographs show several classes."""
    torch.manual_seed(3)
    config = fastseg.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=16,
        num_labels=num_labels,
        **options,
    )
    model = fastseg.SegformerForSemanticSegmentation(config)
    processor = fastseg.SegformerImageProcessor(size=64)
    with torch.no_grad():  # no class ahead of the others on average
        logits = model.eval()(processor(photo("coffee"), return_tensors="pt").pixel_values).logits
        model.decode_head.classifier.bias -= logits.mean(dim=(0, 2, 3))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_seggpt(folder: Path) -> Path:
    """A tiny SegGPT of random weights."""
    config = fastseg.SegGptConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[32, 16],
        patch_size=4,
        pretrain_image_size=16,
        decoder_hidden_size=8,
        merge_index=0,
        intermediate_hidden_state_indices=[0, 1],
    )
    model = fastseg.SegGptForImageSegmentation(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    fastseg.SegGptImageProcessor().save_pretrained(folder)
    return folder


def photo(name: str, size: tuple[int, int] = SIZE) -> Image.Image:
    return Image.fromarray(getattr(data, name)()).resize(size)


def make_photos(folder: Path) -> Path:
    """A folder of two photographs, one of them below, and of things that are no images."""
    (folder / "below").mkdir(parents=True)
    photo("coffee").save(folder / "coffee.jpg")
    photo("astronaut").save(folder / "below" / "astronaut.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_text("no image either")
    return folder


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read_labels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


def segmented(model_folder: Path, image: Image.Image, **options) -> np.ndarray:
    """What the library gives for a picture."""
    model = fastseg.from_pretrained(model_folder, dtype=torch.float32)
    processor = fastseg.SegformerImageProcessor.from_pretrained(model_folder)
    return fastseg.segment(model, [image], processor=processor, **options)[0].numpy()

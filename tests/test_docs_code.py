"""Documents: their Python and their commands are run, in a folder with the files that they name.

Ids of the hub are folders there, with small models; `MODEL`, `DIR_OR_ID` and `DATA` too. What is
not run is in NOT_RUN, with the reason.
"""

from __future__ import annotations

import argparse
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.images.palettes import dataset
from tests.cli.cli_cases import photo, save_seggpt
from tests.test_docs import DOCUMENTS, ROOT, Document

# Beginnings of commands and of Python blocks.
NOT_RUN = {
    "git ": "clones",
    "pip ": "installs",
    "make ": "sets up an environment of its own; CI runs them",
    "python -m bench": "measures for minutes; tests/bench runs it on less",
    "fastseg bench": "the same",
    "fastseg predict photos/ --engine ray": "tests/engines runs engines, with their libraries",
    "fastseg tune": "needs a GPU",
    "pytest": "the tests themselves",
    "TRITON_INTERPRET=1 pytest": "the tests themselves",
    "cd DIR/layout": "needs a GPU",
    "PYTHONPATH=$PWD python -m pytest": "needs a GPU",
    "FASTSEG_CONFIGS=my-gpu.json python serve.py": "a program of the reader's",
    "with torch.serialization.safe_globals([argparse.Namespace]):": "a file of another program",
    'model = fastseg.from_pretrained("segformer.keras")': "tests/checkpoints/test_keras_cv.py",
    "import torch\nfrom transformers import AutoModelForSemanticSegmentation, BitsAndBytes": (
        "tests/models/hosts/test_transformers_quantized.py runs it"
    ),
    'size = {0: Dim("batch")': "tests/exporting/test_export_torch.py compiles so",
    "count = (labels != 255).sum()": "tests/training/test_data_parallel.py: two processes",
}
EMBEDDED = ROOT / "fastseg" / "demo" / "assets" / "scenes-b0"
_COMMAND = re.compile(r"(?:[A-Z0-9_]+=\S* )*(?:fastseg|python3?|make|pip|git|pytest|cd|docker)\b")
ADE20K = dataset("ade20k").names
# Engines' own is run by tests/engines, with their libraries.
WITH_CODE = [
    path for path in DOCUMENTS if Document.read(path).blocks and path.stem != "distributed"
]


def why_not(text: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if text.startswith(start)), None)


def save_segformer(
    folder: Path, kind=fastseg.SegformerForSemanticSegmentation, classes=ADE20K
) -> None:
    """A B0 of random weights."""
    names = dict(enumerate(classes))
    torch.manual_seed(0)
    kind(fastseg.SegformerConfig(id2label=names)).eval().save_pretrained(folder)
    fastseg.SegformerImageProcessor(size=64).save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What documents name."""
    folder = tmp_path_factory.mktemp("reader")
    for name in (
        *(
            "MODEL",
            "DIR_OR_ID",
            "segformer-b2-cityscapes",
            "nvidia/mit-b0",
            "output/checkpoint-500",
        ),
        *(f"nvidia/segformer-{size}-finetuned-ade-512-512" for size in ("b0", "b2")),
    ):
        save_segformer(folder / name)
    save_segformer(folder / "nvidia" / "mit-b0", fastseg.SegformerForImageClassification)
    save_segformer(folder / "output" / "checkpoint-500", classes=("road", "car"))
    save_seggpt(folder / "BAAI" / "seggpt-vit-large")
    for name in (
        "photos/a.jpg",
        "photos/b.png",
        "more/c.jpg",
        "street.jpg",
        "image.png",
        "big.tif",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        photo("coffee", (96, 64)).save(folder / name)
    Image.fromarray(np.eye(64, 96, dtype=np.uint8)).save(folder / "mask.png")
    for name in ("images", "masks"):
        (folder / "DATA" / name).mkdir(parents=True)
    photo("coffee", (96, 64)).save(folder / "DATA" / "images" / "a.jpg")
    Image.fromarray(np.full((64, 96), 3, np.uint8)).save(folder / "DATA" / "masks" / "a.png")
    for name in ("segformer.b2.pth", "segformer.b2.1024x1024.city.160k.pth"):
        source = str(folder / "MODEL")
        assert main(["convert", source, str(folder / name), "--to", "nvlabs"]) == 0
    state = torch.load(folder / "segformer.b2.pth", weights_only=True)
    torch.save(state, folder / "checkpoint.pth")
    return folder


@pytest.fixture
def reader(files, tmp_path, monkeypatch) -> Path:
    """A folder of links to the files, that commands may write to."""
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def names_of_the_reader(model: torch.nn.Module) -> dict[str, object]:
    """What blocks take for granted."""
    transformers = pytest.importorskip("transformers")
    image = photo("coffee", (96, 64))
    mask = np.zeros((64, 96), np.int64)
    mask[10:40, 20:60] = 1
    pixels = torch.randn(2, 3, 64, 64)
    few = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4}
    hf_config = transformers.SegformerConfig(**few, decoder_hidden_size=8, num_labels=19)
    labels = torch.randint(0, 19, (64, 64))
    return {
        **{"fastseg": fastseg, "torch": torch, "transformers": transformers, "argparse": argparse},
        **{"model": model, "other": model, "path": "MODEL", "image": image, "mask": mask},
        **{"images": [image, image], "pairs": [(image, mask)], "Dim": torch.export.Dim},
        **{"pixels": pixels, "pixel_values": pixels, "labels": torch.randint(0, 150, (2, 64, 64))},
        "class_weights": torch.rand(150),
        "hf_model": transformers.SegformerForSemanticSegmentation(hf_config),
        "arguments": transformers.TrainingArguments(
            "run", max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True
        ),
        "data": [{"pixel_values": pixels[0], "labels": labels}] * 2,
    }


def code_of(path: Path) -> list[tuple[str, str]]:
    """("python", block) and ("", command) of a document, in order."""
    found = []
    for language, block in Document.read(path).blocks:
        if language == "python":
            found.append(("python", textwrap.dedent(block)))
        elif not language:
            found += [("", line) for line in block.splitlines() if _COMMAND.match(line)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_reader_types(path, reader, capsys):
    names: dict[str, object] = {}
    if path.stem == "checkpoints":  # which makes them
        (reader / "segformer-b2-cityscapes").unlink()
        (reader / "segformer.b2.pth").unlink()
    for language, text in code_of(path):
        if why_not(text) is not None:
            continue
        if language == "python":
            if not names:
                scenes = path.stem == "evaluate"
                model = EMBEDDED if scenes else "MODEL"
                names = names_of_the_reader(fastseg.from_pretrained(model, dtype=torch.float32))
            exec(text, names)
        else:
            words = shlex.split(text, comments=True)
            assert words[0] == "fastseg", text
            for earlier in reader.glob("*.onnx"):
                earlier.unlink()
            assert main(words[1:]) == 0, (text, capsys.readouterr().err)


def test_reasons_are_of_something_there():
    """No reason stays when its command has left the documents."""
    texts = [text for path in WITH_CODE for _, text in code_of(path)]
    unused = [start for start in NOT_RUN if not any(text.startswith(start) for text in texts)]
    assert unused == []

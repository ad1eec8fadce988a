"""examples/train.py: it learns, resumes exactly, fine-tunes on a folder, and counts right."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fastseg
from fastseg.demo.scenes import CLASSES

SCRIPT = Path(__file__).parent.parent / "examples" / "train.py"
TINY = ["--steps", "3", "--batch-size", "2", "--crops-per-picture", "1", "--crop", "64"]
TINY += ["--picture-sizes", "64", "--eval-size", "64", "--eval-count", "2", "--workers", "0"]
TINY += ["--device", "cpu", "--lr", "1e-3", "--optimizer", "adamw"]
# Muon multiplies in bfloat16, for which many a CPU takes a minute.
OPTIMIZERS = ["adamw", pytest.param("muon", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # as running the script does
        yield load_script()


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, folder: Path, *more: str) -> Path:
    where = ["--run-dir", str(folder / "run"), "--output", str(folder / "model")]
    script.train(script.parse([*TINY, *where, *more]))
    return folder / "model"


@pytest.fixture(scope="module")
def trained(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(script, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_with_the_same_weights(
    script: ModuleType, optimizer: str, tmp_path: Path
) -> None:
    by = ("--optimizer", optimizer)
    whole = load_file(run(script, tmp_path / "whole", *by) / "model.safetensors")
    run(script, tmp_path, *by, "--stop-at", "2")
    assert not (tmp_path / "model").exists()
    torch.manual_seed(123)  # whatever happened in between
    resumed = load_file(run(script, tmp_path, *by, "--resume") / "model.safetensors")
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it writes the second checkpoint, with metrics of steps after the first."""
    more = ("--steps", "4", "--save-every", "2", "--eval-every", "3")
    whole = load_file(run(script, tmp_path / "whole", *more) / "model.safetensors")
    save = script.save_atomically

    def killed(state: dict, path: Path) -> None:
        if state["step"] == 4:
            path.with_name(".checkpoint.pt.tmp").write_bytes(b"half of it")
            raise Killed
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_atomically", killed)
        with pytest.raises(Killed):
            run(script, tmp_path, *more)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # cut off as well
    resumed = load_file(run(script, tmp_path, *more, "--resume") / "model.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    lines, expected = (
        [
            {name: line.get(name) for name in ("step", "loss", "mean_iou")}
            for line in script.logged(folder / "run")
        ]
        for folder in (tmp_path, tmp_path / "whole")
    )
    assert lines == expected
    assert [line["step"] for line in lines] == [1, 3, 4, 4]


def test_metrics_and_their_plot(trained: Path, script: ModuleType) -> None:
    folder = trained.parent / "run"
    first, *_, last = script.logged(folder)
    assert first["step"] == 1
    assert first["loss"] > 0
    assert first["ms_per_step"] > 0
    assert first["peak_memory_mb"] > 50
    assert last["mean_iou"] == json.loads((trained / "metrics.json").read_text())["mean_iou"]
    with Image.open(folder / "metrics.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_a_run_is_not_resumed_with_other_arguments(script: ModuleType, tmp_path: Path) -> None:
    run(script, tmp_path, "--stop-at", "1")
    with pytest.raises(ValueError, match="seed"):
        run(script, tmp_path, "--resume", "--seed", "7")


def test_the_export_is_a_whole_checkpoint(trained: Path) -> None:
    model = fastseg.from_pretrained(trained, dtype="auto")
    assert model.dtype == torch.float16
    assert model.config.id2label == dict(enumerate(CLASSES))
    fastseg.SegformerImageProcessor.from_pretrained(trained)
    metrics = json.loads((trained / "metrics.json").read_text())
    assert 0 < metrics["mean_iou"] < 1
    assert metrics["steps"] == 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_lowers_the_loss(script: ModuleType, optimizer: str) -> None:
    args = script.parse([*TINY, "--drop-path", "0", "--dropout", "0", "--optimizer", optimizer])
    torch.manual_seed(0)
    model = script.build_model(args, list(CLASSES)).train()
    optimizers = script.build_optimizers(model, args)
    item = script.Crops(script.DrawnScenes([64], 64, 1), 64, 2, seed=0)[0]
    losses = []
    for _ in range(8):
        loss = model(pixel_values=item[0], labels=item[1]).loss
        model.zero_grad()
        loss.backward()
        for one in optimizers:
            one.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_fine_tuning_on_a_folder(script: ModuleType, trained: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "masks").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        picture = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
        Image.fromarray(picture).save(data / "images" / f"{i}.jpg")
        mask = np.zeros((80, 100), np.uint8)
        mask[:, 50:], mask[:8] = 2, 255
        Image.fromarray(mask).save(data / "masks" / f"{i}.png")
    (data / "classes.txt").write_text("left\nnowhere\nright\n")
    more = ("--data", str(data), "--init", str(trained), "--steps", "1")
    with pytest.warns(fastseg.CheckpointWarning):
        model = fastseg.from_pretrained(run(script, tmp_path, *more))
    assert model.config.id2label == {0: "left", 1: "nowhere", 2: "right"}
    assert json.loads((tmp_path / "model" / "metrics.json").read_text())["held_out"] == 1


def test_a_missing_mask_is_named(script: ModuleType, tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    (tmp_path / "classes.txt").write_text("one\n")
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        script.Folder(tmp_path, seed=0)


def test_parameter_groups_and_schedule(script: ModuleType) -> None:
    args = script.parse(["--steps", "100", "--lr", "1.0", "--warmup", "0.1"])
    model = script.build_model(args, ["a", "b"])
    groups = script.build_optimizers(model, args)[0].param_groups
    count = sum(len(group["params"]) for group in groups)
    assert count == len(list(model.parameters()))
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    fast = {id(p) for group in groups if group["scale"] == 10 for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), name
        assert (id(parameter) in fast) == name.startswith("decode_head."), name
    rates = [script.learning_rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.02

"""Saving: a save that fails leaves what was there, and one that succeeds leaves nothing stale."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastseg.checkpoints.save as checkpoint_save
from fastseg.checkpoints.load import CheckpointError, save_pretrained
from fastseg.models.auto import from_pretrained
from tests.checkpoints.checkpoint_cases import SEGMENTATION, assert_same_tensors, ours

SHARD = "60KB"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("earlier", [None, SHARD, "nothing"])
@pytest.mark.parametrize("later", [None, SHARD])
def test_failure_at_every_step_leaves_the_directory_as_it_was(
    earlier, later, tmp_path, monkeypatch
):
    """Each write, sync, link, move and removal fails once, as on a full disk."""
    folder = tmp_path / "checkpoint"
    if earlier != "nothing":
        ours(SEGMENTATION).save_pretrained(folder, max_shard_size=earlier)
        (folder / "preprocessor_config.json").write_text("{}")
    before = contents(tmp_path)
    model = ours(SEGMENTATION, num_labels=7)

    def save_with_failure_at(step: int) -> bool:
        """Whether the save went through because it has fewer steps."""
        taken = 0

        def counted(function):
            def call(*arguments, **options):
                nonlocal taken
                taken += 1
                if taken == step:
                    disk_full()
                return function(*arguments, **options)

            return call

        with monkeypatch.context() as patched:
            patched.setattr(checkpoint_save, "save_file", counted(checkpoint_save.save_file))
            for name in ("fsync", "replace"):
                patched.setattr(os, name, counted(getattr(os, name)))
            for name in ("write_text", "mkdir"):
                patched.setattr(Path, name, counted(getattr(Path, name)))
            real_unlink = Path.unlink
            patched.setattr(
                Path,
                "unlink",
                lambda path, missing_ok=False: (
                    real_unlink(path, missing_ok) if missing_ok else counted(real_unlink)(path)
                ),
            )
            try:
                save_pretrained(model, folder, max_shard_size=later)
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017
                return False
        return True

    step = 1
    while not save_with_failure_at(step):
        assert contents(tmp_path) == before, f"failure at step {step}"
        assert folder.exists() == (earlier != "nothing")
        step += 1
    assert step > 6
    assert_same_tensors(from_pretrained(folder).state_dict(), dict(model.state_dict()))
    assert not list(folder.glob(".saving-*"))


@pytest.mark.parametrize("earlier", [None, SHARD])
@pytest.mark.parametrize("later", [None, SHARD])
def test_a_reader_never_sees_a_mixture(earlier, later, tmp_path, monkeypatch):
    """Between any two moves there are the earlier weights, the new ones, or a clear error.

    This is what a process killed in between would leave.
    """
    first, new = ours(SEGMENTATION), ours(SEGMENTATION)
    first.save_pretrained(tmp_path, max_shard_size=earlier)
    seen = []

    def look() -> None:
        try:
            state = from_pretrained(tmp_path).state_dict()
        except CheckpointError:
            seen.append("error")
            return
        same = {
            name: all(torch.equal(state[key], value) for key, value in expected.items())
            for name, expected in (("old", first.state_dict()), ("new", new.state_dict()))
        }
        seen.append(next((name for name, is_same in same.items() if is_same), "mixture"))

    def followed_by_look(function):
        def call(*arguments, **options):
            function(*arguments, **options)
            look()

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", followed_by_look(os.replace))
        patched.setattr(Path, "unlink", followed_by_look(Path.unlink))
        new.save_pretrained(tmp_path, max_shard_size=later)
    assert len(seen) >= 2
    assert set(seen) <= {"old", "error", "new"}
    assert seen[-1] == "new"
    assert ("error" in seen) == (earlier is not None and later is not None)


def test_interrupt_leaves_the_directory_as_it_was(tmp_path, monkeypatch):
    ours(SEGMENTATION).save_pretrained(tmp_path)
    before = contents(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ours(SEGMENTATION).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("hard_links", [True, False])
def test_earlier_shards_and_index_go(hard_links, tmp_path, monkeypatch):
    if not hard_links:
        monkeypatch.setattr(os, "link", disk_full)
    (tmp_path / "notes.txt").write_text("kept")
    for size in (SHARD, None, "40KB", SHARD, SHARD, None):
        model = ours(SEGMENTATION)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert_same_tensors(from_pretrained(tmp_path).state_dict(), dict(model.state_dict()))
        names = {path.name for path in tmp_path.iterdir()} - {"notes.txt", "config.json"}
        if size is None:
            assert names == {"model.safetensors"}
        else:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert names == {"model.safetensors.index.json", *index["weight_map"].values()}
            largest = max(path.stat().st_size for path in tmp_path.glob("model-*"))
            assert largest < 2 * checkpoint_save._size_in_bytes(size)
            assert index["metadata"]["total_size"] == sum(
                tensor.nbytes for tensor in model.state_dict().values()
            )


def test_only_config_and_weights_and_readable_by_others(tmp_path):
    umask = os.umask(0o022)
    try:
        ours(SEGMENTATION).save_pretrained(tmp_path / "a" / "b")
    finally:
        os.umask(umask)
    files = list((tmp_path / "a" / "b").iterdir())
    assert sorted(file.name for file in files) == ["config.json", "model.safetensors"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    model = ours(SEGMENTATION).to(memory_format=torch.channels_last)
    attention = model.segformer.encoder.block[0][0].attention.self
    flat = torch.randn(128)
    attention.key.weight = torch.nn.Parameter(flat[:64].view(8, 8))
    attention.value.weight = torch.nn.Parameter(flat[64:].view(8, 8))
    attention.query.weight = attention.value.weight
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), expected)


def test_saving_after_use_and_in_training_mode(tmp_path):
    """Folded weights stay out of the file, and saving changes nothing in the model."""
    model = ours(SEGMENTATION)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    model.train().save_pretrained(tmp_path)
    assert model.training
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), expected)


def test_config_that_json_cannot_hold(tmp_path):
    model = ours(SEGMENTATION)
    model.config.palette = {1, 2}
    with pytest.raises(TypeError, match="config: expected values that JSON can hold"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_directory_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    with pytest.raises(FileExistsError, match="file"):
        ours(SEGMENTATION).save_pretrained(path)
    assert path.read_text() == "kept"


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, None), (3000, 3000), ("3000B", 3000), ("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19)],
)
def test_sizes(size, expected):
    assert checkpoint_save._size_in_bytes(size) == expected


@pytest.mark.parametrize("size", [0, -5, 1.5, True, "2", "GB", "two GB", "5 XB", ""])
def test_wrong_sizes(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size: expected"):
        ours(SEGMENTATION).save_pretrained(tmp_path, max_shard_size=size)

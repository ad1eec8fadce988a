"""Finding the files of a checkpoint in directories and in the cache of huggingface_hub, offline."""

from __future__ import annotations

import shutil
import sys

import pytest

from fastseg.checkpoints.hub import find_file, resolve_file
from fastseg.models.auto import from_pretrained
from tests.checkpoints.checkpoint_cases import SEGMENTATION, assert_same_tensors, ours

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and an empty cache."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default-cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cache(tmp_path):
    """A cache as huggingface_hub lays it out, with one repository at "main" and a tag."""
    folder = tmp_path / "cache"
    repository = folder / "models--someone--scenes"
    (repository / "refs").mkdir(parents=True)
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    ours(SEGMENTATION).save_pretrained(repository / "snapshots" / COMMIT)
    return folder


def test_local_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_file(tmp_path, "config.json") == tmp_path / "config.json"
    assert resolve_file(str(tmp_path), "config.json") == tmp_path / "config.json"
    assert find_file(tmp_path, "config.json") == tmp_path / "config.json"
    assert find_file(tmp_path, "model.safetensors") is None
    with pytest.raises(FileNotFoundError) as caught:
        resolve_file(tmp_path, "model.safetensors")
    assert str(caught.value).startswith(
        f"{tmp_path}: expected a file model.safetensors, found config.json"
    )


def test_long_listings_are_cut(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(25):
        (folder / f"{number:02d}.png").touch()
    with pytest.raises(FileNotFoundError, match=r"19\.png and 5 more"):
        resolve_file(folder, "config.json")


@pytest.mark.parametrize("name", ["./no/such", "/no/such", "a/b/c", "~/model", "a b", "a\\b"])
def test_neither_directory_nor_hub_id(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder, and it is no hub id"):
        resolve_file(name, "config.json")
    assert find_file(name, "config.json") is None


@pytest.mark.parametrize("name", ["b2.pth", "mine/model.safetensors", "model.ONNX"])
def test_files_that_are_not_there_are_looked_for_on_no_hub(name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match=f"{name}: there is no such file or folder"):
        resolve_file(name, "config.json")


def test_invalid_hub_id():
    with pytest.raises(FileNotFoundError, match=r"no--such\.\.id.*no hub id"):
        resolve_file("no--such..id", "config.json")


def test_a_file_instead_of_a_directory(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="expected a directory or a hub id, got a file"):
        resolve_file(tmp_path / "model.safetensors", "config.json")


@pytest.mark.parametrize("wrong", [None, 3, ["a"]])
def test_wrong_type(wrong):
    with pytest.raises(TypeError, match="repo_or_dir: expected"):
        resolve_file(wrong, "config.json")


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_hub_id_from_the_cache(revision, cache):
    path = resolve_file("someone/scenes", "config.json", revision=revision, cache_dir=cache)
    assert path.read_text().startswith("{")
    model = from_pretrained("someone/scenes", revision=revision, cache_dir=cache)
    direct = from_pretrained(cache / "models--someone--scenes" / "snapshots" / COMMIT)
    assert_same_tensors(model.state_dict(), dict(direct.state_dict()))


def test_local_files_only_needs_no_offline_mode(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model = from_pretrained("someone/scenes", cache_dir=cache, local_files_only=True)
    assert model.config.num_labels == 5


def test_a_local_directory_goes_first(cache, tmp_path):
    ours(SEGMENTATION, num_labels=7).save_pretrained(tmp_path / "someone" / "scenes")
    assert from_pretrained("someone/scenes", cache_dir=cache).config.num_labels == 7


def test_hub_id_that_is_not_in_the_cache(cache):
    with pytest.raises(FileNotFoundError) as caught:
        from_pretrained("someone/else", cache_dir=cache)
    for part in ("someone/else", "no such file or folder", "config.json", "cache"):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match="someone/scenes"):
        resolve_file("someone/scenes", "config.json", revision="v2", cache_dir=cache)


def test_hub_id_without_weights_in_the_cache(cache):
    (cache / "models--someone--scenes" / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights: neither model\.safetensors nor"):
        from_pretrained("someone/scenes", cache_dir=cache)


def test_without_huggingface_hub(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError) as caught:
        from_pretrained("someone/scenes", cache_dir=cache)
    for part in (
        "someone/scenes",
        "no such file or folder",
        'pip install "fastseg-segformer[hub]"',
    ):
        assert part in str(caught.value)
    shutil.copytree(cache / "models--someone--scenes" / "snapshots" / COMMIT, "someone/scenes")
    assert from_pretrained("someone/scenes").config.num_labels == 5

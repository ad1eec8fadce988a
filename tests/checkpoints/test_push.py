"""`push_to_hub`, without network: a stand-in with the signatures of huggingface_hub's HfApi."""

from __future__ import annotations

import fnmatch
import inspect
import shutil
import sys
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
import transformers

import fastseg
from tests.checkpoints.checkpoint_cases import SEGMENTATION, assert_same_tensors, ours


class Hub:
    """Repositories in a folder, and what was asked of the hub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A call that the real class would refuse is a TypeError.
        self.api = mock.create_autospec(huggingface_hub.HfApi, instance=True)
        self.api.create_repo.side_effect = self._create
        self.api.upload_folder.side_effect = self._upload

    def _create(self, repo_id, **_):
        full = repo_id if "/" in repo_id else f"me/{repo_id}"
        (self.folder / full).mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{full}")

    def _upload(self, *, repo_id, folder_path, delete_patterns=None, **_):
        repository = self.folder / repo_id
        for path in list(repository.iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in delete_patterns or ()):
                path.unlink()
        shutil.copytree(folder_path, repository, dirs_exist_ok=True)
        return f"commit to {repo_id}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    real = inspect.signature(huggingface_hub.HfApi)

    def api(*args, **kwargs):
        real.bind(*args, **kwargs)
        return made.api

    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    return made


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_a_model(hub):
    model = ours(SEGMENTATION)
    assert model.push_to_hub("someone/scenes") == "commit to someone/scenes"
    repository = hub.folder / "someone" / "scenes"
    assert names_in(repository) == {"config.json", "model.safetensors"}
    found = fastseg.from_pretrained(repository)
    assert_same_tensors(found.state_dict(), dict(model.state_dict()))
    theirs = transformers.SegformerForSemanticSegmentation.from_pretrained(repository).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels).logits, found(pixels).logits)
    hub.api.create_repo.assert_called_once_with(
        "someone/scenes", private=None, token=None, exist_ok=True
    )
    hub.api.create_branch.assert_not_called()
    sent = hub.api.upload_folder.call_args.kwargs
    assert sent["commit_message"] == f"Upload {SEGMENTATION}"
    assert sent["create_pr"] is False
    assert not Path(sent["folder_path"]).exists()  # it was a temporary one


def test_an_image_processor_leaves_the_model_there(hub):
    ours(SEGMENTATION).push_to_hub("scenes")
    fastseg.SegformerImageProcessor(size=48).push_to_hub("scenes", commit_message="of size 48")
    repository = hub.folder / "me" / "scenes"  # the account that create_repo told
    assert names_in(repository) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    theirs = transformers.AutoImageProcessor.from_pretrained(repository)
    assert dict(theirs.size) == {"height": 48, "width": 48}
    sent = hub.api.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["commit_message"]) == ("me/scenes", "of size 48")


def test_weights_of_an_earlier_push_are_replaced(hub):
    """A model.safetensors that stayed would go before the new shards."""
    model = ours(SEGMENTATION)
    ours(SEGMENTATION).push_to_hub("someone/scenes")
    repository = hub.folder / "someone" / "scenes"
    (repository / "README.md").write_text("mine")
    (repository / "model.fp16.safetensors").write_text("mine")
    model.push_to_hub("someone/scenes", max_shard_size="20KB")
    assert "model.safetensors" not in names_in(repository)
    assert {"README.md", "model.fp16.safetensors"} <= names_in(repository)
    found = fastseg.from_pretrained(repository)
    assert_same_tensors(found.state_dict(), dict(model.state_dict()))
    model.push_to_hub("someone/scenes")
    assert names_in(repository) == {
        *("config.json", "model.safetensors", "README.md", "model.fp16.safetensors")
    }


def test_options(hub):
    options = {"token": "hf_x", "commit_description": "more", "revision": "second"}
    ours(SEGMENTATION).push_to_hub("someone/scenes", private=True, **options)
    hub.api.create_repo.assert_called_once_with(
        "someone/scenes", private=True, token="hf_x", exist_ok=True
    )
    hub.api.create_branch.assert_called_once_with(
        "someone/scenes", branch="second", token="hf_x", exist_ok=True
    )
    sent = hub.api.upload_folder.call_args.kwargs
    assert options.items() <= sent.items()
    ours(SEGMENTATION).push_to_hub("someone/scenes", create_pr=True)
    assert hub.api.upload_folder.call_args.kwargs["create_pr"] is True
    hub.api.create_branch.assert_called_once()
    with pytest.raises(TypeError, match="safe_serialisation"):
        ours(SEGMENTATION).push_to_hub("someone/scenes", safe_serialisation=True)


@pytest.mark.parametrize("ours_class", [fastseg.SegformerModel, fastseg.SegformerImageProcessor])
def test_arguments_are_those_of_transformers(ours_class):
    theirs = getattr(transformers, ours_class.__name__)
    expected = inspect.signature(theirs.push_to_hub).parameters
    found = inspect.signature(ours_class.push_to_hub).parameters
    # A model card, which is not written; and what is handed to save_pretrained.
    assert set(expected) - set(found) == {"tags", "max_shard_size"}
    for name in set(found) & set(expected):
        assert found[name].default == expected[name].default, name
        assert found[name].kind == expected[name].kind, name


def test_places_of_from_pretrained_are_those_of_transformers():
    theirs = inspect.signature(transformers.SegformerModel.from_pretrained).parameters
    for one in (fastseg.SegformerConfig, fastseg.SegformerImageProcessor):
        ours = inspect.signature(one.from_pretrained).parameters
        for name in ("revision", "token", "cache_dir", "local_files_only"):
            assert name in theirs
            assert ours[name].kind == inspect.Parameter.KEYWORD_ONLY


def test_nothing_is_made_in_the_hub_where_saving_fails(hub):
    model = ours(SEGMENTATION)
    model.config.note = object()
    with pytest.raises(TypeError, match="values that JSON can hold"):
        model.push_to_hub("someone/scenes")
    hub.api.create_repo.assert_not_called()


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'push_to_hub.*pip install "fastseg-segformer\[hub\]"'):
        ours(SEGMENTATION).push_to_hub("someone/scenes")

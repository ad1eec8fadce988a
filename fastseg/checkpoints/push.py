"""Uploading what `save_pretrained` writes to the Hugging Face hub, with huggingface_hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fastseg._version import __version__

from .files import CONFIG_NAME

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

# Loaders take weights in one file before shards, so an earlier file that stays would be loaded.
_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"]


class PushesToHub:
    """Mixin of what has a `save_pretrained`; arguments are those of transformers' method."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: object,
    ) -> CommitInfo:
        """Upload to a repository of the Hugging Face hub, made where there is none, in one commit.

        Weights there are replaced, in one file or in shards; other files stay. No model card is
        written.

        Args:
            repo_id: its name, with the organization's as "name/repository" or without.
            commit_message, commit_description: of the commit; "Upload" and the class by default.
            private: of a new repository; None for what is usual in the account.
            token: None or True for that of `hf auth login`.
            revision: the branch, made where there is none.
            create_pr: open a pull request instead of writing to the branch.
            **options: of `save_pretrained`, such as `max_shard_size`.

        Returns:
            huggingface_hub's CommitInfo, a text with the commit's address.

        Raises:
            ImportError: huggingface_hub is not installed.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses it.
        """
        try:
            from huggingface_hub import HfApi
        except ModuleNotFoundError as error:
            raise ImportError(
                'push_to_hub needs huggingface_hub: pip install "fastseg-segformer[hub]"'
            ) from error
        hub = HfApi(library_name="fastseg", library_version=__version__)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)  # type: ignore[attr-defined]
            # With the account's name before it, where that was left out.
            repo_id = hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            if revision is not None and not create_pr and not revision.startswith("refs/pr"):
                hub.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
            return hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=_WEIGHTS if (Path(folder) / CONFIG_NAME).exists() else None,
            )

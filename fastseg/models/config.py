"""What the configurations of all families share: files, and the fields that they have."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from fastseg.checkpoints.configuration import (
    check_overrides,
    field_names,
    make_config,
    unknown_keyword,
)
from fastseg.checkpoints.files import CONFIG_NAME, read_json
from fastseg.checkpoints.hub import resolve_file
from fastseg.checkpoints.report import CheckpointError
from fastseg.checkpoints.values import ClassNames, class_names, names_of, whole

# What transformers writes into config.json besides the fields of a SegFormer, now or once, and the
# palette that pictures of label maps have. They are kept and written back; a constructor takes them
# too, so that `Config(**config.to_dict())` works.
_OF_FILES = frozenset(
    (
        *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path"),
        *("architectures", "attn_implementation", "chunk_size_feed_forward", "downsampling_rates"),
        *("dtype", "feature_strides", "finetuning_task", "image_size", "is_encoder_decoder"),
        *("model_type", "name_or_path", "num_hidden_layers", "tie_word_embeddings", "torch_dtype"),
        *("palette", "torchscript", "transformers_version", "use_cache"),
    )
)
# These are told by the class and by `num_encoder_blocks`.
_NOT_KEPT = ("model_type", "num_hidden_layers")


class PreTrainedConfig:
    """Base of configurations, with the names of transformers' class.

    A subclass has its fields as arguments of its constructor, which keeps them as attributes, and
    hands what it does not know to `_keep`.

    Attributes:
        model_type: of config.json.
        other_model_types: what `to_dict` writes for networks that transformers does not have.
    """

    model_type: ClassVar[str]
    other_model_types: ClassVar[tuple[str, ...]] = ()
    _commit_hash: str | None = None  # pipelines of transformers 4 read it

    def _keep(self, others: Mapping[str, object]) -> None:
        """Keep keywords that are no fields, as a config.json has them.

        Raises:
            TypeError: nothing writes such a key: it is a field with a mistake in its name.
        """
        for name, value in others.items():
            if name not in _OF_FILES:
                kind = type(self)
                expected = f"a field of {kind.__name__} (or a config.json, by from_dict)"
                raise unknown_keyword(name, value, expected, field_names(kind))
            if name not in _NOT_KEPT:
                setattr(self, name, value)

    def to_dict(self) -> dict[str, object]:
        """All fields, as written into `config.json` (with `model_type`)."""
        fields = copy.deepcopy(self.__dict__)
        return {"model_type": self.model_type, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Self:
        """A configuration from the contents of a `config.json`.

        Keys that are no fields are kept; a field that is null has its default. Where `num_labels`
        is not the number of names in `id2label` it counts, as in transformers 5: classes beyond
        them are called LABEL_ and their number.

        Raises:
            ValueError: a field is out of range, or of another kind.
        """
        known = field_names(cls)
        given: dict[str, Any] = {name: fields[name] for name in fields if name in known}
        given = {name: value for name, value in given.items() if value is not None}
        if not given.get("id2label"):
            given.pop("id2label", None)
        elif "num_labels" in given:
            names = class_names(given["id2label"])
            count = whole("num_labels", given.pop("num_labels"))
            given["id2label"] = names if len(names) == count else names_of(count, names)
        config = cls(**given)
        for name, value in fields.items():
            if name not in known and name not in _NOT_KEPT:
                setattr(config, name, copy.deepcopy(value))
        return config

    def to_json_string(self) -> str:
        """All fields as the text of a `config.json`.

        Raises:
            TypeError, ValueError: a field cannot be written as JSON.
        """
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        except (TypeError, ValueError) as error:
            raise type(error)(f"config: expected values that JSON can hold: {error}") from error

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_json_string` into a file."""
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `config.json` into a directory, which is made where there is none."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.to_json_file(directory / CONFIG_NAME)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        num_labels: int | None = None,
        id2label: ClassNames | None = None,
        **fields: object,
    ) -> Self:
        """A configuration from the config.json of a directory or hub id, or from a JSON file.

        Args:
            subfolder: of the directory or hub id, where the file is.
            revision, cache_dir, token, local_files_only: for hub ids, as in huggingface_hub.
            num_labels, id2label: other classes than those of the file.
            fields: fields that replace those of the file.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is not the JSON of such a configuration.
            TypeError, ValueError: an argument is wrong.
        """
        arguments = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
        check_overrides([cls], fields, arguments)
        path = Path(pretrained_model_name_or_path)
        if not path.is_file():
            path = resolve_file(
                pretrained_model_name_or_path,
                CONFIG_NAME,
                subfolder=subfolder,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
            )
        stored = read_json(path)
        stated = stored.get("model_type")
        known = (cls.model_type, *cls.other_model_types)
        if stated not in known and (stated or not field_names(cls) & stored.keys()):
            raise CheckpointError(f"{path}: expected model_type {cls.model_type!r}, got {stated!r}")
        config: Self = make_config(cls, path, stored, num_labels, id2label, fields)
        return config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.to_dict().items() if name != "label2id"}
        fields = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"{type(self).__name__}({fields})"

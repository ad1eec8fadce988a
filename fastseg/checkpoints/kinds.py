"""What a file or a folder is, told by its content: names of files are often wrong.

People have a pointer of Git LFS, a web page or another framework's file under the name of a
checkpoint. What cannot be weights is refused here, with what it is and what to do.
"""

from __future__ import annotations

import codecs
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from .report import CheckpointError

SAFETENSORS, HDF5, KERAS, PYTORCH = "safetensors", "HDF5", "Keras archive", "PyTorch"

# At the beginning of what torch.save wrote before it wrote zip archives.
_TORCH_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
# The first bytes of files that hold no weights for us: what they are, and what to do.
_UNPACK = "unpack it, and give the file or the folder in it"
_MAGIC = {
    b"\x1f\x8b": ("an archive (gzip)", _UNPACK),
    b"BZh": ("an archive (bzip2)", _UNPACK),
    b"\xfd7zXZ\x00": ("an archive (xz)", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("an archive (zstd)", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("an archive (7z)", _UNPACK),
    b"Rar!": ("an archive (rar)", _UNPACK),
    b"\x93NUMPY": ("a NumPy array (.npy)", "a checkpoint has a name for each of its arrays"),
    b"GGUF": ("a GGUF file", "give the checkpoint that it was made from"),
}
_SOURCE = "give the checkpoint that it was exported from"
_TENSORFLOW = (
    "a part of a TensorFlow checkpoint or SavedModel",
    "save the model again as tf_model.h5 (transformers) or .weights.h5 (KerasHub)",
)
_PADDLE = (
    "a file of PaddlePaddle",
    "its networks differ; give the PyTorch checkpoint that the weights come from",
)
# Names of files that their first bytes do not tell.
_SUFFIXES = {
    ".onnx": (
        "an ONNX model",
        _SOURCE + ", or let a runtime read it: runtime= of from_pretrained, --runtime of predict",
    ),
    ".tflite": ("a TensorFlow Lite model", _SOURCE),
    ".engine": ("a TensorRT engine", _SOURCE),
    ".plan": ("a TensorRT engine", _SOURCE),
    ".mlmodel": ("a Core ML model", _SOURCE),
    ".msgpack": ("a file of Flax", "load it with transformers and save it from PyTorch"),
    ".pdparams": _PADDLE,
    ".pdopt": _PADDLE,
    ".pdiparams": _PADDLE,
    ".pdmodel": _PADDLE,
    ".pb": _TENSORFLOW,
    ".index": _TENSORFLOW,
}
_TENSORFLOW_DATA = re.compile(r".+\.data-\d{5}-of-\d{5}")
# The first field of an ONNX file, its version, and what comes behind that.
_ONNX = re.compile(rb"\x08[\x01-\x14][\x12\x1a\x22\x3a\x42]")

# What a folder has that is no checkpoint of ours, and what to do with it.
_FOLDERS = (
    (r"adapter_config\.json", "an adapter of PEFT: merge it into its model and save that"),
    (r"zero_to_fp32\.py", "a DeepSpeed run: its zero_to_fp32.py makes pytorch_model.bin of it"),
    (
        r"\.metadata|.+\.distcp",
        "a distributed checkpoint of PyTorch: `python -m torch.distributed.checkpoint.format_utils "
        "dcp_to_torch FOLDER weights.pt` makes one file of it",
    ),
    (r"saved_model\.pb", "a SavedModel of TensorFlow: save the model again as tf_model.h5"),
    (r"checkpoint-\d+", "the output of a training: give one of the folders in it"),
)


def kind_of(path: Path) -> str:
    """Which reader is for a file: SAFETENSORS, HDF5, KERAS or PYTORCH.

    Raises:
        CheckpointError: it cannot be opened, or is none of these.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be opened: {error.strerror}; "
            f"{'make it readable' if isinstance(error, PermissionError) else 'look at the disk'}"
        ) from error
    foreign = _foreign(path, head)
    if foreign is not None:
        what, advice = foreign
        raise CheckpointError(f"{path}: expected a file of weights, got {what}: {advice}")
    if head.startswith(_HDF5_MAGIC):
        return HDF5
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return SAFETENSORS
    if _TORCH_MAGIC in head[:40]:
        return PYTORCH
    if zipfile.is_zipfile(path):
        return _kind_of_zip(path)
    # It is damaged, or pickled: its reader says what is wrong.
    by_suffix = {".safetensors": SAFETENSORS, ".h5": HDF5, ".hdf5": HDF5, ".keras": KERAS}
    return by_suffix.get(path.suffix, PYTORCH)


def text_kind(head: bytes) -> tuple[str, str] | None:
    """What a text file is that should be something else, and what to do; None for other bytes."""
    if head.startswith(b"version https://git-lfs"):
        return (
            "a pointer of Git LFS, which stands for the real file",
            "run `git lfs pull` in the repository, or download the file itself",
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(b"<?xml") and b"<net" in start:
        return "an OpenVINO model", _SOURCE
    if start.startswith(b"<"):
        return (
            "a web page (HTML or XML)",
            "the server answered with a page, such as a login or a warning; download the file "
            "itself, in a browser where a click is asked for",
        )
    return None


def folder_kind(names: Iterable[str]) -> str | None:
    """What a folder of files of these names is, and what to do; None where nothing tells."""
    names = list(names)
    return next(
        (text for form, text in _FOLDERS if any(re.fullmatch(form, name) for name in names)), None
    )


def _foreign(path: Path, head: bytes) -> tuple[str, str] | None:
    if not head:
        return "an empty file", "the download or the copy broke off, or the disk was full"
    if (text := text_kind(head)) is not None:
        return text
    for magic, found in _MAGIC.items():
        if head.startswith(magic):
            return found
    if head[257:262] == b"ustar":
        return "an archive (tar)", _UNPACK
    if (found_by_name := _SUFFIXES.get(path.suffix.lower())) is not None:
        return found_by_name
    if _TENSORFLOW_DATA.fullmatch(path.name):
        return _TENSORFLOW
    if _ONNX.match(head):
        return _SUFFIXES[".onnx"]
    if head[4:8] == b"TFL3":
        return _SUFFIXES[".tflite"]
    if head[:1] == b"\x80" and b"numpy" in head and _TORCH_MAGIC not in head[:40]:
        return (
            "a pickle of NumPy arrays, as PaddlePaddle and Detectron write them",
            "save them as tensors, with torch.save or safetensors",
        )
    return _plain_text(head)


def _plain_text(head: bytes) -> tuple[str, str] | None:
    try:
        # The last letter may be cut in two.
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None
    if not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    first = text.strip().partition("\n")[0][:60]
    return f"a text that begins with {first!r}", "look at it: it may say why the download failed"


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: expected a zip archive, got one that is corrupt") from error
    inner = [name.partition("/")[2] for name in names]
    if "model.weights.h5" in names:
        return KERAS
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        what = "a TorchScript program", "save the state_dict() of the model that it was made from"
    elif "data.pkl" in inner:
        return PYTORCH
    elif names and all(name.endswith(".npy") for name in names):
        what = "an archive of NumPy arrays (.npz)", "save them with torch.save or safetensors"
    elif any(name.endswith("archive_format") for name in names):
        what = "a program of torch.export (.pt2)", _SOURCE
    else:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        what = f"a zip archive of {shown or 'nothing'}", _UNPACK
    raise CheckpointError(f"{path}: expected a file of weights, got {what[0]}: {what[1]}")

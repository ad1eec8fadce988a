"""Pickled training state: the tensors load, and nothing that the file asks for is run."""

from __future__ import annotations

import collections
import contextlib
import datetime
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastseg.checkpoints import pickles
from fastseg.checkpoints.load import CheckpointError
from fastseg.checkpoints.pickles import read_pickled
from fastseg.models.auto import from_pretrained
from tests.checkpoints.checkpoint_cases import SEGMENTATION, assert_same_tensors, ours

HEADS = {"num_attention_heads": [1, 2, 3, 4]}


class HistoryBuffer:
    """As mmengine's: arrays, and functions found by getattr when it is unpickled."""

    def __init__(self) -> None:
        self.values = np.arange(5.0)
        self.functions = {"mean": self.mean, "size": len}

    def mean(self) -> float:
        return float(self.values.mean())


class ConfigDict(dict):
    """As mmengine's: a dictionary of a class of its own."""


class Queue(collections.deque):
    """A list-like class."""


@pytest.fixture
def foreign(monkeypatch):
    """A module whose classes a process that loads the file does not have."""
    module = types.ModuleType("mmengine_like")
    for kind in (HistoryBuffer, ConfigDict, Queue):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("version", ["0.x", "1.x"])
def test_training_state_of_mmseg(version, zipped, foreign, monkeypatch, tmp_path):
    model = ours(SEGMENTATION)
    names = ["sky", "road", "car", "tree", "person"]
    if version == "0.x":
        meta = {"CLASSES": names, "PALETTE": [[0, 1, 2]] * 5, "seed": np.int64(3)}
    else:
        meta = {"dataset_meta": {"classes": tuple(names), "palette": np.zeros((5, 3))}}
    content = {
        "meta": {**meta, "time": datetime.datetime(2024, 1, 1), "config": ConfigDict(a=1, b=[2])},
        "state_dict": collections.OrderedDict(model.state_dict()),
        "optimizer": {"state": {0: {"step": np.float32(2)}}, "param_groups": [{"lr": 1e-3}]},
        "message_hub": {"log_scalars": {"loss": HistoryBuffer()}, "queue": Queue([1, 2], 5)},
    }
    path = tmp_path / "iter_160000.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "mmengine_like")
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):
        torch.load(path)  # PyTorch's restricted reader refuses it
    loaded = from_pretrained(path, **HEADS)
    assert_same_tensors(loaded.state_dict(), dict(model.state_dict()))
    assert loaded.config.id2label == dict(enumerate(names))
    assert "mmengine_like" not in sys.modules


def test_parameters_and_shared_storage(foreign, tmp_path):
    whole = torch.arange(12.0).half()
    content = {
        "state_dict": {
            "parameter": torch.nn.Parameter(torch.ones(2, 3)),
            "slice": whole.view(3, 4)[1:, ::2],
            "bfloat": torch.full((2,), 3, dtype=torch.bfloat16),
            "counter": torch.tensor(7),
        },
        "epoch": HistoryBuffer(),
    }
    torch.save(content, tmp_path / "it.pth")
    tensors, class_names, notes, *_ = read_pickled(tmp_path / "it.pth")
    assert class_names == notes == ()
    assert_same_tensors(tensors, {k: v.detach() for k, v in content["state_dict"].items()})
    assert not any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors.values())


@pytest.mark.parametrize(
    "classes", [None, ["sky", 3], "sky", ["sky"], [HistoryBuffer()], {"sky": 0}]
)
def test_class_names_that_do_not_fit_are_left_out(classes, foreign, tmp_path):
    model = ours(SEGMENTATION)
    torch.save({"state_dict": model.state_dict(), "meta": {"CLASSES": classes}}, tmp_path / "a.pth")
    assert from_pretrained(tmp_path / "a.pth", **HEADS).config.id2label[0] == "LABEL_0"


class Attack:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments, state=None) -> None:
        self.call = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(mark: Path) -> dict[str, object]:
    """Objects that make the folder `mark` when a common unpickler loads them."""
    text = str(mark)
    code = f"__import__('os').mkdir({text!r})"
    return {
        "os.system": Attack(os.system, f"mkdir {text}"),
        "nested": {"a": [(Attack(os.mkdir, text),)]},
        "eval": Attack(eval, code),
        "exec": Attack(exec, code),
        "getattr": _by_getattr(text),
        "result is called": _called_result(text),
        "in an argument": collections.OrderedDict(a=Attack(os.mkdir, text)),
        "as a key": {(Attack(os.makedirs, text),): 1},
    }


def _by_getattr(text: str) -> object:
    # getattr(__import__("os"), "mkdir")(text)
    importing = b"cbuiltins\n__import__\n(" + string("os") + b"tR"
    return Raw(
        b"cbuiltins\ngetattr\n(" + importing + string("mkdir") + b"tR(" + string(text) + b"tR"
    )


def _called_result(text: str) -> object:
    # operator.methodcaller("mkdir")(pathlib.Path(text))
    path = b"cpathlib\nPath\n(" + string(text) + b"tR"
    return Raw(b"coperator\nmethodcaller\n(" + string("mkdir") + b"tR(" + path + b"tR")


def string(text: str) -> bytes:
    """The opcode of a string, as torch.save writes it."""
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


class Raw:
    """Opcodes of one object, put into a pickle as they are."""

    def __init__(self, opcodes: bytes) -> None:
        self.opcodes = opcodes


def write_zip(path: Path, opcodes: bytes) -> None:
    """What torch.save would write, with a pickle of one's own."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records.items():
            archive.writestr(name, opcodes if name.endswith("data.pkl") else content)


def opcodes_of(thing: object) -> bytes:
    """A whole pickle, so that loading it commonly does what `thing` wants."""
    if isinstance(thing, Raw):
        return thing.opcodes + b"."
    return pickle.dumps(thing, protocol=2)


@pytest.mark.parametrize("name", list(attacks(Path("x"))))
@pytest.mark.parametrize("place", ["alone", "beside the weights", "among them"])
def test_nothing_is_run(name, place, tmp_path):
    mark = tmp_path / "executed"
    attack = opcodes_of(attacks(mark)[name])
    body = attack.removeprefix(b"\x80\x02").removesuffix(b".")
    path = tmp_path / "evil.pth"
    if place == "alone":
        content = attack
    elif place == "beside the weights":
        content = b"}(" + string("state_dict") + b"}" + string("meta") + body + b"u."
    else:
        content = b"}" + string("state_dict") + b"}" + string("weight") + body + b"ss."
    write_zip(path, content)
    if place == "beside the weights":
        assert read_pickled(path) == ({}, (), (), (), False)
    else:
        with pytest.raises(CheckpointError) as caught:
            read_pickled(path)
        assert str(path) in str(caught.value)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # so the file was dangerous


FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\n"
SLOTS = b"(N}" + string("__defaults__") + b"(K\x01tstb"  # BUILD with a state of slots
ATTRIBUTES = b"}" + string("__wrapped__") + b"K\x01sb"  # BUILD with a dictionary
# With a global that PyTorch's own reader refuses, for else ours is not asked.
REFUSED = b"}(" + string("meta") + b"cno_such\nThing\n"


@pytest.mark.parametrize("state", [SLOTS, ATTRIBUTES], ids=["slots", "dictionary"])
@pytest.mark.parametrize(
    "target",
    [
        FUNCTION,
        b"ccollections\nOrderedDict\n",
        b"cmmengine\nThing\n",
        b"cos\nsystem\n",
        b"cos\nsystem\n(" + string("true") + b"tR",
    ],
)
def test_nothing_in_this_process_is_changed(target, state, tmp_path):
    def shown() -> dict[str, object]:
        return {
            "function": dict(vars(torch._utils._rebuild_tensor_v2)),
            "defaults": torch._utils._rebuild_tensor_v2.__defaults__,
            "ours": dict(vars(pickles._rebuild_tensor)),
            "our defaults": pickles._rebuild_tensor.__defaults__,
            "stand-in": set(vars(pickles._Inert)),
            "ordered": set(vars(collections.OrderedDict)),
            "os": os.system.__doc__,
        }

    before = shown()
    path = tmp_path / "evil.pth"
    write_zip(path, REFUSED + string("other") + target + state + b"u.")
    with contextlib.suppress(CheckpointError):
        read_pickled(path)
    assert shown() == before


def test_a_function_takes_no_state(tmp_path):
    path = tmp_path / "evil.pth"
    for state in (SLOTS, ATTRIBUTES):
        write_zip(path, REFUSED + string("other") + FUNCTION + state + b"u.")
        with pytest.raises(CheckpointError, match=r"calls no_such\.Thing") as caught:
            read_pickled(path)
        assert "a function has no state" in str(caught.value.__cause__)


def test_a_whole_model(tmp_path):
    torch.save(ours(SEGMENTATION), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"calls fastseg\..*Segformer.*save its state_dict"):
        read_pickled(tmp_path / "a.pth")


def test_attributes_on_a_tensor_are_dropped(tmp_path):
    tensor = torch.zeros(2)
    tensor.shape_of_things = "to come"
    torch.save({"state_dict": {"a": tensor}, "meta": Attack(os.getpid)}, tmp_path / "a.pth")
    tensors = read_pickled(tmp_path / "a.pth").tensors
    assert not vars(tensors["a"])


@pytest.mark.parametrize("size", [(3,), (10**15,)])
def test_a_tensor_that_is_larger_than_its_storage(size, tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(2)}, "meta": Attack(os.getpid)}, tmp_path / "a.pth")
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        content = archive.read(name)
    number = pickle.dumps(size[0], protocol=2).removeprefix(b"\x80\x02").removesuffix(b".")
    assert content.count(b"K\x02\x85") == 1  # the size, (2,)
    write_all(path, name, content.replace(b"K\x02\x85", number + b"\x85"))
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        read_pickled(path)


def write_all(path: Path, changed: str, content: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, record in {**records, changed: content}.items():
            archive.writestr(name, record)


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit.script")
def test_torchscript_archives_are_not_opened(tmp_path):
    """PyTorch's common reader would hand them to torch.jit.load, which is no unpickler."""
    path = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(CheckpointError, match=r"script\.pt"):
        read_pickled(path)


def test_truncated_training_state(foreign, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"a": torch.zeros(500)}, "meta": HistoryBuffer()}, path)
    whole = path.read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"a\.pth"):
            read_pickled(path)


def test_a_later_pickle_protocol(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    torch.save({"state_dict": tensors}, tmp_path / "a.pth", pickle_protocol=4)
    with pytest.raises(pickle.UnpicklingError, match="Unsupported operand"):
        torch.load(tmp_path / "a.pth")
    assert_same_tensors(read_pickled(tmp_path / "a.pth")[0], tensors)

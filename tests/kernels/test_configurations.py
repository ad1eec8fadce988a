"""Files of launch configurations: the committed ones, and what is looked up in one of a user."""

from __future__ import annotations

import json

import pytest
import torch

from fastseg.kernels.core import configurations

FILES = ("default", *configurations.FAMILIES)


@pytest.mark.parametrize("family", FILES)
def test_committed_files(family):
    content = json.loads((configurations.FOLDER / f"{family}.json").read_text())
    assert content["family"] == family
    assert content["source"]
    default = json.loads((configurations.FOLDER / "default.json").read_text())["kernels"]
    for kernel, entries in content["kernels"].items():
        # A family may say nothing of a dtype; a name that default lacks is a misspelt one.
        assert kernel in default
        for entry in entries:
            assert set(entry) >= {"dtype", "config"}
            assert entry["dtype"] in ("half", "float32", "any")
            assert all(size >= 1 for size in entry.get("sizes", {}).values())
        assert all(entries.count(entry) == 1 for entry in entries), f"{kernel}: an entry twice"


def test_every_kernel_has_defaults_for_both_dtypes():
    content = json.loads((configurations.FOLDER / "default.json").read_text())["kernels"]
    assert len(content) > 10
    for kernel, entries in content.items():
        dtypes = {entry["dtype"] for entry in entries}
        assert "any" in dtypes or dtypes >= {"half", "float32"}, kernel


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """`user_file(entries)` makes a file of the entries of kernel "k" that FASTSEG_CONFIGS names."""

    def write(entries, name="configs.json"):
        path = tmp_path / name
        path.write_text(json.dumps({"kernels": {"k": entries}}))
        monkeypatch.setenv("FASTSEG_CONFIGS", str(path))

    return write


def ask(sizes, dtype=torch.float16, kernel="k", divides=None):
    return configurations.look_up(kernel, torch.device("cpu"), dtype, sizes, divides)


def entry(value, dtype="half", **sizes):
    return {"dtype": dtype, "sizes": sizes, "config": {"BLOCK": value}}


def test_the_nearest_size_is_chosen(user_file):
    user_file([entry(1, rows=100), entry(2, rows=1000)])
    assert ask({"rows": 1}) == {"BLOCK": 1}
    assert ask({"rows": 300}) == {"BLOCK": 1}  # nearer by ratio: 3 against 3.3
    assert ask({"rows": 320}) == {"BLOCK": 2}
    assert ask({"rows": 10**9}) == {"BLOCK": 2}
    user_file([entry(1, rows=100, width=32), entry(2, rows=100, width=256)], "others.json")
    assert ask({"rows": 10**6, "width": 100}) == {"BLOCK": 2}
    assert ask({"rows": 10**6, "width": 80}) == {"BLOCK": 1}


def test_dtypes(user_file):
    user_file([entry(1), entry(2, "float32")])
    assert ask({}, torch.bfloat16) == ask({}, torch.float16) == {"BLOCK": 1}
    assert ask({}, torch.float32) == {"BLOCK": 2}
    user_file([entry(3, "any")], "others.json")
    assert ask({}, torch.float32) == ask({}, torch.float16) == {"BLOCK": 3}


def test_blocks_must_divide(user_file):
    user_file([entry(64, rows=10), entry(32, rows=1000)])
    assert ask({"rows": 10}, divides={"BLOCK": 160}) == {"BLOCK": 32}
    with pytest.raises(LookupError, match="no configuration for .*'k'"):
        ask({"rows": 10}, divides={"BLOCK": 80})


def test_what_is_given_out_is_a_copy(user_file):
    user_file([entry(1)])
    ask({})["BLOCK"] = 7
    assert ask({}) == {"BLOCK": 1}


def test_committed_entries_serve_what_a_file_does_not_name(user_file):
    user_file([entry(1)])
    assert ask({"channels": 64}, kernel="layer_norm")["BLOCK_M"] >= 1
    with pytest.raises(LookupError):
        ask({}, kernel="no such kernel")


def test_a_file_that_is_none(tmp_path, monkeypatch):
    path = tmp_path / "configs.json"
    path.write_text("[]")
    monkeypatch.setenv("FASTSEG_CONFIGS", str(path))
    with pytest.raises(
        ValueError, match=r"configs.json: expected a file that `fastseg tune` wrote"
    ):
        ask({})

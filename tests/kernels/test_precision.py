"""Which precision float32 products take: IEEE unless torch was told that less will do."""

from __future__ import annotations

import pytest
import torch

from fastseg.kernels.blocks.primitives import matmul_precision


@pytest.fixture(autouse=True)
def restored():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_by_default_it_is_ieee():
    assert matmul_precision(torch.float32) == "ieee"
    assert matmul_precision(torch.bfloat16) == "ieee"


@pytest.mark.parametrize(("name", "expected"), [("high", "tf32"), ("highest", "ieee")])
def test_the_older_setting(name, expected):
    torch.set_float32_matmul_precision(name)
    assert matmul_precision(torch.float32) == expected
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["tf32", "ieee"])
def test_the_newer_setting(name):
    # torch.get_float32_matmul_precision() raises an error after this.
    torch.backends.cuda.matmul.fp32_precision = name
    assert matmul_precision(torch.float32) == name

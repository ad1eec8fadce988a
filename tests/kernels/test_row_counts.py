"""Rows of products of images whose size changes."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F

from fastseg.kernels.blocks import onednn, row_counts
from fastseg.kernels.blocks.onednn import dense, dense_residual
from tests.model_cases import relative_error


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch):
    monkeypatch.setattr(row_counts, "_products", row_counts._Products())


def test_few_numbers_serve_all():
    numbers = [row_counts.rounded_up(rows) for rows in range(1, 20_000)]
    assert all(number >= rows for rows, number in enumerate(numbers, 1))
    assert max(number / rows for rows, number in enumerate(numbers, 1) if rows >= 64) < 4 / 3
    assert len(set(numbers)) < 30
    assert numbers[63:128] == [64, *[80] * 16, *[96] * 16, *[128] * 32]


def test_what_comes_back_is_computed_as_it_is():
    def counts(*sizes):
        return [row_counts.row_count(rows, "product") for rows in sizes]

    assert counts(1000, 1000, 900) == [1024, 1024, 1024], "an image's layers are one call"
    assert counts(1000, 1000, 900, 33) == [1000, 1000, 900, 64]
    assert row_counts.row_count(1000, "another") == 1024
    assert counts(*range(2001, 2001 + row_counts._REMEMBERED), 1000)[-1] == 1024, "long ago"
    assert counts(512, 4096) == [512, 4096]


def test_threads_do_not_know_each_other():
    seen = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: seen.append(row_counts.row_count(1000, "product")))
        thread.start()
        thread.join()
    assert seen == [1024, 1024]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_padded_rows(dtype, monkeypatch):
    monkeypatch.setattr(onednn, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(onednn, "_FEWEST_ROWS_HALF", 1)
    monkeypatch.setattr(onednn, "_FEWEST_VALUES", 0)
    given = []

    def counted(rows, *key):
        given.append(row_counts.row_count(rows, *key))
        return given[-1]

    monkeypatch.setattr(onednn, "row_count", counted)
    weight, bias = (torch.randn(*size).to(dtype) for size in ((24, 32), (24,)))
    for height, width in ((5, 7), (6, 7), (5, 7)):
        x = torch.randn(2, height, width, 32).to(dtype).transpose(1, 2)
        residual = torch.randn(2, width, height, 24).to(dtype)
        expected = F.linear(x.double(), weight.double(), bias.double())
        for result, wanted in (
            (dense(x, weight, bias), expected),
            (dense_residual(x, weight, bias, residual), expected + residual.double()),
        ):
            assert result.shape == wanted.shape
            assert relative_error(result, wanted) <= torch.finfo(dtype).eps * 16 ** (
                dtype == torch.float32
            )
    if onednn.plain_on_cpu(weight):
        assert given == [80, 80, 96, 96, 70, 70]

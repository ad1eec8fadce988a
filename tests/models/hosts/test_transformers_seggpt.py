"""SegGPT as transformers 4 has it: parity of what tests/models/seggpt runs with transformers 5."""

from __future__ import annotations

import pytest

from tests.models.seggpt import test_parity as of_seggpt

MODEL = "SegGptForImageSegmentation"


@pytest.mark.parametrize("call", of_seggpt.CALLS.values(), ids=of_seggpt.CALLS)
def test_float64_is_exact_but_for_rounding(call):
    of_seggpt.test_float64_is_exact_but_for_rounding("accelerated", MODEL, call)


def test_float32():
    of_seggpt.test_float32("accelerated", labels=True)


def test_several_prompts_of_one_image(monkeypatch):
    of_seggpt.test_several_prompts_of_one_image("accelerated", 2, monkeypatch)

"""The library prints nothing: it warns, and logs to the logger "fastseg"."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

import transformers

import fastseg
from tests.cli.cli_cases import save_model

ROOT = Path(__file__).parents[1]


def test_only_the_command_line_prints():
    printing = set()
    for folder in ("fastseg", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                    printing.add(path.relative_to(ROOT).parts[:2])
    assert printing == {("fastseg", "cli")}


def test_what_is_loaded_and_made_fast_is_logged(tmp_path, caplog, capfd):
    folder = save_model(tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="fastseg"):
        fastseg.from_pretrained(folder)
        model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder).eval()
        fastseg.accelerate(model)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("fastseg")]
    assert f"{folder / 'model.safetensors'}: SegformerForSemanticSegmentation, " in said[0]
    assert re.fullmatch(r"SegformerForSemanticSegmentation: [1-9] parts made fast", said[1])
    caplog.clear()
    fastseg.from_pretrained(folder)  # by default nothing is told
    assert not caplog.records
    assert "fastseg" not in "".join(capfd.readouterr())

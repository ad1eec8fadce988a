"""Documents: links, file names, commands, code and names in them are those of the repository."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import shlex
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import fastseg
import fastseg.cli
from fastseg import kernels

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
FOLDERS = ("fastseg", "kernels", "bench", "tests", "docs", "examples")
BENCH_SOURCE = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted((ROOT / "bench").rglob("*.py"))
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
# Tables made from rows, whose commands may be of an earlier commit.
_MADE = re.compile(r"<!-- (bench:\w+) -->.*?<!-- /\1 -->", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_NAME = re.compile(r"(?<![\w./:-])fastseg(?:\.[A-Za-z_]\w*)+")
_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./*-]*(?:::\w+)?")


class Document(NamedTuple):
    """A markdown file taken apart."""

    path: Path
    prose: str  # without fenced blocks
    blocks: list[tuple[str, str]]  # (language, text)

    @classmethod
    def read(cls, path: Path) -> Document:
        text = path.read_text(encoding="utf-8")
        blocks = [(language, block) for language, block in _FENCE.findall(text)]
        return cls(path, _FENCE.sub("", text), blocks)

    def spans(self) -> list[str]:
        """Inline code, on one line each, but for that of tables made from rows."""
        return [" ".join(span.split()) for span in _SPAN.findall(_MADE.sub("", self.prose))]

    def shell_lines(self) -> list[str]:
        """Lines of blocks that are no Python."""
        return [
            line for language, block in self.blocks if not language for line in block.split("\n")
        ]


def broken_links(document: Document) -> Iterator[str]:
    for target in _LINK.findall(_SPAN.sub("", document.prose)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = document.path.parent / name if name else document.path
        if not path.exists():
            yield f"link to {target}"
        elif anchor and anchor not in _anchors(path):
            yield f"link to {target}: there is no such heading"


def _anchors(path: Path) -> set[str]:
    """Headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_files(document: Document) -> Iterator[str]:
    """Paths that begin with a folder of the repository, in inline code and in command lines."""
    words = [word for line in document.shell_lines() for word in _words(line)]
    for word in [*document.spans(), *words]:
        if not _PATH.fullmatch(word):
            continue
        name, _, function = word.partition("::")
        found = list(ROOT.glob(name.rstrip("/")))
        if not found:
            yield f"file {word}"
        elif function and f"def {function}(" not in found[0].read_text(encoding="utf-8"):
            yield f"file {name}: it has no {function}"


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # no command line
        return []


def wrong_commands(document: Document) -> Iterator[str]:
    """Command lines of fastseg, of bench and of make, in blocks and in inline code.

    In inline code the name of a command may stand alone.
    """
    for line in document.shell_lines():
        yield from _wrong_command(_words(line))
    for span in document.spans():
        words = _words(span)
        if words[:1] == ["fastseg"] and len(words) == 2:
            words.append("--help")
        yield from _wrong_command(words)


def _wrong_command(words: list[str]) -> Iterator[str]:
    while words and re.fullmatch(r"[A-Z0-9_]+=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["make"]:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in words[1:]:
            if not re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE):
                yield f"command {shlex.join(words)}: no such target"
    elif words[:1] == ["fastseg"] and len(words) > 1:
        error = _usage_error(words[1:])
        if error is not None:
            yield f"command {shlex.join(words)}: {error}"
        if words[1] == "bench":
            yield from _unknown_options(words)
    elif words[1:2] == ["-m"] and len(words) > 2 and words[2].split(".")[0] == "bench":
        name = words[2].replace(".", "/")
        if not any((ROOT / path).is_file() for path in (f"{name}.py", f"{name}/__main__.py")):
            yield f"command {shlex.join(words)}: no such module"
        yield from _unknown_options(words)


def _usage_error(arguments: list[str]) -> str | None:
    """What the command line says of `arguments`, with nothing run."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for module in pkgutil.iter_modules(fastseg.cli.__path__):
            command = importlib.import_module(f"fastseg.cli.{module.name}")
            if hasattr(command, "add_parser"):
                patch.setattr(command, "run", lambda arguments: 0)
        status = fastseg.cli.main(arguments)
    return None if status == 0 else said.getvalue().strip().split("\n")[-1]


def _unknown_options(words: list[str]) -> Iterator[str]:
    for word in words:
        option = word.split("=")[0]
        if option.startswith("--") and f'"{option}"' not in BENCH_SOURCE and option != "--help":
            yield f"command {shlex.join(words)}: bench has no option {option}"


def wrong_code(document: Document) -> Iterator[str]:
    for language, block in document.blocks:
        if language == "python":
            try:
                compile(textwrap.dedent(block), str(document.path), "exec")
            except SyntaxError as error:
                yield f"code: {error}"


def unknown_names(document: Document) -> Iterator[str]:
    """`fastseg.xyz` in inline code and in blocks."""
    for text in [*document.spans(), *(block for _, block in document.blocks)]:
        for name in _NAME.findall(text):
            if not _exists(name):
                yield f"name {name}"


def _exists(name: str) -> bool:
    found = fastseg
    known = "fastseg"
    for part in name.split(".")[1:]:
        known = f"{known}.{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(known)
            except ImportError:
                return False
        found = getattr(found, part)
    return True


CHECKS = (broken_links, missing_files, wrong_commands, wrong_code, unknown_names)


def problems(path: Path) -> list[str]:
    document = Document.read(path)
    return [problem for check in CHECKS for problem in check(document)]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents(path):
    assert problems(path) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[page](absent.md)", "link to absent.md"),
        ("![picture](absent.png)", "link to absent.png"),
        ("# One\n[here](#two)", "link to #two: there is no such heading"),
        ("`fastseg/absent.py`", "file fastseg/absent.py"),
        ("`docs/absent/*.md`", "file docs/absent/*.md"),
        ("`tests/test_docs.py::test_absent`", "file tests/test_docs.py: it has no test_absent"),
        ("```\npytest tests/absent -k x  # why\n```", "file tests/absent"),
        ("```\nfastseg predict a.jpg --absent\n```", "command fastseg predict a.jpg --absent: "),
        ("```\nX=1 fastseg tune\n```", "command fastseg tune: "),
        ("`fastseg absent`", "command fastseg absent --help: "),
        ("```\nmake absent\n```", "command make absent: no such target"),
        ("`python -m bench.absent`", "command python -m bench.absent: no such module"),
        ("`fastseg bench --absent`", "command fastseg bench --absent: bench has no option"),
        ("```\npython -m bench ops --absent 1\n```", "command python -m bench ops --absent 1: "),
        ("```python\nmodel = (\n```", "code: "),
        ("`fastseg.absent(model)`", "name fastseg.absent"),
        ("```python\nfastseg.kernels.absent(x)\n```", "name fastseg.kernels.absent"),
    ],
)
def test_what_is_broken_is_found(text, problem, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"Text.\n\n{text}\n", encoding="utf-8")
    found = problems(path)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_what_is_right_is_left_alone(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "# A heading: one\n[here](#a-heading-one), [there](page.md), [web](https://example.org/x)\n"
        "`fastseg.kernels.mix_ffn`, `fastseg tune`, `config.json`, `torch.ops.fastseg.*`, "
        "`tests/test_docs.py::test_documents`, `kernels/core/configs/*.json`, `make test`\n"
        "```\nfastseg info\nA=b.json python -m bench ops --minutes 8  # a comment\n```\n"
        "```python\n    fastseg.segment(model, images)\n```\n"
        "<!-- bench:cpu -->\n`python -m bench.absent`\n<!-- /bench:cpu -->\n",
        encoding="utf-8",
    )
    assert problems(path) == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/**/*.svg")), ids=lambda path: path.name)
def test_drawings_are_well_formed(path):
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


OPS = (
    *("patch_embed", "sr_attention", "mix_ffn", "layer_norm", "decode_head"),
    *("upsample_argmax", "upsample_scores", "upsample_cross_entropy"),
)


@pytest.mark.parametrize("op", OPS)
def test_pages_of_ops_have_their_signatures(op):
    _, block = Document.read(ROOT / "docs" / "ops" / f"{op}.md").blocks[0]
    names: dict = {"torch": torch}
    exec(block, names)
    shown = inspect.signature(names[op]).parameters.values()
    real = inspect.signature(getattr(kernels, op)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in shown] == [
        (p.name, p.kind, p.default) for p in real
    ]

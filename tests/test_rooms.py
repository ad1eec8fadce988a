"""Who may import whom: docs/architecture.md has the drawing, and says why.

All import statements count, those inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From below to above; a room imports those above its own line in this list. Rooms of one line may
# import one another, without cycles. Some are still to be built.
FLOORS = (
    ("_version",),
    ("kernels",),
    ("folding",),
    (
        *("checkpoints", "images", "datasets", "cuda_graphs"),
        *("exporting", "training", "quantization"),
    ),
    ("models",),
    ("acceleration", "reporting"),
    ("inference",),
    ("evaluation",),
    ("__init__",),
    ("demo",),
    ("cli",),
    ("__main__",),
)
# The same inside kernels/.
KERNEL_FLOORS = (
    ("core",),
    ("blocks",),
    ("norm", "ffn", "attention", "embed", "head", "labels", "loss"),
    ("tune",),
    ("__init__",),
)
# What each may import beside fastseg and the standard library.
OF_KERNELS = {"torch", "triton"}
HOSTS = {"transformers", "segmentation_models_pytorch", "timm", "mmseg", "mmcv", "mmengine"}


def _modules(folder: str) -> dict[str, Path]:
    """Dotted names of the modules in `folder`, those of kernels/ as fastseg.kernels."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[:2] == ["fastseg", "kernels"]:
            continue  # the link
        parts = ["fastseg", *parts] if folder == "kernels" else parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = _modules("fastseg") | _modules("kernels")


def _imports(module: str, path: Path) -> Iterator[str]:
    """What `module` imports, by absolute names: modules of fastseg, or others' top level."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = ".".join([*base, *([node.module] if node.module else [])])
            names = [
                f"{full}.{alias.name}" if f"{full}.{alias.name}" in MODULES else full
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            yield name if name.split(".")[0] == "fastseg" else name.split(".")[0]


EDGES = sorted((m, imported) for m, path in MODULES.items() for imported in _imports(m, path))


def _floor_of(room: str, floors: tuple[tuple[str, ...], ...]) -> int:
    for number, rooms in enumerate(floors):
        if room in rooms:
            return number
    raise AssertionError(f"{room}: in no floor of this file")


def _room(module: str, depth: int) -> str:
    """The part of a dotted name after `depth` others: "fastseg.folding.swap" is in "folding"."""
    return [*module.split("."), "__init__"][depth]


@pytest.mark.parametrize(
    ("inside", "depth", "floors"),
    [("fastseg", 1, FLOORS), ("fastseg.kernels", 2, KERNEL_FLOORS)],
    ids=["rooms", "kernels"],
)
def test_imports_go_down(inside, depth, floors):
    wrong, level = [], set()
    for module, imported in EDGES:
        if not all(f"{name}.".startswith(f"{inside}.") for name in (module, imported)):
            continue
        room, other = _room(module, depth), _room(imported, depth)
        if room == other:
            continue
        if _floor_of(other, floors) > _floor_of(room, floors):
            wrong.append(f"{module} imports {imported}")
        elif _floor_of(other, floors) == _floor_of(room, floors):
            level.add((room, other))
    assert not wrong, "\n".join(wrong)
    assert not _cycle(level)


def test_every_module_has_a_room():
    for module in MODULES:
        _floor_of(_room(module, 1), FLOORS)
        if module.startswith("fastseg.kernels"):
            _floor_of(_room(module, 2), KERNEL_FLOORS)


def test_relative_inside_and_absolute_between_rooms():
    for module, path in MODULES.items():
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            if node.level:
                assert len(package) - node.level >= 1, f"{module} leaves its room"
            else:
                within = len(package) > 1 and (node.module or "").split(".")[:2] == package[:2]
                assert not within, f"{module} imports {node.module}"


def test_no_cycles_between_modules():
    assert not _cycle({(m, i) for m, i in EDGES if i in MODULES and i != "fastseg"})


def _cycle(edges: set[tuple[str, str]]) -> list[str]:
    """What is left when whatever imports nothing, or nothing but such, is taken away."""
    left = set(edges)
    while True:
        sources = {source for source, _ in left}
        rest = {edge for edge in left if edge[1] in sources}
        if rest == left:
            return sorted(f"{source} -> {target}" for source, target in left)
        left = rest


def test_a_cycle_is_found():
    assert _cycle({("a", "b"), ("b", "c"), ("c", "b")}) == ["a -> b", "b -> c", "c -> b"]
    assert _cycle({("a", "b"), ("b", "c")}) == []


def test_outside():
    for module, imported in EDGES:
        top = imported.split(".")[0]
        assert top not in {"bench", "tests", "examples", *HOSTS}, f"{module} imports {imported}"
        if module.startswith("fastseg.kernels") and top not in OF_KERNELS:
            assert top in {"fastseg", *sys.stdlib_module_names}, f"{module} imports {imported}"


def test_the_drawing_and_the_page_have_all_rooms():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawing = (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8")
    boxes = re.findall(r'font-weight="bold"[^>]*>([\w, ]+)<', drawing)
    drawn = [room for box in boxes for room in box.split(", ")]
    assert drawn == [r for rooms in reversed(FLOORS) for r in rooms if not r.startswith("_")]
    for folder in (ROOT / "fastseg").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert any(folder.name in rooms for rooms in FLOORS), folder
            assert f"`{folder.name}/`" in page, folder


def test_the_top_level_is_short():
    files = [path.name for path in (ROOT / "fastseg").iterdir() if path.is_file()]
    assert len(files) <= 9, files

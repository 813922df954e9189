"""The house stays in order: a room imports only from rooms above it, and none outgrows itself."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vlm"

# Highest first: what a room may import from stands before it. Rooms of one line are equals that
# may see each other.
ROOMS = (
    "errors",
    "_version",
    "chips",
    "config",
    "paths",
    "sharding",
    "cluster",
    "nn",
    "losses",
    "models",
    "inputs",
    "display",
    "data",
    "weights",
    "bundle",
    "heads",
    "evaluate",
    "explain",
    "train",
    "adapt",
    "plan",
    "bench",
    "export",
    "serve",
    "cli",
    "__main__",
)
RANK = {room: rank for rank, line in enumerate(ROOMS) for room in line.split()}

FOREIGN = {"torch", "torchvision", "tensorflow", "transformers", "open_clip", "pickle", "requests"}
LONGEST = 500  # lines
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(source: str) -> list[tuple[int, str]]:
    """(line, full name) of everything that a module imports, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from vlm import bundle` names a room in the second half.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "vlm" else [base]
            found += [(node.lineno, name) for name in names]
    return found


def faults(room: str, source: str) -> list[str]:
    """What a module of `room` imports that it must not."""
    found = []
    for line, name in imports(source):
        top, *rest = name.split(".")
        if top in FOREIGN:
            found.append(f"line {line}: {top} is not for use at run time")
        elif top == "":
            found.append(f"line {line}: {name} is relative, write it in full")
        elif top == "vlm" and (not rest or rest[0] not in RANK):
            found.append(f"line {line}: {name} is no room")
        elif top == "vlm" and RANK[rest[0]] > RANK[room]:
            found.append(f"line {line}: {room} is above {rest[0]} and must not import from it")
    return found


def test_there_are_modules_and_every_room_has_its_place():
    assert len(MODULES) > 40
    assert {room_of(path) for path in MODULES} - {"__init__"} == set(RANK)


def test_contributing_names_the_rooms_in_this_order():
    page = (PACKAGE.parent / ".github" / "CONTRIBUTING.md").read_text()
    named = re.search(r"\n((?:`[a-z ]+`[ \n·]+)+)\n", page)[1].replace("`", "").replace("·", "")
    assert named.split() == [room for room in RANK if not room.startswith("_")]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    if path != PACKAGE / "__init__.py":  # the front: it names what lies in the rooms, lazily
        source = path.read_text()
        if path == PACKAGE / "weights" / "torch_pickle.py":  # the one unpickler, a restricted one
            source = source.replace("import pickle\n", "\n")
        assert faults(room_of(path), source) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("losses", "from vlm.train.step import Trainer"),
        ("losses", "import vlm.train.step"),
        ("losses", "def f():\n    from vlm.bundle import load"),
        ("config", "from vlm import paths"),
        ("heads", "import vlm"),
        ("heads", "from vlm import load"),
        ("heads", "from ..train import step"),
        ("heads", "from . import show"),
        ("weights", "import torch.nn"),
        ("weights", "from transformers import CLIPModel"),
        ("data", "import tensorflow as tf"),
        ("train", "if True:\n    from vlm.cli import main"),
    ],
)
def test_a_wrong_import_is_found(room, source):
    assert len(faults(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("train", "from vlm.losses import softmax_loss\nimport vlm.errors"),
        ("heads", "from vlm import bundle"),
        ("losses", "from vlm.losses.ring import Ring"),
        ("data", "import tensorflow_datasets as tfds"),
        ("cli", "from vlm.train.loop import train"),
    ],
)
def test_a_right_import_is_let_through(room, source):
    assert faults(room, source) == []


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that import each other in a circle, or nothing."""

    def walk(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        for other in sorted(graph.get(name, ())):
            if found := walk(other, [*way, name]):
                return found
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def neighbours(room: str, source: str) -> set[str]:
    """Modules of its own room that a module imports, at its top or inside a function."""
    found = {name.split(".")[2] for _, name in imports(source) if name.startswith(f"vlm.{room}.")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == f"vlm.{room}":
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("room", sorted({room_of(path) for path in MODULES}))
def test_no_circle_of_imports_inside_a_room(room):
    graph = {
        path.stem: neighbours(room, path.read_text())
        for path in (PACKAGE / room).glob("*.py")
        if path.stem != "__init__"  # the front: it names what lies in the room, lazily
    }
    assert circle(graph) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_are_short_and_named_by_what_is_inside(path):
    assert len(path.read_text().splitlines()) <= LONGEST
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints(path):
    """A library says nothing on stdout; a last word on stderr is another matter."""
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "print"
        and not any(k.arg == "file" and ast.unparse(k.value) == "sys.stderr" for k in node.keywords)
    ]
    assert room_of(path) == "cli" or calls == []

"""The import rule of the house: a file imports from lower floors or from its own room, and always from the file."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "spherify"

FLOORS = [  # from the ground up; rooms on one floor do not know each other
    {"errors", "version"},
    {"functional"},
    {"graph", "layers", "heads", "models", "data"},
    {"plan", "regularizers", "parameter_groups"},
    {"rewrite"},
    {"convert", "export"},
    {"calibrate"},  # converts before, and saves after
    {"train"},  # may anneal what calibrate knows how to
    {"experiments", "report", "bench"},
    {"cli"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_A_FLOOR = ("__init__.py", "__main__.py")
LIGHT = ("errors", "version", "cli")  # what the command line may import before a command runs


def files(package: Path) -> list[Path]:
    return [file for file in sorted(package.rglob("*.py")) if file.name not in WITHOUT_A_FLOOR]


def room_of(file: Path, package: Path) -> str:
    return file.relative_to(package).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST, package: Path) -> list[str]:
    """Dotted names of every module imported; of ``from a import b``, ``a.b`` where that is a module."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                full = f"{module}.{alias.name}"
                names.append(full if is_module(full, package) else module)
    return names


def is_module(name: str, package: Path) -> bool:
    first, *rest = name.split(".")
    if first != package.name or not rest:
        return False
    path = package.joinpath(*rest)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def own_imports(file: Path, package: Path) -> list[str]:
    names = imports_of(ast.parse(file.read_text()), package)
    return [name for name in names if name.split(".")[0] == package.name or name.startswith(".")]


def upward(package: Path) -> list[str]:
    found = []
    for file in files(package):
        room = room_of(file, package)
        for name in own_imports(file, package):
            other = name.split(".")[1] if "." in name.strip(".") else ""
            if other not in ("", room) and FLOOR_OF[other] >= FLOOR_OF[room]:
                found.append(f"{room} -> {other} ({file.relative_to(package)})")
    return found


def from_a_face(package: Path) -> list[str]:
    """Imports of a package itself, where the file that holds the name should stand."""
    found = []
    for file in files(package):
        for name in own_imports(file, package):
            path = package.joinpath(*name.split(".")[1:])
            if name.startswith(".") or path.is_dir():
                found.append(f"{name} ({file.relative_to(package)})")
    return found


def heavy_imports(file: Path, package: Path) -> list[str]:
    """Imports at the top of a file, outside functions, of torch or of rooms that load it."""
    tops = [node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = imports_of(ast.Module(body=tops, type_ignores=[]), package)
    rooms = [name for name in names if name.split(".")[0] == package.name and name.split(".")[1] not in LIGHT]
    return rooms + [name for name in names if name.split(".")[0] in ("torch", "timm", "torchvision", "numpy")]


def test_imports_only_run_down():
    assert upward(PACKAGE) == []


def test_every_room_has_a_floor():
    assert {room_of(file, PACKAGE) for file in files(PACKAGE)} <= set(FLOOR_OF)


def test_the_ground_floor_imports_nothing_of_ours():
    assert FLOORS[0] == {"errors", "version"}
    assert [own_imports(PACKAGE / f"{room}.py", PACKAGE) for room in sorted(FLOORS[0])] == [[], []]


def test_nothing_is_imported_from_the_face_of_a_package():
    assert from_a_face(PACKAGE) == []


def test_the_plan_never_imports_the_layers():
    names = [name for file in files(PACKAGE / "plan") for name in own_imports(file, PACKAGE)]
    assert names
    assert not [name for name in names if name.startswith("spherify.layers")]


def test_the_command_line_imports_nothing_heavy_before_a_command_runs():
    assert {str(file): heavy for file in files(PACKAGE / "cli") if (heavy := heavy_imports(file, PACKAGE))} == {}


def planted(tmp_path: Path, room: str, source: str) -> Path:
    """A package of this name with one file in a room, and the rooms it may import from."""
    package = tmp_path / "spherify"
    for path in ("graph/record.py", "plan/plan.py", "layers/conv.py", "rewrite/apply.py", "convert.py", "errors.py"):
        file = package / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
        if file.parent != package:
            (file.parent / "__init__.py").write_text("")
    (package / room).write_text(source)
    return package


@pytest.mark.parametrize(
    ("source", "arrow"),
    [
        ("from spherify.rewrite.apply import apply_", "graph -> rewrite"),
        ("import spherify.convert", "graph -> convert"),
        ("from spherify import convert", "graph -> convert"),
        ("from spherify.layers.conv import SphereConv2d", "graph -> layers"),  # the same floor
        ("def f():\n    from spherify.plan import plan", "graph -> plan"),
    ],
)
def test_an_upward_import_is_found(tmp_path, source, arrow):
    assert upward(planted(tmp_path, "graph/new.py", source)) == [f"{arrow} (graph/new.py)"]


@pytest.mark.parametrize(
    "source",
    [
        "from spherify.errors import ModelError",
        "from spherify.graph.record import record",
        "from spherify.graph import record",
        "import torch\nfrom torch import nn",
    ],
)
def test_a_downward_import_is_passed(tmp_path, source):
    package = planted(tmp_path, "graph/new.py", source)
    assert upward(package) == []
    assert from_a_face(package) == []


@pytest.mark.parametrize(
    "source",
    [
        "from spherify.graph import Recording",
        "import spherify.graph",
        "from spherify import plan, Options",
        "from .record import record",
    ],
)
def test_an_import_from_a_face_is_found(tmp_path, source):
    package = planted(tmp_path, "graph/new.py", source)
    assert [line for line in from_a_face(package) if line.endswith("(graph/new.py)")]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch", ["torch"]),
        ("from torch import nn", ["torch"]),
        ("from spherify.convert import plan", ["spherify.convert"]),
        ("from spherify.errors import X\nfrom spherify.version import __version__", []),
        ("def command():\n    import torch", []),
    ],
)
def test_a_heavy_import_at_the_top_is_found(tmp_path, source, found):
    package = planted(tmp_path, "cli.py", source)
    (package / "version.py").write_text("")
    assert heavy_imports(package / "cli.py", package) == found

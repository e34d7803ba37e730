"""The public face: names that load when they are used, a function and a room of one name, words for everything."""

import importlib
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import spherify
import spherify.functional
import spherify.heads
import spherify.layers

ROOT = Path(__file__).parents[1]
PACKAGE = Path(spherify.__file__).parent
ROOMS = [spherify, spherify.functional, spherify.layers, spherify.heads]
HEAVY = ("torch", "torchvision", "timm", "numpy", "rich", "typer")
README = ROOT / "README.md"


def in_a_new_python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def public() -> list[tuple[str, object]]:
    return [(f"{room.__name__}.{name}", getattr(room, name)) for room in ROOMS for name in room.__all__]


def members() -> list[tuple[str, object]]:
    """Public functions and classes, and the classes' own public methods."""
    found = []
    for path, value in public():
        if inspect.isfunction(value):
            found.append((path, value))
        elif inspect.isclass(value):
            own = [(name, member) for name, member in vars(value).items() if inspect.isfunction(member)]
            found += [(path, value), *((f"{path}.{name}", member) for name, member in own if not name.startswith("_"))]
    return found


INHERITED = {"forward", "extra_repr", "to_dict", "from_dict"}  # torch's own, and what the name says whole


# ---------------------------------------------------------------------------------------------- loading


def test_importing_the_package_imports_nothing_heavy():
    assert in_a_new_python(f"import spherify, sys; print(sorted(set({HEAVY}) & sys.modules.keys()))") == "[]"


def test_asking_for_its_errors_and_version_imports_nothing_heavy():
    script = "import spherify, sys; dir(spherify); spherify.__version__; spherify.SpherifyError; "
    assert in_a_new_python(f"{script} print(sorted(set({HEAVY}) & sys.modules.keys()))") == "[]"


@pytest.mark.parametrize("name", sorted(spherify.__all__))
def test_every_name_loads(name):
    assert getattr(spherify, name) is not None
    assert getattr(spherify, name) is getattr(spherify, name)


def test_a_star_import_brings_every_name():
    names: dict[str, object] = {}
    exec("from spherify import *", names)
    assert set(spherify.__all__) <= names.keys()


def test_every_name_comes_from_the_home_it_is_said_to_have():
    for name, home in spherify.HOMES.items():
        assert getattr(spherify, name) is getattr(importlib.import_module(home), name)


def test_every_name_with_a_home_is_public_and_the_other_way_round():
    assert {*spherify.HOMES, *spherify.ROOMS, "__version__"} == set(spherify.__all__)


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'spherify' has no attribute 'wings'"):
        _ = spherify.wings
    with pytest.raises(ImportError, match="wings"):
        exec("from spherify import wings")


def test_dir_lists_every_public_name_once():
    assert set(spherify.__all__) <= set(dir(spherify))
    assert len(dir(spherify)) == len(set(dir(spherify)))


ORDERS = [
    "import spherify; import spherify.plan.plan",
    "import spherify; spherify.plan; import spherify.plan.plan",
    "import spherify.plan.plan",
    "from spherify.plan.plan import Plan",
    "from spherify.plan import plan",
    "import importlib; importlib.import_module('spherify.plan')",
    "import spherify; spherify.spherify; spherify.Plan",
    "import spherify.cli.app",
    "from spherify import plan; import spherify.plan.rules",
]
TRIES_EVERY_ORDER = f"""
import sys
for script in {ORDERS}:
    for name in [name for name in sys.modules if name.split(".")[0] == "spherify"]:
        del sys.modules[name]
    exec(script, {{}})
    plan = sys.modules["spherify"].plan
    assert type(plan).__name__ == "function", script
    assert plan is sys.modules["spherify.convert"].plan, script
print("all")
"""


def test_plan_is_the_function_whatever_was_imported_before():
    assert in_a_new_python(TRIES_EVERY_ORDER) == "all"


def test_the_room_called_plan_is_reached_by_its_own_import():
    from spherify.plan import plan as room

    assert room.Plan is spherify.Plan
    assert inspect.isfunction(spherify.plan)


def test_other_names_can_be_set_on_the_package(monkeypatch):
    """Tests of users replace functions."""
    monkeypatch.setattr(spherify, "save", print)
    assert spherify.save is print


def test_errors_and_options_can_be_pickled():
    """They travel between the processes of a data loader or of a search."""
    for value in (spherify.OptionError("why"), spherify.Options(operator="sigmoid")):
        assert repr(pickle.loads(pickle.dumps(value))) == repr(value)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["OptionError", "ModelError", "RewriteError", "FileError"])
def test_every_error_is_a_spherify_error(name):
    assert issubclass(getattr(spherify, name), spherify.SpherifyError)


def test_errors_are_also_what_python_programmers_catch():
    assert issubclass(spherify.OptionError, ValueError)
    assert issubclass(spherify.ModelError, TypeError)


# ---------------------------------------------------------------------------------------------- words and types


@pytest.mark.parametrize(("path", "value"), members(), ids=[path for path, _ in members()])
def test_everything_public_has_a_docstring_of_its_own(path, value):
    text = value.__doc__ or ""
    assert text.strip() or path.rpartition(".")[2] in INHERITED
    if inspect.isclass(value):
        assert "__doc__" in vars(value), "inherited"
        assert not text.startswith(f"{value.__name__}("), "made by dataclass"


@pytest.mark.parametrize(("path", "value"), members(), ids=[path for path, _ in members()])
def test_everything_public_is_typed(path, value):
    if not inspect.isfunction(value):
        return
    signature = inspect.signature(value)
    assert signature.return_annotation is not inspect.Signature.empty
    arguments = [entry for name, entry in signature.parameters.items() if name != "self"]
    bare = [entry.name for entry in arguments if entry.annotation is inspect.Parameter.empty]
    assert bare == []


def test_every_file_begins_with_a_sentence():
    for file in PACKAGE.rglob("*.py"):
        assert file.read_text(encoding="utf-8").startswith('"""'), file


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_is_that_of_the_distribution():
    assert re.fullmatch(r"\d+\.\d+\.\d+", spherify.__version__)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert '[tool.hatch.version]\npath = "spherify/version.py"' in project


# ---------------------------------------------------------------------------------------------- README


def snippets() -> list[str]:
    text = README.read_text(encoding="utf-8") if README.is_file() else ""
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    if not snippets():
        pytest.skip("README.md has no Python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in snippets():
        exec(compile(snippet, "README.md", "exec"), names)


def test_the_commands_of_the_readme_have_options_that_exist():
    if not README.is_file():
        pytest.skip("there is no README.md")
    from typer.main import get_command

    from spherify.cli.app import app

    known = {
        option
        for command in get_command(app).commands.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"\bspherify [^`\n]*?(--[a-z-]+)", README.read_text(encoding="utf-8")))
    assert named - known - {"--help", "--version"} == set()

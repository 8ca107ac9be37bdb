"""Imports only go down (docs/design.md), and heavy ones wait until they are needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moirai_sim

ROOT = Path(moirai_sim.__file__).parent
LAYERS = [
    {"errors", "units", "files", "yaml_files", "console", "display", "progress", "compiled", "catalog"},
    {"costs", "clusters", "graphs", "profiling", "operators_file"},
    {"problem", "placement", "timeline", "timeline_schema", "evidence", "verify"},
    {"sources", "instances"},
    {"policies", "simulation", "execution", "testing"},
    {"studies", "summary", "listing", "doctor"},
    {"cli", "__main__"},
]
"""Lowest first. A room imports from its own layer and from lower ones."""
UPWARD = {
    ("profiling", "execution"),  # links are timed on the very workers that run placements
}
"""Exceptions, each with its reason."""
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def room_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_rooms(tree):
    """Rooms that run-time imports of a module name; those under TYPE_CHECKING are for readers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moirai_sim"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("moirai_sim."))


def test_every_room_has_a_layer():
    assert {room_of(path) for path in MODULES} <= set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    room = room_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    rooms = {name for name in imported_rooms(tree) if name in LEVEL and name != room}
    upward = {name for name in rooms if LEVEL[name] > LEVEL[room] and (room, name) not in UPWARD}
    assert not upward, f"{room} imports {upward} from above"


def test_verify_imports_the_shared_nouns_alone():
    tree = ast.parse((ROOT / "verify.py").read_text(encoding="utf-8"))
    assert set(imported_rooms(tree)) <= {"problem", "placement", "timeline"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


HEAVY = {
    "cvxpy", "google", "highspy", "joblib", "matplotlib", "networkx", "numba", "numpy",
    "onnx", "onnxruntime", "ortools", "pandas", "plotly", "psutil", "pyarrow", "pydantic",
    "pynvml", "python_calamine", "ray", "rich", "ruamel", "scipy", "simpy", "skl2onnx",
    "sklearn", "torch",
}  # fmt: skip


def modules_after(code):
    script = f"import sys\n{code}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split()[-2000:])


def test_help_imports_nothing_heavy():
    code = "sys.argv = ['moirai-sim', '--help']\nfrom moirai_sim.cli import main\ntry: main()\nexcept SystemExit: pass"
    loaded = modules_after(code)
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_import_of_the_package_imports_nothing_heavy():
    assert not modules_after("import moirai_sim") & HEAVY


def test_pytorch_is_not_imported_by_the_core():
    code = "import moirai_sim\nfor name in moirai_sim.__all__: getattr(moirai_sim, name)"
    loaded = modules_after(code)
    assert "numpy" in loaded
    assert not loaded & {"torch", "cvxpy", "plotly", "sklearn", "ortools", "ray", "matplotlib"}


def test_public_names_are_what_they_say_whatever_was_imported_before():
    code = "import moirai_sim.verify, moirai_sim as ms; print(callable(ms.verify), callable(ms.place))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]

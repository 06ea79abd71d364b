"""The rooms of the package: which may import which, that no two import each other, and how long things are."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

SCRIPTS = ["train_cls", "train_det", "train_diffusion"]
METHOD = {"losses", "schedule", "crossing", "record", "distillation", "teacher", "controls", "running"}
ROOMS = {  # what a room may import beside itself; "method" stands for the eight files on top
    "method": set(),
    "engine": {"method"},
    "compare": {"method"},
    "share": {"engine", "method"},
    "adapters": {"method"},
    "images": {"engine", "method"},
    "detection": {"images", "engine", "method"},
    "diffusion": {"images", "engine", "method"},
}
MODULES = sorted((ROOT / "w2s").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules of the project and the scripts that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & ({name_of(module) for module in MODULES} | set(SCRIPTS))


def room_of(module: str) -> str:
    part = module.split(".")[1]
    return "method" if part in METHOD else part


def test_the_top_of_the_package_is_the_method():
    assert {path.stem for path in (ROOT / "w2s").glob("*.py")} == METHOD | {"__init__"}
    assert {path.name for path in (ROOT / "w2s").iterdir() if (path / "__init__.py").exists()} == set(ROOMS) - {
        "method"
    }


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_its_own_room_and_those_below(path):
    own = name_of(path)
    if own == "w2s":
        assert imports(path) == {"w2s.losses", "w2s.schedule"}
        return
    others = {module for module in imports(path) if module not in ("w2s", own)}
    assert not others & set(SCRIPTS)
    assert {room_of(module) for module in others} <= ROOMS[room_of(own)] | {room_of(own)}


def test_no_module_imports_itself_through_others():
    arrows = {name_of(path): imports(path) - {name_of(path)} for path in MODULES}
    rooms = {f"w2s.{room}" for room in ROOMS}  # a room's __init__ is its face, not a stop on the way
    open_, done = [], set()

    def visit(module: str) -> None:
        assert module not in open_, " -> ".join([*open_, module])
        if module in done:
            return
        open_.append(module)
        for other in sorted(arrows.get(module, set()) - rooms - {"w2s"}):
            visit(other)
        done.add(open_.pop())

    for module in sorted(arrows):
        visit(module)


@pytest.mark.parametrize("path", [*MODULES, *(ROOT / f"{script}.py" for script in SCRIPTS)], ids=lambda path: path.stem)
def test_nothing_is_too_long_to_read(path):
    text = path.read_text()
    assert text.count("\n") <= (330 if path.stem in SCRIPTS else 300)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < (70 if node.name == "main" else 60), node.name

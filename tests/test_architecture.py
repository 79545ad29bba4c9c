"""The rules that keep the house in order: floors, sizes, homes; read from the source, nothing is run.

docs/contributing.md says what they are for.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "linop_hess"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Low to high; an import may go down or stay on its floor, never up. A package stands for all its modules that are not named themselves.
FLOORS = [
    "errors",
    "_display",
    "_memory",
    "_validate",
    "processes",
    "_machine",
    "lq.accuracy",
    "lq.wiring",
    "lq.stacked",
    "lq.stages",
    "lq.layout",
    "lq.band_storage",
    "lq.transition",
    "lq.problem",
    "lq.summed",
    "lq.matrix.assembly_plan",
    "lq.matrix.assembly",
    "lq.scaling",
    "lq.segments",
    "lq.condensed",
    "lq.analysis",
    "lq.pivots",
    "lq.value",
    "lq.methods.base",
    "lq.iterative",
    "lq.matrix",
    "lq.elimination",
    "lq.methods",
    "lq.solve",
    "lq.inverse",
    "lq",
    "operators",
    "tables",
    "autograd",
    "graph.recording",
    "graph.rules",
    "graph",
    "per_sample",
    "stored",
    "spectrum",
    "curvature",
    "streamed",
    "linearization",
    "trust_region",
    "minimum",
    "optim",
    "tasks",
    "krylov",
    "plot",
    "",
    "cli",
    "__main__",
]
OPTIONAL = {"curvlinops", "matplotlib", "sklearn", "tqdm"}
ROOMS = ("lq.stages", "lq.pivots", "lq.value", "lq.methods")


def name_of(path: Path) -> str:
    """Dotted name of a module within the package; the package itself is the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Modules of the package that a module imports, wherever in it."""
    known = {name_of(module) for module in MODULES}
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "linop_hess":
            base = (node.module or "").removeprefix("linop_hess").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                found.append(inner if inner in known else base)
        elif isinstance(node, ast.Import):
            found += [a.name.removeprefix("linop_hess.") for a in node.names if a.name.startswith("linop_hess.")]
    return tuple(found)


def floor_of(module: str) -> int:
    parts = module.split(".")
    names = [".".join(parts[:k]) for k in range(len(parts), 0, -1)] if module else [""]
    return next(FLOORS.index(name) for name in names if name in FLOORS)


def ids(path: Path) -> str:
    return name_of(path) or "linop_hess"


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_imports_go_down(path):
    mine = floor_of(name_of(path))
    upward = [other for other in imports_of(path) if floor_of(other) > mine]
    assert not upward, f"{name_of(path)} imports {upward} from a floor above"


def test_no_circles():
    graph = {name_of(path): {other for other in imports_of(path) if other != name_of(path)} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_no_import_is_hidden(path):
    """None inside a function, optional extras aside, and none for the type checker alone."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    names = [a.name for a in inner.names] if isinstance(inner, ast.Import) else [inner.module or ""]
                    assert {n.split(".")[0] for n in names} <= OPTIONAL, f"line {inner.lineno}: import in a function"
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            mine = floor_of(name_of(path))
            for inner in ast.walk(node):
                if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("linop_hess"):
                    other = (inner.module or "").removeprefix("linop_hess").removeprefix(".")
                    assert floor_of(other) <= mine, f"line {inner.lineno}: a type from a floor above"


FOLDERS = sorted({path.parent for path in MODULES})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(ROOT)))
def test_rooms_are_neither_cupboards_nor_halls(folder):
    assert 4 <= len(list(folder.glob("*.py"))) <= 14


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem not in ("__init__", "__main__")], ids=ids)
def test_files_are_neither_scraps_nor_tomes(path):
    assert 50 <= len(path.read_text(encoding="utf-8").splitlines()) <= 400


def classes_in(room: str) -> set[str]:
    folder = PACKAGE / room.replace(".", "/")
    trees = (tree_of(path) for path in sorted(folder.glob("*.py")))
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("room", ROOMS)
def test_nobody_asks_what_kind_it_is(room):
    """No isinstance on a stage, pivot, value or factorization outside its folder: an interface is missing there."""
    kinds = classes_in(room)
    for path in MODULES:
        if name_of(path).startswith(room):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not asked & kinds, f"{name_of(path)}, line {node.lineno}: isinstance of {asked & kinds}"


LQ = [path for path in MODULES if name_of(path).startswith("lq")]


@pytest.mark.parametrize("path", LQ, ids=ids)
def test_what_is_kept_is_kept_in_the_analysis(path):
    """No __dict__, no cache of a module."""
    for node in ast.walk(tree_of(path)):
        assert not (isinstance(node, ast.Attribute) and node.attr == "__dict__"), f"line {node.lineno}"
        if isinstance(node, ast.Name | ast.Attribute):
            word = node.id if isinstance(node, ast.Name) else node.attr
            assert word not in {"WeakKeyDictionary", "WeakValueDictionary", "lru_cache", "cache"}, f"line {node.lineno}"


# A number this small is a tolerance, or a time of a machine.
TOLERANCE = 1e-3


@pytest.mark.parametrize("path", [path for path in LQ if name_of(path) != "lq.accuracy"], ids=ids)
def test_tolerances_have_one_home(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, float) and 0.0 < abs(node.value) <= TOLERANCE:
            raise AssertionError(f"line {node.lineno}: {node.value} belongs into lq/accuracy.py, with a name")


@pytest.mark.parametrize("path", [path for path in LQ if path.name != "__init__.py"], ids=ids)
def test_every_module_of_lq_has_a_test_of_its_own(path):
    inside = path.relative_to(PACKAGE)
    test = ROOT / "tests" / inside.parent / f"test_{inside.name.lstrip('_')}"
    assert test.exists(), f"expected {test.relative_to(ROOT)}"
    module = f"linop_hess.{name_of(path)}"
    package, _, leaf = module.rpartition(".")
    text = test.read_text(encoding="utf-8")
    found = f"from {module} import" in text or re.search(rf"from {re.escape(package)} import [^\n]*\b{leaf}\b", text)
    assert found, f"{test.relative_to(ROOT)} does not import {module}"


# Words that were coined where the field has one, and English that is not plain.
UNWANTED = re.compile(
    r"\bat hand\b|\bis had by\b|\bto be had\b|\bseldom does harm\b|\blockstep\b|\bcompliance\b|\blent\b", re.IGNORECASE
)


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_words(path):
    found = UNWANTED.search(path.read_text(encoding="utf-8"))
    assert not found, f"{found.group() if found else ''}: use the field's word, or plain English"


def test_every_floor_is_there():
    present = {name_of(path) for path in MODULES}
    assert not [floor for floor in FLOORS if floor not in present]

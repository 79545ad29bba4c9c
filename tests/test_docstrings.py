"""Raises sections are true, read from the source; nothing is run.

ruff's DOC501 and DOC502 see what one function raises in its own body. Here most errors come from a check or a factorization that the
function calls, so an error that is named must be raised there or in a function of the package that it reaches, by name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "linop_hess"

FOLDERS = sorted(
    {
        f"linop_hess.{path.stem}"
        for path in PACKAGE.iterdir()
        if path.suffix in {"", ".py"} and path.stem != "__pycache__"
    }
)

# What only a mistake inside the package raises is no promise to who calls it.
INTERNAL = {"AssertionError", "NotImplementedError", "StopIteration"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Routine:
    """A function or method, or a class as what its constructor does."""

    module: str
    line: int
    name: str
    doc: str
    is_public: bool
    owner: str | None = None
    bases: tuple[str, ...] = ()
    raised: set[str] = field(default_factory=set)
    used: set[tuple[str, str]] = field(default_factory=set)  # (what is before the dot: a class, a module or "", name)

    @property
    def documented(self) -> set[str]:
        """Errors that the docstring names."""
        section = re.search(r"^Raises\n-+\n(.*?)(?=^\S[^\n]*\n-{3,}$|\Z)", self.doc, re.MULTILINE | re.DOTALL)
        lines = re.findall(r"^([A-Z]\w*(?:, \w+)*)$", section[1], re.MULTILINE) if section else []
        return {name for line in lines for name in line.split(", ")}

    @property
    def title(self) -> str:
        return self.name if self.owner in {None, self.name} else f"{self.owner}.{self.name}"

    @property
    def where(self) -> str:
        return f"{self.module.replace('.', '/')}.py:{self.line} {self.title}"


def doc_of(node: ast.AST) -> str:
    assert isinstance(node, FUNCTIONS | ast.ClassDef | ast.Module)
    return ast.get_docstring(node) or ""


def types_in(node: ast.AST) -> dict[str, str]:
    """Names that are annotated, or set to an instance of a class, and the last capital name of it."""
    found: dict[str, str] = {}
    for inner in ast.walk(node):
        if isinstance(inner, ast.arg | ast.AnnAssign) and inner.annotation is not None:
            name, described = inner.arg if isinstance(inner, ast.arg) else ast.unparse(inner.target), inner.annotation
        elif isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Call):
            name, described = ast.unparse(inner.targets[0]), inner.value.func
        else:
            continue
        capital = [word for word in re.findall(r"\w+", ast.unparse(described)) if word in classes()]
        if capital:
            found[name] = capital[-1]
    return found


def read(routine: Routine, body: ast.AST, types: dict[str, str]) -> Routine:
    """Fill in what the body of a routine raises and uses."""
    types = {**types, **types_in(body)}
    # A parameter may be a function that the package passes by its own name; what is assigned here is something else.
    local = {node.id for node in ast.walk(body) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(body):
        if isinstance(node, ast.Raise) and node.exc is not None:
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(called, ast.Name) and called.id[:1].isupper():
                routine.raised.add(called.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            routine.raised.add("ImportError")
        elif isinstance(node, ast.Name) and node.id not in local:
            routine.used.add(("", node.id))
        elif isinstance(node, ast.Attribute):
            before = ast.unparse(node.value)
            made = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
            of = (routine.owner or "") if before in {"self", "super()", "cls"} else types.get(before, "")
            routine.used.add((of or (made if made in classes() else before), node.attr))
    return routine


def routines(path: Path) -> Iterator[Routine]:
    """Yield the functions, methods and classes of a module."""
    tree = trees()[path]
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            is_public = not node.name.startswith("_")
            yield read(Routine(module, node.lineno, node.name, doc_of(node), is_public), node, {})
        elif isinstance(node, ast.ClassDef):
            is_public = not node.name.startswith("_")
            bases = tuple(ast.unparse(base).split(".")[-1].split("[")[0] for base in node.bases)
            types = types_in(node)
            made = Routine(module, node.lineno, node.name, doc_of(node), is_public, node.name, bases)
            made.used = {("", base) for base in bases}
            for inner in node.body:
                if not isinstance(inner, FUNCTIONS):
                    continue
                if inner.name in {"__init__", "__post_init__"}:
                    read(made, inner, types)
                    continue
                visible = is_public and not inner.name.startswith("_")
                mine = Routine(module, inner.lineno, inner.name, doc_of(inner), visible, node.name, bases)
                yield read(mine, inner, types)
            yield made


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def classes() -> set[str]:
    return {node.name for tree in trees().values() for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def everything() -> dict[str, list[Routine]]:
    """Every routine of the package by its name; read once, and by the process that runs these tests alone."""
    found: dict[str, list[Routine]] = {}
    for path in trees():
        for routine in routines(path):
            found.setdefault(routine.name, []).append(routine)
    return found


def public(folder: str | None = None) -> list[Routine]:
    """What has a docstring for users, in one folder of the package or file beside them, or everywhere."""
    return [
        routine
        for named in everything().values()
        for routine in named
        if routine.is_public and routine.doc and (folder is None or f"{routine.module}.".startswith(f"{folder}."))
    ]


def meant(routine: Routine, before: str, name: str) -> list[Routine]:
    """What a name in a routine stands for, as far as the source tells: nothing where the class before the dot is not known."""
    found = everything().get(name, [])
    if not before:  # a function or class, of this module rather than of another
        free = [other for other in found if other.owner in {None, other.name}]
        return [other for other in free if other.module == routine.module] or free
    if before not in classes():
        return [other for other in found if other.owner is None and other.module.rpartition(".")[2] == before]
    line, at = [before], 0
    while at < len(line):
        line += [base for other in everything().get(line[at], []) for base in other.bases]
        at += 1
    return [other for other in found if other.owner in line]


def reached(start: Routine) -> set[str]:
    """What is raised in a routine and all that it reaches."""
    seen, pending, raised = {id(start)}, [start], set[str]()
    while pending:
        routine = pending.pop()
        raised |= routine.raised
        for before, name in routine.used:
            for other in meant(routine, before, name):
                if id(other) not in seen:
                    seen.add(id(other))
                    pending.append(other)
    return raised


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_raised_is_named(folder):
    missing = [
        f"{routine.where}: expected a docstring that names {name}"
        for routine in public(folder)
        for name in sorted(routine.raised - INTERNAL)
        if not re.search(rf"\b{name}\b", routine.doc)
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_named_is_raised(folder):
    untrue = [
        f"{routine.where}: {name} is raised nowhere below: take it out"
        for routine in public(folder)
        if routine.documented
        for name in sorted(routine.documented - reached(routine))
    ]
    assert not untrue, "\n".join(untrue)


def test_both_checks_see_the_package():
    promising = [routine for routine in public() if routine.documented]
    assert len(promising) > 40 and len(promising) == sum(r.documented != set() for f in FOLDERS for r in public(f))
    by_name = {routine.title: routine for routine in promising}
    assert by_name["Inverse"].documented >= {"ValueError", "TypeError", "MemoryError", "FactorizationError"}
    assert "MemoryError" in reached(by_name["Inverse"]) and "KeyError" not in reached(by_name["Inverse"])

"""Every Python block of README.md and docs/*.md runs, each file's blocks in order in one namespace."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import linop_hess
from tests.test_architecture import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (
    "python -m pip install -c constraints.txt -e '.[demo]' && linop-hess compare",
    "python -m pip install -c constraints.txt -e '.[test]' && python -m pytest -n 2 --dist loadfile",
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"\b(?:tests|linop_hess|examples|docs)/[\w/.]*\.(?:py|md|png)\b")
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(text: str) -> list[str]:
    """Return the blocks, padded so that a traceback names the line of the page."""
    blocks = []
    for fence in _FENCE.finditer(text):
        if fence[1] == "python":
            blocks.append("\n" * (text.count("\n", 0, fence.start()) + 1) + fence[2])
    return blocks


def needed(block: str) -> str:
    """The package that a block says it needs, in its first line, ``# needs NAME``; empty of the others."""
    found = re.match(r"\n*# needs (\w+)\n", block)
    return found[1] if found else ""


def anchors(text: str) -> set[str]:
    """Return GitHub's anchors of the headings outside fences."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for block in python_blocks(page.read_text(encoding="utf-8")):
            if needed(block) and importlib.util.find_spec(needed(block)) is None:
                continue
            exec(compile(block, str(page), "exec"), namespace)
    if page.name == "README.md":
        assert namespace["solution"].backward_error <= 1e-14
        assert namespace["record"].converged


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for path, anchor in _LINK.findall(_FENCE.sub("", text)):
        if path.startswith(("http:", "https:")):
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{page_name(page)} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page_name(page)} links to #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_that_are_named_are_there(page):
    named = set(_FILE.findall(page.read_text(encoding="utf-8")))
    gone = [path for path in sorted(named) if not (ROOT / path).exists() and not re.search(r"X|NAME|FILE", path)]
    assert not gone, f"{page_name(page)} names {gone}"


def test_links_of_readme_are_absolute_once_there_is_an_address():
    """A package index shows README by itself, where relative links are dead; before there is a repository nothing else is possible."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    links = [path for path, _ in _LINK.findall(_FENCE.sub("", PAGES[0].read_text(encoding="utf-8"))) if path]
    relative = [path for path in links if not path.startswith(("http:", "https:"))]
    assert "Source" not in urls or not relative, f"make absolute: {relative}"


def test_only_the_page_about_other_packages_needs_them():
    named = {page.name: {needed(block) for block in python_blocks(page.read_text(encoding="utf-8"))} for page in PAGES}
    assert named.pop("interop.md") >= {"", "curvlinops", "linear_operator", "pylops"}
    assert not [name for name, packages in named.items() if packages - {""}]


def test_every_page_has_blocks_except_the_tables():
    blocks = {page.name: len(python_blocks(page.read_text(encoding="utf-8"))) for page in PAGES}
    for name in ("README.md", "contributing.md", "interop.md", "method.md", "models.md", "operators.md", "scipy.md"):
        assert blocks[name] > 0, f"{name} has no Python block: is the fence pattern right?"


def test_every_floor_is_on_the_page_for_contributors():
    text = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    assert not [floor for floor in FLOORS if floor and f"`{floor}`" not in text]


def test_readme_cites_this_version():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"version = {{{linop_hess.__version__}}}" in text
    assert f'version = "{linop_hess.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_readme_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shell = "".join(fence[2] for fence in _FENCE.finditer(text) if fence[1] == "sh")
    for command in COMMANDS:
        assert command in shell.splitlines()


def test_ci_runs_the_readme_test_command():
    assert COMMANDS[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()

"""Sphinx makes a site of the pages here, the docstrings and the examples.

    python -m pip install -e '.[docs]' && python -m sphinx -W -b html docs docs/_build

Links to SciPy, NumPy, torch and Python are made where their inventories can be had; without network the site is built without them.
"""

import inspect
import urllib.error
import urllib.request
from typing import Any

import linop_hess

project, author, copyright = "linop_hess", "the linop_hess developers", "the linop_hess developers"
release = version = linop_hess.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"linop_hess {release}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's sections have the types
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

_SITES = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}


def _is_there(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}objects.inv", timeout=3) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


intersphinx_mapping = {name: (url, None) for name, url in _SITES.items() if _is_there(url)}


def _escape_bars(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """|x| is an absolute value in docstrings, not a substitution; what stands between backticks is left alone."""
    for k, line in enumerate(lines):
        parts = line.split("`")
        lines[k] = "`".join(part if i % 2 else part.replace("|", r"\|") for i, part in enumerate(parts))


def _of_init(
    app: object, what: str, name: str, thing: Any, options: object, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """The arguments of an operator's class are those of its __init__, not those of SciPy's __new__."""
    if what == "class" and signature == "(*args, **kwargs)":
        parameters = list(inspect.signature(thing.__init__).parameters.values())[1:]
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        return str(inspect.Signature(plain)), result
    return signature, result


def _home(app: object, page: str, text: list[str]) -> None:
    """README is the first page here."""
    text[0] = text[0].replace("](../README.md)", "](index.rst)")


def setup(app: Any) -> None:
    """Connect what Sphinx calls."""
    app.connect("autodoc-process-docstring", _escape_bars)
    app.connect("autodoc-process-signature", _of_init)
    app.connect("source-read", _home)

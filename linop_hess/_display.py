"""How results show themselves: text in a terminal, tables in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def html_table(rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """Return rows of cells as an HTML table, the first of them its head, with lines of text under it.

    Parameters
    ----------
    rows : iterable of sequences
        Shown as `str` shows them.
    notes : iterable of str
        A paragraph each.
    """
    head, *body = [[html.escape(str(cell)) for cell in row] for row in rows]
    titles = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"
    return table + "".join(f"<p>{html.escape(note)}</p>" for note in notes if note)


class Shown:
    """What shows as its `str` does: in a terminal, and as HTML in a notebook, a table where `_cells` gives rows.

    A dataclass of this kind says ``repr=False``, or its own `repr` would come first.
    """

    def __repr__(self) -> str:
        return str(self)

    def _cells(self) -> Sequence[Sequence[object]]:
        """Rows of cells, the head first; none for what is no table."""
        return ()

    def _notes(self) -> Sequence[str]:
        """Lines under the table."""
        return ()

    def _repr_html_(self) -> str:
        rows = self._cells()
        return html_table(rows, self._notes()) if rows else f"<pre>{html.escape(str(self))}</pre>"


class Unpacked:
    """What can be unpacked like a tuple, in the order of `_order`."""

    _order: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, name) for name in self._order)

"""Names of parameters and their places in flat vectors: one table, which every operator over parameters keeps."""

from __future__ import annotations

import builtins
import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.problem import Problem
from linop_hess.operators.convert import converted

_SHOWN = 8


def patterns_of(patterns: str | Iterable[str]) -> list[str]:
    """Return a name or pattern, or several, as a list.

    Raises
    ------
    TypeError
        If it is neither a string nor an iterable of strings.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns) if isinstance(patterns, Iterable) else None
    wrong = patterns if listed is None else next((one for one in listed if not isinstance(one, str)), None)
    if listed is None or wrong is not None:
        raise TypeError(
            f"expected a parameter's name, a glob pattern or several of them, got {wrong!r} of type "
            f"{type(wrong).__name__}: pass a string or a list of strings"
        )
    return listed


def matching(names: Collection[str], patterns: Iterable[str]) -> list[str]:
    """Return the names that are one of some patterns or match one, in the order of the names.

    Parameters
    ----------
    names : collection of str
    patterns : iterable of str
        A name stands for itself. In any other, ``*`` matches any characters, dots too, ``?`` one character and ``[…]`` one of some.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If one matches nothing; the message gives the nearest names.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = [pattern] if pattern in names else [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"expected a parameter's name or a pattern that matches some, got {pattern!r}, but there is no parameter "
                f"{pattern}: {_advice(pattern, list(names))}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def _advice(pattern: str, names: Sequence[str]) -> str:
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"for all of a module pass {pattern + '.*'!r}"
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    if near:
        return f"the nearest are {', '.join(near)}"
    return (
        f"pass one of {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}" if names else "there are none"
    )


class ParameterTable:
    """Parameters one after the other in flat vectors of size N.

    Parameters
    ----------
    names : iterable of str
        In the order of the flat vectors.
    shapes : iterable of tuple of int
        As many.
    dtype : torch.dtype, optional
    device : torch.device or str, optional

    Attributes
    ----------
    names : tuple of str
    shapes : tuple of tuple of int
    size : int
        N.
    dtype : torch.dtype
    device : torch.device

    Raises
    ------
    ValueError
        If there are not as many shapes as names, or a name comes twice.
    """

    def __init__(
        self,
        names: Iterable[str],
        shapes: Iterable[Sequence[int]],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.names = tuple(names)
        self.shapes = tuple(tuple(map(int, shape)) for shape in shapes)
        self.dtype, self.device = dtype, torch.device(device)
        self._position = {name: i for i, name in enumerate(self.names)}
        if not len(self._position) == len(self.names) == len(self.shapes):
            raise ValueError(
                f"expected a shape for each of several different names, got {len(self.names)} names, "
                f"{len(self._position)} of them different, and {len(self.shapes)} shapes: name each parameter once"
            )
        sizes = [math.prod(shape) for shape in self.shapes]
        self._edges = [0, *np.cumsum(sizes, dtype=np.int64).tolist()]

    @classmethod
    def of_tensors(cls, named: Mapping[str, Tensor]) -> Self:
        """Return the table of some tensors, one at least, all of one dtype and device."""
        first = next(iter(named.values()))
        return cls(named, [tensor.shape for tensor in named.values()], first.dtype, first.device)

    @classmethod
    def of_stages(cls, problem: Problem) -> Self:
        """Return the table of an LQ problem by itself: ``stages.0.x`` are the controls of its first stage, and so on.

        Where the controls of a stage do not lie side by side and in order in flat vectors, all controls are one ``x``.
        """
        layout = problem.layout
        sizes = {f"stages.{l}.x": (p,) for l, p in enumerate(layout.p.tolist()) if p}
        if layout.places is not None:
            runs = [layout.controls(l) for l in np.flatnonzero(layout.p).tolist()]
            if all(bool((np.diff(run) == 1).all()) for run in runs):
                named = zip([int(run[0]) for run in runs], sizes.items(), strict=True)
                sizes = dict(item for _, item in sorted(named))
            else:
                sizes = {"x": (problem.size,)}
        return cls(sizes, sizes.values(), problem.dtype, problem.device)

    @property
    def size(self) -> int:
        """N, the length of a flat vector."""
        return self._edges[-1]

    def _places(self, patterns: str | Iterable[str]) -> list[int]:
        """Positions in the table of the parameters that some patterns match."""
        chosen = matching(self._position, patterns_of(patterns))
        if not chosen:
            raise ValueError("expected a parameter's name or a pattern, got none: pass one at least")
        return [self._position[name] for name in chosen]

    def slice(self, pattern: str | Iterable[str]) -> builtins.slice:
        """Return where one parameter, or several that lie side by side, stand in flat vectors; see `Named.slice`.

        Raises
        ------
        ValueError
            If a pattern matches nothing, or what lies between the parameters does not belong to them.
        TypeError
            If the pattern is no string or iterable of strings.
        """
        places = self._places(pattern)
        start, stop = self._edges[places[0]], self._edges[places[-1] + 1]
        if sum(self._edges[i + 1] - self._edges[i] for i in places) != stop - start:
            raise ValueError(
                f"expected parameters that lie side by side in flat vectors, got {', '.join(self.names[i] for i in places[:_SHOWN])}"
                f"{', …' if len(places) > _SHOWN else ''}, which do not: use indices(...), which takes any"
            )
        return builtins.slice(start, stop)

    def indices(self, pattern: str | Iterable[str]) -> np.ndarray:
        """Return the flat indices of the parameters that match, ascending; errors as of `slice`, but for gaps."""
        places = self._places(pattern)
        return np.concatenate([np.arange(self._edges[i], self._edges[i + 1], dtype=np.int64) for i in places])

    def modules(self) -> dict[str, np.ndarray]:
        """Return the flat indices of each module's own parameters, by the module's name, in the order of the first of them."""
        members: dict[str, list[str]] = {}
        for name in self.names:
            members.setdefault(name.rpartition(".")[0], []).append(name)
        return {module: self.indices(names) for module, names in members.items()}

    def unflatten(self, x: Any) -> dict[str, Tensor]:
        """Cut flat vectors into the parameters; see `Named.unflatten`.

        Raises
        ------
        ValueError
            If `x` has another shape.
        TypeError
            If `x` is sparse, or an array that does not hold real numbers.
        """
        if isinstance(x, Tensor):
            if x.layout != torch.strided:
                raise TypeError(f"expected a dense tensor to unflatten, got layout {x.layout}: call .to_dense() on it")
            flat = x
        else:
            flat = converted(x, dtype=self.dtype, device=self.device, who="flat parameters").clone()
        if flat.ndim not in (1, 2) or flat.shape[0] != self.size:
            raise ValueError(
                f"expected flat parameters of shape ({self.size},) or ({self.size}, k), got {tuple(flat.shape)}: "
                "pass a flat vector, or a matrix with one vector a column"
            )
        edges = zip(self._edges[:-1], self._edges[1:], strict=True)
        shapes = [(*shape, *flat.shape[1:]) for shape in self.shapes]
        pieces = [flat[start:stop].view(shape) for (start, stop), shape in zip(edges, shapes, strict=True)]
        return dict(zip(self.names, pieces, strict=True))

    def flatten(self, tensors: Mapping[str, Any]) -> Tensor:
        """Join the parameters to a flat vector or block, the inverse of `unflatten`; see `Named.flatten`.

        Raises
        ------
        ValueError
            If a name is missing or unknown, or a tensor has another shape or device.
        TypeError
            If there is no mapping, or a tensor has another floating dtype, or does not hold real numbers.
        """
        if not isinstance(tensors, Mapping):
            raise TypeError(
                f"expected a dict of tensors by name to flatten, got {type(tensors).__name__}: pass one as of unflatten(...)"
            )
        missing, extra = [n for n in self.names if n not in tensors], [n for n in tensors if n not in self._position]
        if missing or extra:
            came = [f"{', '.join(missing[:_SHOWN])} missing"] if missing else []
            came += [f"{', '.join(map(str, extra[:_SHOWN]))} unknown"] if extra else []
            raise ValueError(
                f"expected a tensor for each of the {len(self.names)} parameters to flatten, got {' and '.join(came)}: "
                "pass the names of .names"
            )
        parts = [converted(tensors[n], dtype=self.dtype, device=self.device, who=f"parameter {n}") for n in self.names]
        columns = parts[0].shape[len(self.shapes[0]) :] if parts else ()
        for name, shape, part in zip(self.names, self.shapes, parts, strict=True):
            if part.shape != (*shape, *columns) or len(columns) > 1:
                block = f", with the {columns[0]} columns of {self.names[0]}," if len(columns) == 1 else ""
                shape = (*shape, *columns) if block else shape
                raise ValueError(
                    f"expected parameter {name} of shape {shape}{block}, got {tuple(part.shape)}: pass each parameter in its "
                    "shape, or each with one more dimension, the last, of one size"
                )
        flat = [part.reshape(int(np.prod(shape)), *columns) for shape, part in zip(self.shapes, parts, strict=True)]
        return torch.cat([torch.zeros((0, *columns), dtype=self.dtype, device=self.device), *flat])


class Named:
    """What has flat vectors of parameters, and a table of their names: from names to places and back.

    Attributes
    ----------
    parameter_table : ParameterTable
    names : tuple of str
        The parameters, in the order of the flat vectors.
    """

    parameter_table: ParameterTable

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the order of the flat vectors."""
        return self.parameter_table.names

    def slice(self, pattern: str | Iterable[str]) -> builtins.slice:
        """Return where a parameter stands in flat vectors; errors as of `ParameterTable.slice`.

        Parameters
        ----------
        pattern : str or iterable of str
            A parameter's name; or a glob pattern, as ``"blocks.3.*"`` (``*`` matches dots too); or several of these. A module's name by
            itself is neither.

        Returns
        -------
        slice
            Always a slice; `indices` takes parameters that do not lie side by side.
        """
        return self.parameter_table.slice(pattern)

    def indices(self, pattern: str | Iterable[str]) -> np.ndarray:
        """Return the flat indices of all parameters that match, ascending, as an array of int64; else as `slice`."""
        return self.parameter_table.indices(pattern)

    def unflatten(self, x: Any) -> dict[str, Tensor]:
        """Cut a flat vector, or a block of them, into the parameters; errors as of `ParameterTable.unflatten`.

        Parameters
        ----------
        x : array_like or Tensor, shape (N,) or (N, k)

        Returns
        -------
        dict of str to Tensor
            Each in the shape of its parameter, or ``(*shape, k)``. Of a tensor they are views, of its dtype, device and graph; of an
            array they are tensors of their own, of the parameters' dtype and device.
        """
        return self.parameter_table.unflatten(x)

    def flatten(self, tensors: Mapping[str, Any]) -> Tensor:
        """Join the parameters to a flat vector, or to a block of them; the inverse of `unflatten`; errors as of `ParameterTable.flatten`.

        Parameters
        ----------
        tensors : mapping of str to Tensor or array_like
            For each of `names` one in the shape of that parameter, or each with one more dimension, the last, of size k.

        Returns
        -------
        Tensor, shape (N,) or (N, k)
            Of the parameters' dtype and device, of its own memory and without a graph.
        """
        return self.parameter_table.flatten(tensors)

"""A linearized network in a file: tensors, and JSON that says what they are; reading it runs no code that the file brings.

The file is one of `torch.save`, of a dict with the JSON text under "structure" and a list of tensors under "tensors", which
``torch.load(path, weights_only=True)`` reads. In the JSON, what is no plain value is an object: ``{"tensor": 3}`` and ``{"array": 3}``
are the fourth tensor, as a tensor or a NumPy array; ``{"tuple": […]}``, ``{"set": […]}`` and ``{"dict": [[key, value], …]}`` are what
they say; ``{"kind": "AffineStage", "with": {…}}`` is the class of that name, of those in `KINDS` alone, called with those arguments.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from linop_hess.graph.build import Chain
from linop_hess.graph.liveness import LiveCuts
from linop_hess.lq import stages
from linop_hess.lq.problem import Problem
from linop_hess.lq.stacked import compact
from linop_hess.lq.stages.base import Stage
from linop_hess.tables import Cuts, StageLabel, StageLabels

FORMAT = 1
"""Number of the form of the file; it rises when old files can no longer be read."""


def _below(kind: Any) -> Iterator[type]:
    """The package's own kinds of stage."""
    for sub in kind.__subclasses__():
        if sub.__module__.startswith("linop_hess."):
            yield sub
        yield from _below(sub)


_PARTS = (Chain, Problem, Cuts, LiveCuts, StageLabel, StageLabels, stages.Wiring, stages.Arrangement, stages.Features)
KINDS: dict[str, Callable[..., Any]] = {kind.__name__: kind for kind in (*_PARTS, *_below(Stage))}
"""The classes that a file may name."""


def write(chain: Chain, path: str | os.PathLike[str]) -> None:
    """Write a chain to a file.

    Raises
    ------
    TypeError
        If it holds something of a class that is not in `KINDS`.
    """
    tensors: list[Tensor] = []
    structure = json.dumps({"format": FORMAT, "chain": _Packing(tensors).pack(chain)})
    torch.save({"structure": structure, "tensors": tensors}, path)


def read(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Chain:
    """Read what `write` wrote, to a device, by default the one it was on.

    Raises
    ------
    ValueError
        If the file is none that `write` wrote, or one of a later version.
    """
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        structure = json.loads(content["structure"])
        form, tensors = structure["format"], content["tensors"]
    except (pickle.UnpicklingError, RuntimeError, TypeError, KeyError, EOFError, ValueError) as error:
        raise ValueError(
            f"expected a file that Linearization.save wrote, got {os.fspath(path)!r}, which is none ({type(error).__name__}): save "
            "the linearization again"
        ) from error
    if form != FORMAT:
        raise ValueError(
            f"expected a file of format {FORMAT}, got one of format {form!r}, which another version of linop_hess wrote: read it with "
            "that one, or save the linearization again"
        )
    try:
        chain = _unpacked(structure["chain"], tensors)
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"expected the parts of a linearization in {os.fspath(path)!r}, got something else ({type(error).__name__}: {error}): "
            "save it again"
        ) from error
    if not isinstance(chain, Chain):
        raise ValueError(f"expected a linearization in {os.fspath(path)!r}, got {type(chain).__name__}: save one")
    return chain


class Storable:
    """What is made of a chain, and can be written to a file and read."""

    _chain: Chain

    def __init__(self, chain: Chain) -> None:
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file that `load` reads, as plain tensors and a description of them: reading it runs no code of the file.

        As in a pickle, everything but `verify` survives, and no factors are kept.

        Parameters
        ----------
        path : str or path-like

        Raises
        ------
        TypeError
            If a stage is of a kind of one's own.
        """
        write(self._chain, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> Self:
        """Read what `save` wrote.

        Parameters
        ----------
        path : str or path-like
        device : torch.device or str, optional
            Where to; by default where it was.

        Returns
        -------
        Linearization
            Without its model, so that `verify` has nothing to compare with.

        Raises
        ------
        ValueError
            If the file is none that `save` wrote, or one of a later version.
        """
        return cls(read(path, device))


class _Packing:
    """Values as JSON takes them, and the tensors beside; a tensor that is met twice is written once."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors
        self._seen: dict[int, tuple[Tensor, int]] = {}

    def pack(self, value: Any) -> Any:
        """Return a value for `json.dumps`."""
        if value is None or isinstance(value, bool | str | int | float):
            return value
        if isinstance(value, np.integer):
            return int(value)
        if isinstance(value, Tensor):
            return {"tensor": self._put(value)}
        if isinstance(value, np.ndarray):
            return {"array": self._put(torch.from_numpy(np.ascontiguousarray(value)))}
        if isinstance(value, list):
            return [self.pack(one) for one in value]
        if isinstance(value, tuple):
            return {"tuple": [self.pack(one) for one in value]}
        if isinstance(value, frozenset):
            return {"set": [self.pack(one) for one in sorted(value)]}
        if isinstance(value, Mapping):
            return {"dict": [[self.pack(key), self.pack(one)] for key, one in value.items()]}
        return {"kind": self._kind(value), "with": {name: self.pack(one) for name, one in _arguments(value).items()}}

    def _kind(self, value: Any) -> str:
        name = type(value).__name__
        if KINDS.get(name) is not type(value):
            raise TypeError(
                f"expected what linearize made, of kinds that a file may name, got a {type(value).__module__}.{name}: pickle it instead"
            )
        return name

    def _put(self, tensor: Tensor) -> int:
        if id(tensor) not in self._seen:
            # The original is kept too, so that no other tensor gets its id.
            self._seen[id(tensor)] = tensor, len(self._tensors)
            self._tensors.append(compact(tensor.detach()))
        return self._seen[id(tensor)][1]


def _arguments(value: Any) -> dict[str, Any]:
    """What makes a value again, by name."""
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    arguments: dict[str, Any] = value.recipe()
    return arguments


def _unpacked(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if "kind" in value:
        return KINDS[value["kind"]](**{name: _unpacked(one, tensors) for name, one in value["with"].items()})
    ((what, content),) = value.items()
    if what == "tensor":
        return tensors[content]
    if what == "array":
        return tensors[content].cpu().numpy()
    inner = [_unpacked(one, tensors) for one in content]
    return {"tuple": tuple, "set": frozenset, "dict": dict}[what](inner)

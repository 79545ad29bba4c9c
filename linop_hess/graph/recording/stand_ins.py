"""Tensors that stand in for a model's own while it runs; attributes are put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress
from operator import is_, is_not
from typing import Any

from torch import Tensor, nn

from linop_hess.autograd.snapshot import Contents, as_a_function, more_than_functions

_CONTAINERS = (dict, list, set)


class StandIns:
    """Other tensors in the places of a model's parameters and buffers, tied ones replaced by one; no backward hooks.

    Other tensors that modules hold as attributes are replaced by copies. As a context, as often as needed: on leaving, modules have all
    that they had before, the attributes that they set while they ran and the lists, dicts and sets that they changed among it. What
    objects of other classes hold is not followed.

    Parameters
    ----------
    contents : Contents
        Of the model.
    others : mapping of int to Tensor
        By the `id` of the parameter or buffer.
    """

    def __init__(self, contents: Contents, others: Mapping[int, Tensor]) -> None:
        modules = list(contents.modules.values())
        self._before = _Attributes(modules)
        self._functions = more_than_functions(modules)
        self._tensors = [place for place in self._before.tensors() if not place[2].requires_grad]  # that are attributes
        self._places = [(*place, others[id(place[2])]) for place in contents.places if id(place[2]) in others]

    def __enter__(self) -> StandIns:
        copies: dict[int, Tensor] = {}
        for attributes, key, value in self._tensors:
            if id(value) not in copies:
                copies[id(value)] = value.detach().clone()
            attributes[key] = copies[id(value)]
        for own, key, _, tensor in self._places:
            own[key] = tensor
        for module in self._functions:
            as_a_function(module)
        return self

    def __exit__(self, *exception: Any) -> None:
        for own, key, tensor in chain(self._tensors, (place[:3] for place in self._places)):
            if key in own:
                own[key] = tensor  # what a model leaves alone is then as it was
        self._before.restore()


class _Dicts:
    """Dicts and what they held, as lists of all: so it is told in few calls that they hold it still."""

    def __init__(self, dicts: Sequence[dict[Any, Any]]) -> None:
        self.dicts, self._sizes = dicts, list(map(len, dicts))
        self._keys, self.values = list(chain.from_iterable(dicts)), list(self._values())
        self._types = list(map(type, self.values))
        self.kinds = set(self._types)

    def containers(self) -> Iterable[Any]:
        """Those among what they held."""
        kinds = {kind for kind in self.kinds if issubclass(kind, _CONTAINERS)}
        return compress(self.values, map(kinds.__contains__, self._types))

    def _values(self) -> Iterable[Any]:
        return chain.from_iterable(map(dict.values, self.dicts))

    def _are_the_same(self) -> bool:
        return (
            list(map(len, self.dicts)) == self._sizes
            and all(map(is_, self._values(), self.values))
            and all(map(is_, chain.from_iterable(self.dicts), self._keys))
        )

    def restore(self) -> None:
        """Put back what they held, in its order."""
        if self._are_the_same():
            return
        end = 0
        for own, size in zip(self.dicts, self._sizes, strict=True):
            part = slice(end, end := end + size)
            _restore_dict(own, dict(zip(self._keys[part], self.values[part], strict=True)))


def _restore_dict(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    same = len(value) == len(before) and all(map(is_, value.values(), before.values()))
    if not same or any(map(is_not, value, before)) and list(value) != list(before):
        value.clear()
        value.update(before)


class _Attributes:
    """Attributes of modules, and the contents of those that are containers."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._dicts: list[_Dicts] = []
        self._contents: list[tuple[Any, Any]] = []  # those of other containers
        self._containers: list[Any] = []  # most of a module's are empty: its hooks
        self._filled: set[int] = set()
        inside: list[Any] = [vars(module) for module in modules]
        while inside:
            dicts = _Dicts([value for value in inside if type(value) is dict])
            others = [(value, _copied(value)) for value in inside if type(value) is not dict]
            self._dicts.append(dicts)
            self._contents += others
            copies = (copy.values() if isinstance(copy, dict) else copy for _, copy in others)
            found = [*dicts.containers(), *(v for v in chain.from_iterable(copies) if isinstance(v, _CONTAINERS))]
            self._containers += found
            inside = list({id(v): v for v in filter(None, found) if id(v) not in self._filled}.values())
            self._filled.update(map(id, inside))

    def tensors(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Those of modules that are tensors: where, their names, and they."""
        own = self._dicts[0]
        kinds = {kind for kind in own.kinds if issubclass(kind, Tensor)}
        return [(of, key, t) for of in own.dicts for key, t in of.items() if type(t) in kinds] if kinds else []

    def restore(self) -> None:
        """Put them back."""
        for value in filter(None, self._containers):
            if id(value) not in self._filled:
                value.clear()
        for dicts in self._dicts:
            dicts.restore()
        for value, before in self._contents:
            if isinstance(value, dict):
                _restore_dict(value, before)
            elif isinstance(value, list):
                if len(value) != len(before) or any(a is not b for a, b in zip(value, before, strict=True)):
                    value[:] = before
            elif value != before:
                value.clear()
                value.update(before)


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else set(value)

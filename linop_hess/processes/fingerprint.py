"""Fingerprints of what all processes must have in common: equal where it is, different, all but surely, where it is not."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

# As many bits as a float64 holds: a maximum over processes is taken of fingerprints beside other numbers.
_BITS = 52


def fingerprint(*values: Any) -> int:
    """A number below 2⁵² of tensors (dtype, shape and every bit), numbers, texts, and tuples, lists and dicts of these.

    Functions and modules are told apart by what they compute, as far as their code, settings and tensors tell; other objects by class.
    """
    hashed = hashlib.blake2b(digest_size=8)
    for value in values:
        _feed(hashed, value)
    return int.from_bytes(hashed.digest(), "big") >> (64 - _BITS)


def of_model(model: nn.Module) -> dict[str, int]:
    """Fingerprints of a model, by name: paths, classes and modes of its modules, its parameters and its buffers."""
    modules = [(path, _name(type(module)), module.training) for path, module in model.named_modules()]
    parameters = {f"parameter {name!r}": fingerprint(tensor) for name, tensor in model.named_parameters()}
    buffers = {f"buffer {name!r}": fingerprint(tensor) for name, tensor in model.named_buffers()}
    return {"model": fingerprint(modules), **parameters, **buffers}


def sketch(X: Tensor) -> tuple[float, float, float]:
    """Two linear functions of the entries of a matrix, and the scale of what two matrices of this size differ by in them.

    Matrices that differ by rounding have sketches that differ by as little; others differ in theirs, all but surely.
    """
    if not X.numel():
        return 0.0, 0.0, 0.0
    sums = X @ _weights(X.shape[1], 0.7548776662, X)
    width = math.isqrt(len(sums) - 1) + 1
    square = functional.pad(sums, (0, -len(sums) % width)).view(-1, width)
    found = [_weights(len(square), a, X) @ (square @ _weights(width, b, X)) for a, b in ((1.32, 2.21), (1.75, 2.62))]
    first, second, norm = torch.nan_to_num(torch.stack([*found, torch.linalg.vector_norm(X)]).double()).tolist()
    return first, second, norm


def _weights(count: int, frequency: float, like: Tensor) -> Tensor:
    numbers = torch.arange(1, count + 1, dtype=torch.float64, device=like.device)
    return (frequency * numbers).cos().to(like.dtype)


def _feed(hashed: Any, value: Any) -> None:
    hashed.update(f"{_name(type(value))}:".encode())
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        hashed.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        if plain.layout == torch.strided and plain.numel():
            hashed.update(cast(Any, plain.reshape(-1).view(torch.uint8).numpy()))
    elif isinstance(value, bool | int | float | complex | str | bytes | torch.dtype) or value is None:
        hashed.update(f"{value!r};".encode())
    elif isinstance(value, Mapping):
        _feed(hashed, [(str(key), item) for key, item in value.items()])
    elif isinstance(value, tuple | list):
        hashed.update(f"{len(value)};".encode())
        for item in value:
            _feed(hashed, item)
    elif isinstance(value, nn.Module):
        _feed_module(hashed, value)
    elif isinstance(value, functools.partial):
        _feed(hashed, [value.func, value.args, value.keywords])
    elif isinstance(value, CodeType):
        _feed(hashed, [value.co_code, value.co_names, [c for c in value.co_consts if not isinstance(c, str)]])
    elif callable(value):
        _feed(hashed, getattr(value, "__qualname__", ""))
        if isinstance(getattr(value, "__code__", None), CodeType):
            _feed(hashed, value.__code__)
            _feed(hashed, [_plain(value.__defaults__), [_plain(cell) for cell in _cells(value)]])


def _feed_module(hashed: Any, module: nn.Module) -> None:
    settings = {
        k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and not k.startswith("_")
    }
    _feed(hashed, [settings, dict(module.state_dict()), [(p, _name(type(m))) for p, m in module.named_modules()]])


def _cells(function: Any) -> list[Any]:
    """What a function refers to outside itself, as far as it is there."""
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return found


def _plain(value: Any) -> Any:
    """Numbers, texts and tensors, also in tuples; of all else nothing."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | Tensor) or value is None else None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"

"""How operators are written: what they are composed of, as a formula.

Compositions are known by the names of their classes and their `args`, since their module imports this one.
"""

from __future__ import annotations

from typing import Any

# How tightly a composition binds: what binds less than the place it stands in is put in brackets.
_ALONE, _SUM, _PRODUCT, _POWER = range(4)

# Longer formulas are cut.
_LONGEST = 200


def described(operator: Any) -> str:
    """Return SciPy's ``<NxM name with dtype=...>``, the name being the formula of what the operator is composed of."""
    rows, columns = operator.shape
    formula = _written(operator, _ALONE)
    formula = formula if len(formula) <= _LONGEST else f"{formula[: _LONGEST - 2]} …"
    return f"<{rows}x{columns} {formula} with dtype={operator.dtype}>"


def _written(operator: Any, place: int) -> str:
    kind = type(operator).__name__
    args: Any = getattr(operator, "args", ())
    if kind == "Sum":
        return _bracketed(_sum(args), _SUM, place)
    if kind == "Product":
        return _bracketed(_product(args), _PRODUCT, place)
    if kind == "Scaled":
        return _bracketed(_multiple(args[1], args[0]), _PRODUCT, place)
    if kind == "Adjoint":
        return f"{_written(args[0], _POWER)}.T"
    if kind == "Identity":
        return "I"
    own = str(getattr(operator, "formula", kind))
    return _bracketed(own, _ALONE if " " in own else _POWER, place)


def _bracketed(formula: str, binds: int, place: int) -> str:
    return f"({formula})" if binds < place else formula


def _multiple(factor: float, operator: Any) -> str:
    return f"-{_written(operator, _PRODUCT)}" if factor == -1.0 else f"{factor:g}·{_written(operator, _POWER)}"


def _sum(terms: Any) -> str:
    """Terms with their signs between them."""
    out = _written(terms[0], _SUM)
    for term in terms[1:]:
        formula = _written(term, _PRODUCT)
        out += f" - {formula[1:]}" if formula.startswith("-") else f" + {formula}"
    return out


def _product(factors: Any) -> str:
    """Factors, equal neighbours as a power."""
    parts: list[tuple[Any, int]] = []
    for factor in factors:
        if parts and parts[-1][0] is factor:
            parts[-1] = factor, parts[-1][1] + 1
        else:
            parts.append((factor, 1))
    written = [_written(factor, _POWER) + (f"**{count}" if count > 1 else "") for factor, count in parts]
    return " @ ".join(written)

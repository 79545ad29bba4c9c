"""What a method is, and what its factors can be asked.

A factorization solves. A congruence H + εI = L D Lᵀ, |det L| = 1, answers everything else too: each question is one line of its halves
L⁻¹ and L⁻ᵀ and of D. Which of them a method's factors answer, the method declares (`Method.answers`), and `lq.inverse` asks the cheapest
that do.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from linop_hess._machine import NEW_FROM, machine
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.pivots.inertia import Inertia, hidden_inertia, inertia_of

EVERYTHING = frozenset({"solve", "inertia", "determinant", "positive", "sample", "entries"})
"""All that factors can be asked."""


@dataclass(frozen=True)
class Cost:
    """Estimate for one factorization.

    Attributes
    ----------
    flops : float
        Floating-point operations.
    nbytes : float
        Peak bytes: factors and work space.
    seconds : float
        Modelled time on this machine; used to compare methods, not to promise.
    why_not : str
        Why the method cannot be used here; empty if it can.
    precision : {"", "single"}
        "single" where a float64 problem is factored in float32; empty: in its own precision.
    iterations : int or None
        Of a method that iterates, how many are expected for a right-hand side.
    at_least : bool
        Whether it takes more than this: it was not looked at further, since others take less.
    certain : float
        Of a method that iterates, the seconds before it does.
    """

    flops: float
    nbytes: float
    seconds: float
    why_not: str = ""
    precision: str = ""
    iterations: int | None = None
    at_least: bool = False
    certain: float = 0.0

    @classmethod
    def impossible(cls, why_not: str) -> Cost:
        """Of a method that cannot be used."""
        return cls(math.inf, math.inf, math.inf, why_not)

    @property
    def in_complex(self) -> Cost:
        """The same in complex arithmetic: four real products for one, of numbers twice as large."""
        return Cost(4.0 * self.flops, 2.0 * self.nbytes, 4.0 * self.seconds, self.why_not)


# Products with a thin matrix: the length from which on they are no faster, and the size below which squares show what a call takes.
_LONG, _SMALLEST = 96.0, 28.0


class Tally:
    """What an algorithm does, added up: flops of kernels at their sizes, calls, bytes moved; and the time that takes on this machine.

    Parameters
    ----------
    dtype : torch.dtype
        Of the arithmetic.

    Attributes
    ----------
    flops : float
    seconds : float
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._machine = machine(dtype)
        self.flops = 0.0
        self.seconds = 0.0

    def kernel(self, name: str, flops: float, size: float) -> None:
        """Add flops of a kernel of `Machine.rates`, on matrices about `size` wide."""
        if flops > 0.0:
            self.flops += flops
            self.seconds += self._machine.seconds(name, flops, size)

    def thin(self, flops: float, thin: float, long: float) -> None:
        """Add flops of products with matrices that are thin and long, which go no faster the longer they are."""
        self.kernel("gemm", flops, max(_SMALLEST, (thin * min(long, max(thin, _LONG))) ** 0.5))

    def calls(self, count: float) -> None:
        """Add small calls of torch, the Python around them included."""
        self.seconds += count * self._machine.call

    def moved(self, nbytes: float) -> None:
        """Add bytes read or written by elementwise work."""
        self.seconds += nbytes * self._machine.byte

    def new(self, *arrays: float) -> None:
        """Add what it takes to have memory for arrays of so many bytes, of those that are large."""
        self.seconds += self._machine.new_byte * sum(nbytes for nbytes in arrays if nbytes >= NEW_FROM)


SOLVES = frozenset({"solve"})
"""What factors at a complex damping answer: there is neither order nor sign."""


class Factorization(Protocol):
    """Factors of H + εI.

    Attributes
    ----------
    method : str
        Name of the method.
    analysis : Analysis
        What was factored.
    damping : float
        ε.
    answers : frozenset of str
        What these factors answer, solves alone where ε is complex, of what `Method.answers` lists.
    precision : torch.dtype
        What they are computed in.
    """

    method: str
    analysis: Analysis

    @property
    def damping(self) -> complex:
        """ε."""

    @property
    def precision(self) -> torch.dtype:
        """What these factors are computed in."""

    @property
    def answers(self) -> frozenset[str]:
        """What these factors answer."""

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g without refinement, g of shape (N, k)."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


class Congruence(ABC):
    """H + εI = L D Lᵀ with |det L| = 1, D = θ and, `hidden` times, ε.

    The halves work on coordinates of shape (M, k): one for each pivot θ and, where there are hidden controls, N more, which hold g⊥, the
    part of the controls that is hidden, by its components in the parameters. A subspace of these N is all that occurs; `project` leads
    into it.

    Attributes
    ----------
    hidden : int
        Number of pivots that are ε by themselves.
    """

    method: str
    analysis: Analysis
    damping: complex
    hidden: int = 0

    @property
    def answers(self) -> frozenset[str]:
        """What these factors answer: everything at a real damping, solves at a complex one."""
        return SOLVES if isinstance(self.damping, complex) else EVERYTHING

    @property
    @abstractmethod
    def theta(self) -> Tensor:
        """θ, shape (N − hidden,)."""

    @property
    @abstractmethod
    def growth(self) -> float:
        """By how much rounding in the factors may move eigenvalues, in terms of max(‖H‖, |ε|): whether a sign is believed."""

    @abstractmethod
    def whiten(self, g: Tensor) -> Tensor:
        """L⁻¹ g: (N, k) to (M, k)."""

    @abstractmethod
    def unwhiten(self, w: Tensor) -> Tensor:
        """L⁻ᵀ w: (M, k) to (N, k)."""

    def project(self, w: Tensor) -> Tensor:
        """Return the coordinates that occur, of any (M, k)."""
        return w

    @property
    def precision(self) -> torch.dtype:
        """What the factors are computed in."""
        return self.analysis.problem.dtype

    @property
    def pivots(self) -> Tensor:
        """D, one for each coordinate, shape (M, 1)."""
        theta = self.theta
        if self.hidden:
            theta = torch.cat([theta, theta.new_full((self.analysis.problem.size,), self.damping)])
        return theta[:, None]

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), without refinement."""
        return self.unwhiten(self.whiten(g) / self.pivots)

    def positive(self, g: Tensor) -> Tensor:
        """L⁻ᵀ|D|⁻¹L⁻¹ g for g of shape (N, k): symmetric positive definite, (H + εI)⁻¹ where that is."""
        return self.unwhiten(self.whiten(g) / self.pivots.abs())

    @property
    def noise(self) -> int:
        """Size M of the white noise that `color` takes."""
        return self.theta.numel() + (self.analysis.problem.size if self.hidden else 0)

    def color(self, xi: Tensor) -> Tensor:
        """L⁻ᵀ D^(−½) ξ for ξ of shape (M, k), of covariance (H + εI)⁻¹ where ξ is white; D must be positive."""
        return self.unwhiten(self.project(xi / self.pivots.sqrt()))

    def inertia(self, zero_below: float) -> Inertia:
        """Count the signs of D, those of size up to `zero_below` as zero."""
        return inertia_of([self.theta], zero_below) + hidden_inertia(self.hidden, self.damping.real)

    def logabsdet(self) -> float:
        """Logarithm of |det(H + εI)|."""
        of_hidden = self.hidden * math.log(abs(self.damping)) if self.hidden else 0.0
        return math.fsum(self.theta.double().abs().log().tolist()) + of_hidden

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""


Factor = Callable[..., Factorization]
"""What makes a factorization: an analysis and a damping, complex where `Method.is_complex`."""


class Watching(Protocol):
    """What follows a solve by GMRES, and may replace the factors meanwhile.

    Attributes
    ----------
    factors : Factorization
        To go on with.
    """

    factors: Any

    def begin(self, columns: int) -> None:
        """Be told that so many right-hand sides are iterated together from here on."""

    def after(self, left: float) -> None:
        """Be told, after an iteration, that residuals are e^left times what they may be."""


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes
    ----------
    name : str
    factor : callable
        ``factor(analysis, damping)`` gives the factorization.
    estimate : callable or None
        ``estimate(analysis)`` gives its `Cost`, at any damping; None of a method that iterates.
    answers : frozenset of str
        What its factors may answer, of `EVERYTHING`; what they do answer they say themselves.
    is_automatic : bool
        Whether ``method="auto"`` may choose it.
    is_complex : bool
        Whether it factors at complex dampings too; its factors then answer solves alone.
    of_matrix : bool
        Whether it needs H alone, and no stages.
    single : Method or None
        The same with factors in float32 for problems in float64.
    forecast : callable or None
        Of a method that iterates: ``forecast(analysis, asked, worth)`` gives its `Cost` for what is asked; it need not look further where
        the cost exceeds `worth` seconds.
    definite : callable or None
        Of a method that takes less where H + εI is positive definite: ``definite(analysis, cost)`` gives that, from its estimate.
    first : callable or None
        What solves try before `factor`: faster, for solves alone, and not as good where it loses too many digits.
    watch : callable or None
        Of a method that iterates and can change its factors meanwhile: ``watch(factors)`` is told how far a solve is.
    """

    name: str
    factor: Factor
    estimate: Callable[[Analysis], Cost] | None
    answers: frozenset[str]
    is_automatic: bool = True
    is_complex: bool = False
    of_matrix: bool = False
    single: Method | None = None
    forecast: Callable[[Analysis, Any, float], Cost] | None = None
    definite: Callable[[Analysis, Cost], Cost] | None = None
    first: Factor | None = None
    watch: Callable[[Any], Watching] | None = None

    @property
    def exact(self) -> bool:
        """Whether its factors are those of H + εI; if not, solves are left to GMRES with them."""
        return self.estimate is not None

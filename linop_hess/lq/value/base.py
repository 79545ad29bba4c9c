"""What every representation of a cost-to-go can do.

The cost-to-go of a state δ is all that follows it, with the controls that follow chosen best: ½ δᵀVδ, V symmetric and in general
indefinite. The backward recursion of `lq.methods.riccati` asks four things of it, and nothing else; how V is kept is its own affair.
"""

from __future__ import annotations

from typing import Protocol, Self

from torch import Tensor

from linop_hess.lq.pivots.delayed import Elimination
from linop_hess.lq.pivots.hidden import Hidden
from linop_hess.lq.stages.base import Stage


class Control(Protocol):
    """The controls of one segment at one damping, as a cost-to-go sees them: δ⁺ = F δ + R s, the hidden controls eliminated."""

    @property
    def r(self) -> int:
        """Number of visible controls s."""

    @property
    def n_in(self) -> int:
        """Size of the state before."""

    @property
    def n_out(self) -> int:
        """Size of the state right after."""

    def congruence(self, V: Tensor, over: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """S = QᵀAQ + εI + RᵀVR, E = QᵀB + RᵀVF and FᵀVF + C less the hidden controls, the last in memory that nothing else holds.

        That may be the memory of V where V may be written `over`.
        """

    def pull_back(self, V: Tensor) -> Tensor:
        """The last of these alone."""

    def adjoint(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(Rᵀ y, Fᵀ y) for y of shape (n_out, k)."""

    def forward(self, s: Tensor, d: Tensor) -> Tensor:
        """F δ + R s."""


class ValueFunction(Protocol):
    """½ δᵀVδ of a state δ."""

    def pull_back(self, stage: Stage) -> Self:
        """Take it back through a stage without controls: FᵀVF + C."""

    def pivot(self, control: Control) -> tuple[Tensor, Tensor, Self]:
        """Take it back through a stage with controls: ½ sᵀSs + sᵀEδ + the value of δ at s = 0, as (S, E, value)."""

    def downdate(self, elimination: Elimination, hidden: Hidden) -> Self:
        """Take off what the best s gains: V − EᵀS⁻¹E; directions that were delayed, hidden ones too, are carried along."""

    def compress(self) -> Self:
        """Make it smaller, where it is an approximation; itself where it is exact."""

    def __matmul__(self, d: Tensor) -> Tensor:
        """V δ."""

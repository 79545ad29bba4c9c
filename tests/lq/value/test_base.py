"""What the recursion asks of a cost-to-go, and nothing else: a value kept in another way gives the same factors."""

from dataclasses import dataclass

import pytest
import torch

from linop_hess.lq.methods.riccati import divided, recursion
from linop_hess.lq.pivots.rules import BoundedGrowth
from linop_hess.lq.value.base import Control, ValueFunction
from linop_hess.lq.value.controls import segments_at
from linop_hess.lq.value.dense import DenseValue
from tests.lq.methods.conformance import MIXED, SHAPES, setting


@dataclass(frozen=True)
class Halved:
    """A value kept as two summands, which offers the four things and no attribute of the dense one."""

    first: torch.Tensor
    second: torch.Tensor

    @property
    def inner(self) -> DenseValue:
        return DenseValue(self.first + self.second)

    @classmethod
    def of(cls, value: DenseValue):
        assert value.Y is None
        return cls(value.V / 4, 3 * value.V / 4)

    def pull_back(self, stage):
        return self.of(self.inner.pull_back(stage))

    def pivot(self, control: Control):
        S, E, value = self.inner.pivot(control)
        return S, E, self.of(value)

    def downdate(self, elimination, hidden):
        return self.of(self.inner.downdate(elimination, hidden))

    def compress(self):
        return self

    def __matmul__(self, d):
        return self.first @ d + self.second @ d


@pytest.mark.parametrize("shape", [*SHAPES, *MIXED])
def test_any_representation_will_do(shape):
    truth = setting(shape)
    n = int(truth.problem.layout.n_out[-1])
    zero, rule = torch.zeros(n, n).double(), BoundedGrowth(1e12)
    segments = segments_at(truth.analysis, 0.4, rule.coupling_up_to(0.4))
    values: list[ValueFunction] = [DenseValue(zero.clone()), Halved(zero, zero)]
    ours, theirs = (recursion(segments, value, divided(rule)) for value in values)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.delayed == other.delayed == 0
        scale = float(mine.elimination.theta.abs().max()) if mine.elimination.theta.numel() else 1.0
        torch.testing.assert_close(
            mine.elimination.theta.sort().values, other.elimination.theta.sort().values, rtol=0, atol=1e-9 * scale
        )


def test_products():
    value, d = DenseValue(torch.eye(3).double()), torch.ones(3, 1).double()
    torch.testing.assert_close(Halved.of(value) @ d, value @ d)

"""How a trial point is bettered: the search among dampings and longer steps, against trying them all."""

import pytest
import torch
from torch import nn

from linop_hess.optim import Fixed, SaddleFree, Searched
from linop_hess.optim.damping import Damping
from linop_hess.optim.trials import Trial, searched
from tests.optim.problems import chain, dense_hessian

CE = nn.CrossEntropyLoss()


class Nowhere:
    def at(self, step):
        self.step = step


@pytest.mark.parametrize("lowest", [-6, -1, 0, 2, 7])
def test_the_search_ends_at_a_minimum_among_the_dampings_a_factor_apart(lowest):
    damping, point, most = Searched(1.0, factor=2.0), Nowhere(), 20

    def again():
        k = round(float(torch.log2(torch.tensor(damping.value))))
        return torch.tensor([float(k)]), (k - lowest) ** 2 + 1.0, 0.5, ""

    found = searched(again, point, damping, Trial(torch.zeros(1), lowest**2 + 1.0, 0.5), most)
    assert damping.value == 2.0**lowest and found.loss == 1.0 and float(point.step) == lowest


def test_a_search_is_limited_and_refused_points_end_it():
    damping, point = Searched(1.0), Nowhere()
    falling = iter(range(100))
    found = searched(
        lambda: (torch.ones(1), -float(next(falling)), 0.5, ""), point, damping, Trial(torch.zeros(1), 1.0, 0.5), 4
    )
    assert found.loss == -3.0 and damping.value == pytest.approx(3.0**-4)
    damping = Searched(1.0)
    kept = searched(lambda: (torch.ones(1), 0.0, 0.5, "no"), point, damping, Trial(torch.zeros(1), 1.0, 0.5), 9)
    assert kept.loss == 1.0 and damping.value == 1.0


def test_a_step_of_saddle_free_is_the_best_of_its_neighbours_and_takes_one_factorization():
    model, x, y = chain()
    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    H = torch.as_tensor(dense_hessian(model, CE, x, y))
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(CE(model(x), y), list(model.parameters()))])
    values, vectors = torch.linalg.eigh(H)
    assert float(values[0]) < -1e-2 * float(values[-1])

    def loss_at(damping):
        with torch.no_grad():
            s = -vectors @ ((vectors.T @ g) / (values.abs() + damping))
            nn.utils.vector_to_parameters(start + s, model.parameters())
            return float(CE(model(x), y))

    rational = SaddleFree(chain()[0], CE, method="rational", extrapolate=False)
    rational.step(x, y)
    assert rational.last.factorizations == 1 and rational.last.trials > 2 and rational.last.backward_error <= 1e-10
    opt = SaddleFree(model, CE, method="lanczos", products=len(g), extrapolate=False)  # whose space is whole
    opt.step(x, y)
    record, best = opt.last, opt.last.new_loss
    assert best == pytest.approx(loss_at(record.damping), rel=1e-6)
    assert best <= min(loss_at(record.damping / 3), loss_at(record.damping * 3)) * (1 + 1e-6)


def test_states_and_bad_factors():
    damping = Searched(2.0)
    damping.refused()
    assert damping.value == 18.0
    other = Searched()
    other.load_state_dict(damping.state_dict())
    assert other.value == 18.0
    with pytest.raises(KeyError):
        Fixed(1.0).load_state_dict(damping.state_dict())
    with pytest.raises(ValueError, match="factor above 1"):
        Searched(factor=1.0)
    assert Damping.factor is None and Fixed(1.0).factor is None

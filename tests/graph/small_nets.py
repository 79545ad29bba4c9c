"""Small networks put together by a function, their data, and how dense matrices are compared."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

CE = nn.CrossEntropyLoss(reduction="sum")
LINEAR = nn.Linear


class Net(nn.Module):
    """Some layers, and a function that says how they are put together."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def prepared(model: nn.Module, *shape: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Orthogonal weights of gain 1.5, and data: kinks are met, and the Hessian is not negligible."""
    torch.manual_seed(1)
    model = model.double()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.orthogonal_(parameter, 1.5)
        elif "weight" not in name:
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(shape, dtype=torch.float64)
    return model, (x, torch.randint(3, shape[:1]))


def dense(operator) -> np.ndarray:
    return operator @ np.eye(operator.shape[0])


def gap(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def residual(activation: Callable[[Tensor], Tensor]) -> Net:
    return Net(lambda s, x: s.c(x + s.b(activation(s.a(x)))), a=LINEAR(4, 6), b=LINEAR(6, 4), c=LINEAR(4, 3))

"""Swap Adam for a saddle-free Newton in three lines: a deep narrow network that first-order methods do not fit.

python examples/swap_adam.py            # digits, 16 layers of 8, batch 32: about a minute
python examples/swap_adam.py --small    # as the test suite runs it
"""

import argparse
import time

import torch
from torch import nn

import linop_hess as lh


def network(depth, width, inputs, classes):
    layers, size = [], inputs
    for _ in range(depth):
        layers += [nn.Linear(size, width), nn.Tanh()]
        size = width
    model = nn.Sequential(*layers, nn.Linear(size, classes)).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=5 / 3 / layer.in_features**0.5)
            nn.init.zeros_(layer.bias)
    return model


def batch_of(small):
    """Inputs and classes: digits of scikit-learn, or random ones."""
    if small:
        return torch.randn(8, 6).double(), torch.randint(3, (8,))
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    chosen = torch.randperm(len(x))[:32]
    x = torch.tensor(x)[chosen] / 16
    return (x - x.mean()) / x.std(), torch.tensor(y)[chosen]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    depth, width, seconds, goal = (4, 4, 3.0, 1e-6) if small else (16, 8, 25.0, 1e-12)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, y = batch_of(small)
    loss_fn = nn.CrossEntropyLoss()
    classes = int(y.max()) + 1

    def adam(model):
        opt = torch.optim.Adam(model.parameters(), lr=3e-3)

        def step():
            opt.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            opt.step()
            return loss.item()

        return step

    def ours(model):
        opt = lh.optim.SaddleFree(model, loss_fn)  # instead of torch.optim.Adam(model.parameters())
        return lambda: opt.step(x, y)  # instead of zero_grad, backward and step

    for name, make in (("Adam", adam), ("SaddleFree", ours)):
        torch.manual_seed(1)
        step = make(network(depth, width, x.shape[1], classes))
        start, count, loss = time.perf_counter(), 0, float("inf")
        while time.perf_counter() - start < seconds and not loss < goal:
            loss = step()
            count += 1
        print(f"{name:<12}loss {loss:.1e} after {count} steps, {time.perf_counter() - start:.1f} s")
    assert loss < goal, "SaddleFree fits it"


if __name__ == "__main__":
    main()

"""torch's default device and dtype, set by the user, change nothing: same bits as without."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from tests.autograd.settings import mlp_and_batch
from tests.graph.case import Case
from tests.graph.zoo import CASES
from tests.test_architecture import MODULES, name_of, tree_of

DEFAULTS = [("meta", torch.bfloat16), ("cpu", torch.float16), ("cpu", torch.float64)]
# Structures that differ from others in no operation but in how the same ones are connected.
VARIANTS = {
    "branches", "causal_attention", "chain_mlp", "cross_attention", "densenet", "gru_bidirectional", "gru_by_hand", "gru_cell",
    "highway", "lora_merged", "lstm_cell", "residual_pre_norm", "residual_two_layer", "resnet_relu", "tied_autoencoder",
    "transformer_encoder_train", "transformer_layer_pre_norm", "two_towers", "unet",
}  # fmt: skip

# Calls that make a tensor on the default device where none is said; the second ones take their dtype from what they are given.
MAKERS = {
    "zeros",
    "ones",
    "eye",
    "full",
    "empty",
    "empty_strided",
    "rand",
    "randn",
    "linspace",
    "logspace",
    "scalar_tensor",
}
WHOLE = {"arange", "randint", "randperm", "tril_indices", "triu_indices", "tensor", "as_tensor", "asarray"}


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


# The commands are processes of their own, in which nobody sets defaults.
@pytest.mark.parametrize("path", [m for m in MODULES if not name_of(m).startswith("cli")], ids=name_of)
def test_every_tensor_is_made_on_a_device_in_a_dtype(path):
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
            continue
        kind, given = ast.unparse(node.func).removeprefix("torch."), {keyword.arg for keyword in node.keywords}
        wanted = {"device", "dtype"} if kind in MAKERS else {"device"} if kind in WHOLE else set()
        assert wanted <= given, f"{path.name}:{node.lineno}: {ast.unparse(node)} without {', '.join(wanted - given)}"


def answers(model, loss_fn, x, y, methods) -> dict[str, object]:
    """All that can be asked, as arrays and numbers."""
    lin = lh.linearize(model, loss_fn, x, y)
    n = lin.H.shape[0]
    g, block = np.linspace(-1, 1, n), np.eye(n)[:, :3]
    found = {
        "loss": lin.loss,
        "gradient": lin.gradient,
        "H": lh.to_dense(lin.H),
        "Gauss-Newton": lh.to_dense(lin.gauss_newton()),
        "augmented": lh.to_dense(lin.augmented(0.3)),
        "permuted": lh.to_dense(lin.block_tridiagonal(0.3)),
        "verify": lin.verify(),
        "inertia": lin.inertia(0.2),
        "count": lin.count_eigenvalues(-0.1, 0.1),
        "convex": lin.smallest_convex_damping(),
        "extremes": lin.extreme_eigenvalues(),
        "condition": lin.condition_number(0.2),
        "eigenvalues": lh.spectrum.eigsh(lin, 3).values,
        "density": lh.spectrum.density(lin).counts,
        "woodbury": lin.gauss_newton().inverse(0.2, "woodbury") @ block,
        "minres": lh.krylov.run("minres", lin.damped(0.2), lin.gradient).x,
        "direct": lh.krylov.direct(lin.inverse(0.2).matvec, lin.damped(0.2), lin.gradient).x,
    }
    for piece in ("M", "M_inv", "P", "D_x", "DD_xx", "DD_zx", "DM_xz", "DM_zz"):
        found[piece] = lh.to_dense(getattr(lin, piece))
    for method in methods:
        inverse = lin.inverse(0.2, method)
        found[method] = inverse @ block
        found[f"{method} solve"] = inverse.solve(g).x
        if method in ("riccati", "dense"):
            found[f"{method} inertia"] = inverse.inertia()
            found[f"{method} log det"] = inverse.slogdet()
            found[f"{method} positive"] = inverse.positive() @ block
        convex = lin.inverse(lin.smallest_convex_damping() + 1.0, method)
        if method in ("riccati", "dense"):
            found[f"{method} sample"] = convex.sample(2, torch.Generator("cpu").manual_seed(0))
            found[f"{method} form"] = convex.quadratic_form(g)
        found[f"{method} diagonal"] = convex.diagonal()
        for name, one in convex.block_diagonal().items():
            found[f"{method} {name}"] = one
    for kind in (lh.Hessian, lh.GaussNewton):
        found[kind.__name__] = lh.to_dense(kind(model, loss_fn, [(x, y), (x[:2], y[:2])]))
    found["smooth"] = lh.to_dense(lh.Hessian(model, loss_fn, (x, y), nonsmooth="smooth"))
    found["finite"] = lh.to_dense(lh.Hessian(model, loss_fn, (x, y), differentiation="finite"))
    return found


METHODS = ("auto", "riccati", "banded", "dense", "ldu")


@cache
def answers_without_defaults() -> dict[str, object]:
    model, (x, y) = mlp_and_batch()
    return answers(model, nn.CrossEntropyLoss(), x, y, METHODS)


def alike(one: object, other: object) -> bool:
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other


@pytest.mark.parametrize(("device", "dtype"), DEFAULTS, ids=str)
def test_every_question_is_answered_alike(device, dtype):
    (model, (x, y)), truth = mlp_and_batch(), answers_without_defaults()
    with defaults(device, dtype):
        found = answers(model, nn.CrossEntropyLoss(), x, y, METHODS)
    assert found.keys() == truth.keys()
    assert [key for key in truth if not alike(found[key], truth[key])] == []


def linearized(case: Case) -> list[object]:
    lin = lh.linearize(case.model, case.loss_fn, case.inputs, case.targets, params=case.params)
    return [lin.loss, lin.gradient, lin.H @ lin.gradient, lin.inverse(0.1) @ lin.gradient]


@pytest.mark.parametrize("name", sorted(CASES.keys() - VARIANTS)[::2])
def test_structures_are_linearized_alike(name):
    case = CASES[name](3)
    truth = linearized(case)
    with defaults("meta", torch.float16):
        found = linearized(case)
    assert all(alike(a, b) for a, b in zip(found, truth, strict=True))

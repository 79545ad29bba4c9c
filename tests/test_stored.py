"""Files and pickles: what is read is what was written, to the bit, is no larger than it says, and brings no code."""

import json
import pickle
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess import stored
from linop_hess.cli.models import FAMILIES
from linop_hess.cli.networks import digits_problem
from linop_hess.lq.stages.base import Stage


@cache
def linearization(model):
    long = model == "gru"  # eight rows of pixels in both directions, a stage each
    p = digits_problem(depth=1 if long else 2, width=3 if long else 4, batch=3, train_steps=3, model=model)
    return lh.linearize(p.model, p.loss_fn, p.inputs, p.targets)


def same(again, lin):
    g = lin.gradient
    assert (again.names, again.loss, again.problem.order.tolist()) == (lin.names, lin.loss, lin.problem.order.tolist())
    np.testing.assert_array_equal(again.gradient, g)
    np.testing.assert_array_equal(again.H @ g, lin.H @ g)
    np.testing.assert_array_equal(again.gauss_newton() @ g, lin.gauss_newton() @ g)
    np.testing.assert_array_equal(again.inverse(0.1) @ g, lin.inverse(0.1) @ g)
    assert str(again.stages) == str(lin.stages)
    assert str(again.plan().cuts) == str(lin.plan().cuts) and again.plan().shared == lin.plan().shared


@pytest.mark.parametrize("model", FAMILIES)
def test_a_file_gives_back_all_but_the_model(model, tmp_path):
    lin = linearization(model)
    lin.save(tmp_path / "file")
    again = lh.load(tmp_path / "file")
    same(again, lin)
    again.save(tmp_path / "again")
    same(lh.load(tmp_path / "again", device="cpu"), lin)
    with pytest.raises(RuntimeError, match="without its model"):
        again.verify()


@pytest.mark.parametrize("model", FAMILIES)
def test_a_file_is_tensors_and_text(model, tmp_path):
    linearization(model).save(tmp_path / "file")
    content = torch.load(tmp_path / "file", weights_only=True)
    assert set(content) == {"structure", "tensors"}
    assert json.loads(content["structure"])["format"] == stored.FORMAT
    assert all(type(tensor) is torch.Tensor for tensor in content["tensors"])


@pytest.mark.parametrize("model", FAMILIES)
def test_files_and_pickles_are_as_large_as_the_stages_say(model, tmp_path):
    """The numbers are those of the stages and the gradient; beside them there are only indices, and a name for each thing."""
    lin = linearization(model)
    lin.extreme_eigenvalues()  # fills the caches
    inverse = lin.inverse(0.1)
    lin.save(tmp_path / "file")
    tensors = torch.load(tmp_path / "file", weights_only=True)["tensors"]
    numbers = sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
    assert numbers <= lin.problem.nbytes + lin.gradient.nbytes
    largest = sum(tensor.nbytes for tensor in tensors) + 700 * len(tensors) + 100 * lin.problem.length + 5_000
    for one in (lin.H, lin.M_inv, inverse, inverse.positive()):
        assert len(pickle.dumps(one)) <= largest
        x = np.ones(one.shape[1])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(one)) @ x, one @ x)
    assert len(pickle.dumps(lin)) <= largest and (tmp_path / "file").stat().st_size <= largest
    same(pickle.loads(pickle.dumps(lin)), lin)


def test_every_kind_of_stage_has_a_place():
    def below(kind):
        return {kind, *(k for sub in kind.__subclasses__() for k in below(sub))}

    ours = {k for k in below(Stage) if k.__module__.startswith("linop_hess.") and not k.__abstractmethods__}
    assert not [k.__name__ for k in ours if not k.__name__.startswith("_") and stored.KINDS.get(k.__name__) is not k]


def test_what_is_no_such_file_is_refused(tmp_path):
    path = tmp_path / "file"
    lin = linearization("mlp")
    lin.save(path)
    structure, tensors = torch.load(path, weights_only=True).values()
    cases = {
        "which is none": lambda: path.write_bytes(b"nothing"),
        "none .UnpicklingError": lambda: path.write_bytes(pickle.dumps(lin.gradient)),
        "none .KeyError": lambda: torch.save({"weight": torch.ones(2)}, path),
        "of format 9, which another": lambda: torch.save(
            {"structure": '{"format": 9, "chain": 0}', "tensors": []}, path
        ),
        "something else .IndexError": lambda: torch.save({"structure": structure, "tensors": tensors[:3]}, path),
        "something else .KeyError: 'system'": lambda: torch.save(
            {"structure": '{"format": 1, "chain": {"kind": "system", "with": {}}}', "tensors": []}, path
        ),
        "got list": lambda: torch.save({"structure": '{"format": 1, "chain": []}', "tensors": []}, path),
    }
    for words, make in cases.items():
        make()
        with pytest.raises(ValueError, match=words):
            lh.load(path)
    with pytest.raises(FileNotFoundError):
        lh.load(tmp_path / "none")


def test_a_stage_of_ones_own_is_refused(tmp_path):
    class Own(type(linearization("mlp").problem.blocks[0])):
        pass

    lin = lh.linearize(
        nn.Linear(2, 1).double(), nn.functional.mse_loss, torch.ones(2, 2).double(), torch.zeros(2, 1).double()
    )
    chain = lin._chain
    first = next(k for k, b in enumerate(chain.problem.blocks) if isinstance(b, Own.__mro__[1]))
    blocks = list(chain.problem.blocks)
    blocks[first] = Own(**{n: getattr(blocks[first], n) for n in Own.__dataclass_fields__})
    changed = lh.Linearization(replace(chain, problem=chain.problem.with_curvature(blocks)))
    with pytest.raises(TypeError, match="test_stored.Own: pickle it instead"):
        changed.save(tmp_path / "file")

"""What all threads of a process share is as it was, whatever runs in how many threads."""

import copy
import gc
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.backends import cuda
from torch.nn import functional as f
from torch.nn.attention import SDPBackend, sdpa_kernel

import linop_hess as lh
from tests.autograd.settings import Recurrent, mlp_and_batch, worst
from tests.helpers import make_batch, oracle_hessian


class Heads(nn.Module):
    """Attention among three tokens made of each input, as a function gives it."""

    def __init__(self, attention, heads: int = 2) -> None:
        super().__init__()
        self.attention, self.heads = attention, heads
        self.embed, self.head = nn.Linear(4, 12), nn.Linear(12, 3)
        nn.init.orthogonal_(self.embed.weight, 1.5)

    def forward(self, x):
        tokens = self.embed(x).reshape(len(x), 3, 1, 4).transpose(1, 2)
        tokens = tokens * torch.arange(1.0, self.heads + 1, dtype=x.dtype, device=x.device).view(-1, 1, 1)
        out = self.attention(tokens, tokens.sin(), tokens.cos())
        return self.head(out.mean(1).reshape(len(x), 12))


class MultiHead(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.layer, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.options = options

    def forward(self, x):
        tokens = x[:, None] * torch.arange(1.0, 4.0, dtype=x.dtype, device=x.device)[:, None]
        return self.head(self.layer(tokens, tokens.sin(), tokens.cos(), **self.options)[0].mean(1))


MASK = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])
# Before torch 2.5 a single head of keys is broadcast.
GROUPED = {"enable_gqa": True} if "enable_gqa" in (f.scaled_dot_product_attention.__doc__ or "") else {}
ATTENTIONS = {
    "plain": lambda q, k, v: f.scaled_dot_product_attention(q, k, v),
    "causal": lambda q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True),
    "mask of truths": lambda q, k, v: f.scaled_dot_product_attention(q, k, v, MASK),
    "mask of numbers": lambda q, k, v: f.scaled_dot_product_attention(q, k, v, attn_mask=MASK.to(q) - 1.0, scale=0.7),
    "grouped": lambda q, k, v: f.scaled_dot_product_attention(q, k[:, :1], v[:, :1], **GROUPED),
    "of aten": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v),
    "of aten, overload": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v),
    "over an axis": lambda q, k, v: torch.vmap(f.scaled_dot_product_attention)(q, k, v),
}
MODELS = {
    **{name: lambda attention=attention: Heads(attention) for name, attention in ATTENTIONS.items()},
    "multi-head": MultiHead,
    "multi-head without weights": lambda: MultiHead(need_weights=False),
    "multi-head, causal": lambda: MultiHead(need_weights=False, is_causal=True, attn_mask=~MASK),
    "layer": lambda: nn.Sequential(
        nn.Linear(4, 12),
        nn.Unflatten(1, (3, 4)),
        nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
}
SETTERS = ("_set_sdp_use_flash", "_set_sdp_use_mem_efficient", "_set_sdp_use_math", "_set_mkldnn_enabled")


@pytest.mark.parametrize("name", MODELS)
def test_attention_has_second_derivatives_and_no_switch_is_touched(name, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    x, y = make_batch(4, 3, 5)
    with sdpa_kernel(SDPBackend.MATH):
        truth = oracle_hessian(model, f.cross_entropy, x, y)
    touched = []
    for setter in SETTERS:
        monkeypatch.setattr(torch._C, setter, lambda *a, s=setter: touched.append(s))
    for default in ("cpu", "meta"):  # a default device is a mode further out
        with torch.device(default):
            H = lh.Hessian(model, f.cross_entropy, (x, y))
            lin = lh.linearize(model, f.cross_entropy, x, y)
            assert worst(H, truth) <= 1e-14
            assert worst(lin.H, truth) <= 1e-14
            assert lin.verify() <= 1e-13
    assert touched == []


def switches() -> tuple[bool, ...]:
    return (
        torch.backends.mkldnn.enabled,
        gc.isenabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )


def overlapping(work) -> None:
    """Do work(loss_fn) in two threads: the second begins while the first is in its loss, and ends after it."""
    begun, second_begun, first_ended = (threading.Event() for _ in range(3))

    def first(output, target):
        begun.set()
        assert second_begun.wait(20)
        return f.cross_entropy(output, target)

    def second(output, target):
        second_begun.set()
        assert first_ended.wait(20)
        return f.cross_entropy(output, target)

    one = threading.Thread(target=lambda: (work(first), first_ended.set()))
    other = threading.Thread(target=lambda: (begun.wait(20), work(second)))
    one.start(), other.start(), one.join(), other.join()
    assert first_ended.is_set()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["linearize", "Hessian"])
def test_calls_that_overlap_leave_all_switches_as_they_were(kind, fused):
    torch.manual_seed(0)
    model, (x, y) = Recurrent(), make_batch(4, 3, 5, dtype=torch.float32)
    found = []

    def work(loss_fn):
        mine = copy.deepcopy(model)
        H = lh.linearize(mine, loss_fn, x, y).H if kind == "linearize" else lh.Hessian(mine, loss_fn, (x, y))
        found.append(lh.to_dense(H))

    was = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(fused)
    try:
        before, generators = switches(), (torch.get_rng_state(), np.random.get_state()[1].copy())
        overlapping(work)
        after = switches()
    finally:
        torch._C._set_mkldnn_enabled(was)
    assert after == before
    assert torch.equal(torch.get_rng_state(), generators[0]) and (np.random.get_state()[1] == generators[1]).all()
    assert len(found) == 2
    truth = oracle_hessian(model.double(), f.cross_entropy, x.double(), y)
    for H in found:
        assert np.abs(H - truth).max() <= 1e-6 * np.abs(truth).max()


def test_random_states_are_put_back_by_the_last_of_two_threads():
    model, (x, y) = mlp_and_batch()

    def drawing(loss_fn):
        def loss(output, target):
            state = torch.get_rng_state()
            torch.rand(3)
            value = loss_fn(output, target)
            torch.rand(len(state) % 7)
            return value

        lh.linearize(copy.deepcopy(model), loss, x, y)  # one model is linearized by one thread at a time

    before = torch.get_rng_state()
    overlapping(drawing)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_that_multiply_change_nothing():
    torch.manual_seed(0)
    model, (x, y) = Recurrent(), make_batch(4, 3, 5, dtype=torch.float32)
    H = lh.Hessian(model, f.cross_entropy, (x, y), retain_graph=False)
    v = np.ones(H.shape[0], dtype=np.float32)
    truth, before, found = H @ v, switches(), []
    threads = [threading.Thread(target=lambda: found.extend(H @ v for _ in range(10))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert switches() == before
    assert len(found) == 40 and all(np.array_equal(one, truth) for one in found)

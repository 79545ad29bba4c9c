"""The zoo: small models of every structure that `lh.linearize` must take, exactly.

`CASES[name](samples)` makes a case in float64, the same one each time. Parameters are drawn with a gain above that of torch's
defaults, norms' weights and biases included, so that Hessians are indefinite and not negligible.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.nn.utils import parametrize

from tests.graph import zoo_layers as layers
from tests.graph import zoo_structures as structures
from tests.graph.case import Case, classifier, drawn, labels, mlp, normal

CASES: dict[str, Callable[[int], Case]] = {}


def case(build: Callable[[int], Case]) -> Callable[[int], Case]:
    """Register a builder by its name, with a seed of its own, and no effect on torch's generator."""

    def seeded(samples: int) -> Case:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # nn.utils.weight_norm is deprecated, and still used
            torch.manual_seed(zlib.crc32(build.__name__.encode()))
            return replace(build(samples), name=build.__name__)

    CASES[build.__name__] = seeded
    return seeded


# Plain chains.


@case
def chain_mlp(samples: int) -> Case:
    return classifier(mlp(3, 5, 4, 3), normal(samples, 3), samples, 20 + 24 + 15)


@case
def chain_convolutional(samples: int) -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 2, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return classifier(model, normal(samples, 1, 4, 4), samples, 30 + 56 + 27, "ReLU in place, max pooling", gain=2.0)


@case
def chain_embedding(samples: int) -> Case:
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(9, 4), nn.GELU(), nn.Linear(4, 3))
    return classifier(model, labels(samples, 3, classes=6), samples, 18 + 40 + 15, "integer inputs")


# Residual networks, dense connections, gates.


@case
def residual_pre_norm(samples: int) -> Case:
    model = nn.Sequential(nn.Linear(3, 4), *(layers.PreNorm(4, 3) for _ in range(3)), nn.Linear(4, 3))
    return classifier(model, normal(samples, 3), samples, 16 + 3 * (8 + 15 + 16) + 15)


@case
def residual_post_norm(samples: int) -> Case:
    model = nn.Sequential(nn.Linear(3, 4), *(layers.PostNorm(4) for _ in range(3)), nn.Linear(4, 3))
    return classifier(model, normal(samples, 3), samples, 16 + 3 * (8 + 20) + 15)


@case
def residual_two_layer(samples: int) -> Case:
    model = nn.Sequential(nn.Linear(3, 4), *(layers.TwoLayer(4, 3) for _ in range(3)), nn.Linear(4, 3))
    return classifier(model, normal(samples, 3), samples, 16 + 3 * (15 + 16) + 15)


@case
def residual_rms_swiglu(samples: int) -> Case:
    model = nn.Sequential(nn.Linear(3, 4), layers.SwiGLU(4, 3), layers.SwiGLU(4, 3), nn.Linear(4, 3))
    return classifier(
        model, normal(samples, 3), samples, 16 + 2 * (4 + 36) + 15, "RMS norm from its formula, gated units"
    )


@case
def resnet_group_norm(samples: int) -> Case:
    model = layers.ResNet(lambda channels: nn.GroupNorm(2, channels))
    return classifier(model, normal(samples, 1, 8, 8), samples, 20 + 80 + 248 + 15)


@case
def resnet_batch_norm_eval(samples: int) -> Case:
    model = layers.ResNet(nn.BatchNorm2d)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return classifier(model.eval(), normal(samples, 1, 8, 8), samples, 20 + 80 + 248 + 15)


@case
def resnet_relu(samples: int) -> Case:
    model = layers.ResNet(lambda channels: nn.GroupNorm(2, channels), f.relu)
    return classifier(model, normal(samples, 1, 8, 8), samples, 20 + 80 + 248 + 15, "kinks")


@case
def batch_norm_of_the_batch(samples: int) -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Softplus(), nn.Flatten(), nn.Linear(12, 3)
    )
    return classifier(model, normal(samples, 1, 4, 4), samples, 30 + 6 + 39, "samples interact through the norm")


@case
def highway(samples: int) -> Case:
    model = nn.Sequential(nn.Linear(3, 4), layers.Highway(4), layers.Highway(4), nn.Linear(4, 2))
    return Case(drawn(model), f.mse_loss, normal(samples, 3), normal(samples, 2), 16 + 2 * 40 + 10)


@case
def densenet(samples: int) -> Case:
    return classifier(layers.DenseNet(), normal(samples, 3), samples, 8 + 12 + 16 + 20 + 36)


@case
def unet(samples: int) -> Case:
    return Case(drawn(layers.UNet()), f.mse_loss, normal(samples, 1, 8), normal(samples, 1, 8), 8 + 21 + 30 + 14 + 13)


@case
def squeeze_excitation(samples: int) -> Case:
    return classifier(layers.SqueezeExcitation(), normal(samples, 2, 2, 2), samples, 76 + 10 + 12 + 51)


@case
def mixer(samples: int) -> Case:
    return classifier(layers.Mixer(), normal(samples, 3, 4), samples, 9 + 40 + 4 + 15, "einsum, gate, layer scale")


@case
def mixture_of_experts(samples: int) -> Case:
    return Case(drawn(layers.SoftExperts()), f.mse_loss, normal(samples, 3), normal(samples, 2), 12 + 48 + 10)


@case
def hypernetwork(samples: int) -> Case:
    inputs = (normal(samples, 3), normal(samples, 2))
    return Case(drawn(layers.HyperNetwork()), f.mse_loss, inputs, normal(samples, 2), 9 + 48 + 10, notes="two inputs")


@case
def bilinear(samples: int) -> Case:
    model = drawn(nn.Bilinear(3, 2, 4))
    inputs = (normal(samples, 3), normal(samples, 2))
    return Case(model, lambda o, t: (torch.sin(o) - t).pow(4).mean(), inputs, normal(samples, 4), 28)


@case
def learned_slopes(samples: int) -> Case:
    model = nn.Sequential(nn.Linear(3, 5), nn.PReLU(5), nn.Linear(5, 4), nn.PReLU(), nn.Linear(4, 3))
    return classifier(model, normal(samples, 3), samples, 20 + 5 + 24 + 1 + 15, "PReLU")


# Attention.


@case
def transformer_encoder_train(samples: int) -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, activation="gelu", batch_first=True)
    model = layers.Encoder(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train()
    return classifier(model, normal(samples, 3, 3), samples, 16 + 2 * (80 + 31 + 16) + 15, "post-norm")


@case
def transformer_encoder_eval(samples: int) -> Case:
    layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.1, batch_first=True)
    model = layers.Encoder(nn.TransformerEncoder(layer, 1)).eval()
    return classifier(model, normal(samples, 3, 3), samples, 16 + (80 + 31 + 16) + 15, "ReLU; torch has a fast path")


@case
def transformer_layer_pre_norm(samples: int) -> Case:
    layer = nn.TransformerEncoderLayer(4, 1, 3, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
    return classifier(layers.Encoder(layer).eval(), normal(samples, 3, 3), samples, 16 + (80 + 31 + 16) + 15)


@case
def transformer_decoder_layer(samples: int) -> Case:
    inputs = (normal(samples, 3, 3), normal(samples, 2, 2))
    size = 8 + 6 + (24 + 24 + 17 + 12) + 9
    return classifier(layers.Decoder(), inputs, samples, size, "two inputs, a mask, cross-attention")


@case
def multihead_attention(samples: int) -> Case:
    def loss_fn(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return f.mse_loss(output[0], target) + output[1].square().sum() / len(target)

    model = drawn(layers.Attention().eval(), gain=1.0)
    return Case(
        model, loss_fn, normal(samples, 3, 4), normal(samples, 2), 80 + 10, notes="the loss sees the attention weights"
    )


@case
def causal_attention(samples: int) -> Case:
    return classifier(layers.CausalAttention(), normal(samples, 4, 4), samples, 60 + 15, "scaled_dot_product_attention")


@case
def cross_attention(samples: int) -> Case:
    return classifier(layers.Perceiver(), normal(samples, 4, 4), samples, 6 + 12 + 15 + 21, "learned queries")


@case
def cross_attention_multihead(samples: int) -> Case:
    model = layers.LearnedQueries()
    return classifier(model, normal(samples, 3, 4), samples, 8 + 20 + 80 + 27, "learned queries, nn.MultiheadAttention")


@case
def gpt_tied(samples: int) -> Case:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return f.cross_entropy(output.flatten(0, 1), target.flatten())

    words = labels(samples, 5, classes=5)
    size = 20 + 16 + (16 + 60 + 20 + 30 + 28) + 8
    return Case(
        drawn(layers.GPT()), loss_fn, words[:, :-1], words[:, 1:], size, notes="embedding and head share a weight"
    )


# Recurrences.


@case
def rnn(samples: int) -> Case:
    model = structures.Recurrent(nn.RNN(2, 4, batch_first=True))
    return classifier(model, normal(samples, 6, 2), samples, 8 + 16 + 8 + 15)


@case
def gru(samples: int) -> Case:
    model = structures.Recurrent(nn.GRU(2, 3, batch_first=True))
    return classifier(model, normal(samples, 6, 2), samples, 3 * (6 + 9 + 6) + 12)


@case
def lstm(samples: int) -> Case:
    model = structures.Recurrent(nn.LSTM(2, 3, batch_first=True))
    return classifier(model, normal(samples, 6, 2), samples, 4 * (6 + 9 + 6) + 12)


@case
def gru_bidirectional(samples: int) -> Case:
    model = structures.Recurrent(nn.GRU(2, 2, num_layers=2, bidirectional=True, batch_first=True))
    size = 2 * 3 * (4 + 4 + 4) + 2 * 3 * (8 + 4 + 4) + 15
    return classifier(model, normal(samples, 3, 2), samples, size, "two layers, both directions")


@case
def gru_cell(samples: int) -> Case:
    return classifier(structures.CellLoop(nn.GRUCell(2, 3)), normal(samples, 6, 2), samples, 3 * (6 + 9 + 6) + 12)


@case
def lstm_cell(samples: int) -> Case:
    return classifier(structures.CellLoop(nn.LSTMCell(2, 3)), normal(samples, 6, 2), samples, 4 * (6 + 9 + 6) + 12)


@case
def gru_by_hand(samples: int) -> Case:
    return classifier(structures.HandGRU(), normal(samples, 6, 2), samples, 27 + 36 + 12)


@case
def ode_runge_kutta(samples: int) -> Case:
    return Case(drawn(structures.RungeKutta()), f.mse_loss, normal(samples, 3), normal(samples, 2), 16 + 15 + 8)


@case
def deep_equilibrium(samples: int) -> Case:
    return classifier(structures.Equilibrium(), normal(samples, 3), samples, 16 + 16 + 15)


# Shared parameters, interacting samples, nests.


@case
def tied_autoencoder(samples: int) -> Case:
    x = normal(samples, 5)
    return Case(drawn(structures.TiedAutoencoder()), f.mse_loss, x, x, 15 + 3 + 5, notes="inputs are the targets")


@case
def deep_set(samples: int) -> Case:
    return classifier(structures.DeepSet(), normal(samples, 4, 2), samples, 12 + 15 + 12)


@case
def graph_network(samples: int) -> Case:
    edges = torch.stack([torch.arange(samples + 2) % samples, (2 * torch.arange(samples + 2) + 1) % samples])
    inputs = {"nodes": normal(samples, 3), "edges": edges}
    size = 16 + 36 + 10
    return Case(
        drawn(structures.GraphNetwork()), f.mse_loss, inputs, normal(samples, 2), size, notes="a dict as inputs"
    )


@case
def two_towers(samples: int) -> Case:
    def loss_fn(output: tuple[Tensor, Tensor], queue: Tensor) -> Tensor:
        left, right = output
        logits = left @ torch.cat([right, f.normalize(queue, dim=1)]).T
        return f.cross_entropy(logits, torch.arange(len(left), device=left.device))

    inputs = (normal(samples, 3), normal(samples, 2))
    size = 16 + 15 + 9 + 12 + 1
    notes = "in-batch negatives beside a queue of fixed ones: samples interact"
    return Case(drawn(structures.TwoTowers()), loss_fn, inputs, normal(4, 3), size, notes=notes)


@case
def nested_outputs(samples: int) -> Case:
    def loss_fn(output: dict[str, Any], target: Tensor) -> Tensor:
        likelihood = (
            (target - output["mean"]).square() * torch.exp(-output["log_variance"]) + output["log_variance"]
        ).mean()
        return likelihood / 2 + 0.1 * (output["latent"][0] * output["latent"][1][0]).mean()

    return Case(
        drawn(structures.Gaussian()), loss_fn, normal(samples, 3), normal(samples, 2), 16 + 10 + 10, notes="a nest"
    )


# Weights that are computed, and parameters that are chosen.


@case
def lora(samples: int) -> Case:
    return classifier(structures.LoRA(merged=False), normal(samples, 4), samples, 8 + 10 + 18, "a frozen layer")


@case
def lora_merged(samples: int) -> Case:
    return classifier(structures.LoRA(merged=True), normal(samples, 4), samples, 8 + 10 + 18, "a frozen layer")


@case
def weight_norm_parametrized(samples: int) -> Case:
    model = mlp(3, 4, 3)
    parametrize.register_parametrization(model[0], "weight", structures.Direction())
    parametrize.register_parametrization(model[2], "weight", structures.Direction())
    return classifier(model, normal(samples, 3), samples, 20 + 18, "from its formula")


@case
def weight_norm_fused(samples: int) -> Case:
    model = mlp(3, 4, 3)
    for layer in (model[0], model[2]):
        nn.utils.parametrizations.weight_norm(layer)
    return classifier(model, normal(samples, 3), samples, 20 + 18, "torch's double backward of this operation is wrong")


@case
def weight_norm_by_hook(samples: int) -> Case:
    model = mlp(3, 4, 3)
    model[0] = nn.utils.weight_norm(model[0])
    model[0].weight = model[0].weight.detach()  # a tensor with a graph could not be copied; the hook computes it anew
    return classifier(
        model, normal(samples, 3), samples, 20 + 15, "the deprecated one, which sets an attribute in a hook"
    )


@case
def spectral_norm(samples: int) -> Case:
    model = drawn(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)))
    for _ in range(20):
        model(normal(samples, 3))  # in training mode: the power iteration
    return Case(model.eval(), f.cross_entropy, normal(samples, 3), labels(samples), 31)


@case
def frozen_backbone(samples: int) -> Case:
    model = drawn(mlp(3, 5, 4, 3))
    model[0].requires_grad_(False)
    return Case(
        model, f.cross_entropy, normal(samples, 3), labels(samples), 24 + 15, notes="frozen before the first control"
    )


@case
def chosen_by_pattern(samples: int) -> Case:
    model = drawn(structures.Stack(nn.Linear(3, 4), [layers.TwoLayer(4, 3) for _ in range(3)]))
    patterns = ["blocks.[02].*.weight", "stem.bias"]
    return Case(model, f.cross_entropy, normal(samples, 3), labels(samples), 48 + 4, params=patterns)


@case
def unused_parameter(samples: int) -> Case:
    model = mlp(3, 4, 3)
    model.register_parameter("spare", nn.Parameter(torch.zeros(2)))
    return classifier(model, normal(samples, 3), samples, 16 + 15 + 2, "zero rows")


@case
def writes_in_place(samples: int) -> Case:
    return classifier(structures.WritesInPlace(), normal(samples, 3), samples, 16 + 15)


@case
def branches(samples: int) -> Case:
    return classifier(structures.Branches(), normal(samples, 3), samples, 16 + 15, "control flow by value")


# Losses: penalties, and differential equations.


@case
def penalty_separable(samples: int) -> Case:
    def loss_fn(output: Tensor, target: Tensor, params: dict[str, Tensor]) -> Tensor:
        decay = sum(0.01 * p.square().sum() for p in params.values())
        return (
            f.cross_entropy(output, target)
            + decay
            + sum(0.02 * p.abs().pow(3).sum() for p in params.values() if p.dim() > 1)
        )

    model = drawn(mlp(3, 4, 4, 3))
    return Case(model, loss_fn, normal(samples, 3), labels(samples), 16 + 20 + 15, notes="weight decay and a cubic")


@case
def penalty_coupled(samples: int) -> Case:
    def loss_fn(output: Tensor, target: Tensor, params: dict[str, Tensor]) -> Tensor:
        norms = sum(0.1 * torch.linalg.vector_norm(p) for p in params.values())
        return f.mse_loss(output, target) + norms + 0.05 * (params["0.weight"].T @ params["0.weight"]).square().sum()

    notes = "norms of whole parameters, and orthogonality"
    return Case(drawn(mlp(3, 4, 2)), loss_fn, normal(samples, 3), normal(samples, 2), 16 + 10, notes=notes)


@case
def margin_and_focus(samples: int) -> Case:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        log_p = output.log_softmax(1).gather(1, target[:, None])[:, 0]
        hinge = f.relu(0.5 + output - output.gather(1, target[:, None])).mean()
        return hinge - ((1 - log_p.exp()).square() * log_p).mean()

    return Case(
        drawn(mlp(3, 4, 3)), loss_fn, normal(samples, 3), labels(samples), 16 + 15, notes="a focal loss and a hinge"
    )


def _boundary_value(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    u, slope, curvature = output
    return (curvature + u * slope - target).square().mean() + u[0].square()


@case
def pinn_autograd(samples: int) -> Case:
    model = drawn(structures.PINN("autograd"))
    return Case(model, _boundary_value, normal(samples, 1), normal(samples), 10 + 24 + 5, notes="differentiates inside")


@case
def pinn_func(samples: int) -> Case:
    model = drawn(structures.PINN("func"))
    return Case(
        model, _boundary_value, normal(samples, 1), normal(samples), 10 + 24 + 5, notes="differentiates by torch.func"
    )


@case
def pinn_in_the_loss(samples: int) -> Case:
    def loss_fn(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        x, u = output
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return _boundary_value((u[:, 0], slope[:, 0], curvature[:, 0]), target)

    model = drawn(structures.PINN("loss"))
    return Case(
        model, loss_fn, normal(samples, 1), normal(samples), 10 + 24 + 5, notes="the loss differentiates the output"
    )


# Functions of a dict of parameters.


@case
def function(samples: int) -> Case:
    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] * params["scale"]

    params = {"w1": normal(3, 4), "b1": normal(4), "w2": normal(4, 3), "scale": 1.5 + normal()}
    return Case(model, f.cross_entropy, normal(samples, 3), labels(samples), 29, params, "a parameter without axes")


@case
def function_of_nest(samples: int) -> Case:
    def model(params: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        z = inputs["first"] @ params["w"]
        for _ in range(3):
            z = torch.sin(z @ params["loop"]) + inputs["second"]
        return {"z": z, "energy": torch.einsum("bi,ij,bj->b", z, params["loop"], z)}

    def loss_fn(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return f.mse_loss(output["z"], target) + 0.1 * output["energy"].square().mean()

    inputs = {"first": normal(samples, 3), "second": normal(samples, 4)}
    return Case(
        model,
        loss_fn,
        inputs,
        normal(samples, 4),
        28,
        {"w": normal(3, 4), "loop": 0.5 * normal(4, 4)},
        "a shared matrix",
    )

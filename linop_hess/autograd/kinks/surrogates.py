"""Smooth functions that have the curvature of ATen operations with kinks.

At a kink the slope of an operation jumps, and autograd's second derivative, right almost everywhere, knows nothing of it.
A surrogate with sharpness β spreads that jump over a width of about 1/β: ReLU becomes softplus(βx)/β, whose second
derivative has the integral of ReLU's jump, |x| becomes √(x² + 1/β²), a maximum log Σ exp(βx)/β. Only second derivatives are
ever taken from it: values and slopes stay the operation's.

Operations that are differentiable once everywhere are none of these: smooth L1 and Huber losses, ELU at α = 1, CELU and
norms have second derivatives that jump, which is as it should be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linop_hess._validate import finite_real
from linop_hess.autograd.kinks.windows import adaptive_windows, pooling_windows

DEFAULT_SHARPNESS = 5.0
"""β where none is given. The mean curvature of a ReLU is the density of its inputs at zero, and a surrogate is an
estimate of it with a kernel of standard deviation 1.8/β: for n inputs of scale σ the usual rule, 1.06 σ n^(-1/5), gives
β = 1.7 n^(1/5)/σ, which is 5 at a few hundred samples and σ = 1."""

Smooth = Callable[..., Any]
_aten = torch.ops.aten


def checked_sharpness(nonsmooth: str, sharpness: float | None) -> float | None:
    """Return the sharpness of the surrogates, None where there are none.

    Parameters
    ----------
    nonsmooth : str
    sharpness : float, optional
        By default `DEFAULT_SHARPNESS`.

    Raises
    ------
    ValueError
        If `nonsmooth` is unknown, or `sharpness` is given without surrogates or is not positive and finite.
    TypeError
        If it is no real number.
    """
    if nonsmooth not in ("generalized", "smooth", "error"):
        raise ValueError(
            f'expected nonsmooth to be "generalized", "smooth" or "error", got {nonsmooth!r}: pass one of the three'
        )
    if nonsmooth != "smooth":
        if sharpness is not None:
            raise ValueError(
                f'expected sharpness with nonsmooth="smooth" only, got it with {nonsmooth!r}: leave sharpness out, or pass '
                'nonsmooth="smooth"'
            )
        return None
    value = DEFAULT_SHARPNESS if sharpness is None else finite_real(sharpness, "sharpness")
    if value <= 0:
        raise ValueError(f"expected sharpness to be positive, got {value}: pass a positive number")
    return value


def surrogate(func: Any, sharpness: float) -> Smooth | None:
    """Return a smooth function of an operation's own arguments that has the curvature to use in its place.

    Parameters
    ----------
    func : torch._ops.OpOverload or torch._ops.OpOverloadPacket
        An ATen operation, in place or not.
    sharpness : float
        β; the kink is spread over a width of about 1/β.

    Returns
    -------
    callable or None
        Takes the arguments of `func` and returns its differentiable outputs: one tensor (the values, where indices
        come along), or a tuple where several are differentiable. It changes no argument. To be differentiated twice, and
        under `torch.vmap`; its values and first derivatives are near those of `func`, not equal. None where there is no
        surrogate: the operation has no kink, or one that `is_kinked` tells but nothing smooths.
    """
    smooth = _SURROGATES.get(operation_name(func))
    return None if smooth is None else partial(smooth, sharpness)


def is_kinked(func: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether an operation's value or slope jumps somewhere in its differentiable arguments.

    Parameters
    ----------
    func : torch._ops.OpOverload or torch._ops.OpOverloadPacket
    *args, **kwargs
        What it is called with, where known. Without them an operation that has kinks for some arguments, as norms have
        for orders 1 and infinity, counts as kinked.

    Returns
    -------
    bool
    """
    name = operation_name(func)
    if name not in _SURROGATES and name not in _WITHOUT_SURROGATE:
        return False
    depends = _DEPENDS.get(name)
    return depends is None or not args or depends(*args, **kwargs)


def is_curved(func: Any) -> bool:
    """Tell whether a kinked operation has, by autograd, a second derivative of its own that its surrogate replaces."""
    return operation_name(func) in _CURVED


def jumps(func: Any) -> bool:
    """Tell whether the value of an operation, and not its slope alone, jumps."""
    return operation_name(func) in _JUMPING


def operation_name(func: Any) -> str:
    """Return the name of an ATen operation without overload, and without the underscore of those in place."""
    packet = getattr(func, "overloadpacket", func)
    name = str(packet).removeprefix("aten.")
    return name.removesuffix("_") if not name.endswith("__") else name


def _softplus(beta: float, x: Tensor) -> Tensor:
    """log(1 + exp(βx))/β, without the threshold beyond which `torch.nn.functional.softplus` is linear."""
    return -F.logsigmoid(-beta * x) / beta


def _relu(beta: float, self: Tensor) -> Tensor:
    return _softplus(beta, self)


def _leaky_relu(beta: float, self: Tensor, negative_slope: float = 0.01) -> Tensor:
    return negative_slope * self + (1 - negative_slope) * _softplus(beta, self)


def _prelu(beta: float, self: Tensor, weight: Tensor) -> Tensor:
    return weight * self + (1 - weight) * _softplus(beta, self)


def _rrelu(beta: float, self: Tensor, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any) -> Tensor:
    return _leaky_relu(beta, self, (lower + upper) / 2)


def _elu(beta: float, self: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    jump = scale * (1 - alpha * input_scale)  # of the slope; the rest is differentiable once
    plain = F.elu(self * input_scale, alpha) * scale
    linear = torch.clamp(self, min=0) * (scale - scale * input_scale)
    return plain + linear + jump * (_softplus(beta, self) - torch.clamp(self, min=0))


def _hardtanh(beta: float, self: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return _clamp(beta, self, min_val, max_val)


def _clamp(beta: float, self: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if min is None:
        return max - _softplus(beta, max - self)
    lifted = min + _softplus(beta, self - min)
    return lifted if max is None else lifted - _softplus(beta, self - max)


def _clamp_min(beta: float, self: Tensor, min: Any) -> Tensor:
    return _clamp(beta, self, min)


def _clamp_max(beta: float, self: Tensor, max: Any) -> Tensor:
    return _clamp(beta, self, None, max)


def _threshold(beta: float, self: Tensor, threshold: float, value: float) -> Tensor:
    """The jump of the slope alone; where the value jumps too, autograd's gradient does not know of it."""
    return value + _softplus(beta, self - threshold)


def _shrink(beta: float, self: Tensor, lambd: float = 0.5) -> Tensor:
    """Soft and hard shrinkage have the same slopes."""
    return _softplus(beta, self - lambd) - _softplus(beta, -self - lambd)


def _hardsigmoid(beta: float, self: Tensor) -> Tensor:
    return (_softplus(beta, self + 3) - _softplus(beta, self - 3)) / 6


def _hardswish(beta: float, self: Tensor) -> Tensor:
    return self * _hardsigmoid(beta, self)


def _abs(beta: float, self: Tensor) -> Tensor:
    return torch.sqrt(self * self + beta**-2)


def _maximum(beta: float, self: Tensor, other: Tensor) -> Tensor:
    return other + _softplus(beta, self - other)


def _minimum(beta: float, self: Tensor, other: Tensor) -> Tensor:
    return self - _softplus(beta, self - other)


def _amax(beta: float, self: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    dims = (dim,) if isinstance(dim, int) else tuple(dim) or tuple(range(self.dim()))
    return torch.logsumexp(beta * self, dims, keepdim) / beta if dims else self


def _amin(beta: float, self: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return -_amax(beta, -self, dim, keepdim)


def _max(beta: float, self: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return _maximum(beta, self, dim) if isinstance(dim, Tensor) else _amax(beta, self, dim, keepdim)


def _min(beta: float, self: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return _minimum(beta, self, dim) if isinstance(dim, Tensor) else _amin(beta, self, dim, keepdim)


def _aminmax(beta: float, self: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    dims = () if dim is None else (dim,)
    return _amin(beta, self, dims, keepdim), _amax(beta, self, dims, keepdim)


def _cummax(beta: float, self: Tensor, dim: int) -> Tensor:
    return torch.logcumsumexp(beta * self, dim) / beta


def _cummin(beta: float, self: Tensor, dim: int) -> Tensor:
    return -_cummax(beta, -self, dim)


def _pool(
    rank: int,
    beta: float,
    self: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    ceil_mode: bool = False,
) -> Tensor:
    windows = pooling_windows(self.shape[-rank:], kernel_size, stride, padding, dilation, ceil_mode)
    return _pooled(beta, self, windows)


def _adaptive_pool(beta: float, self: Tensor, output_size: Sequence[int]) -> Tensor:
    return _pooled(beta, self, adaptive_windows(self.shape[-len(output_size) :], output_size))


def _pooled(beta: float, x: Tensor, windows: Sequence[Tensor]) -> Tensor:
    """log-sum-exp over the windows: for each dimension the places (out, k) that make each of them up, −1 for none."""
    rank = len(windows)
    padded = F.pad(x, (0, 1) * rank, value=-math.inf)  # -1 is the last place, of no weight
    index: list[Any] = [Ellipsis]
    for d, places in enumerate(windows):
        shape = [1] * (2 * rank)
        shape[d], shape[rank + d] = places.shape
        index.append(places.to(x.device).reshape(shape))
    return torch.logsumexp(beta * padded[tuple(index)], tuple(range(-rank, 0))) / beta


def _vector_norm(
    beta: float, self: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    if not _is_norm_kinked(self, ord):
        return torch.linalg.vector_norm(self, ord, dim, keepdim, dtype=dtype)
    size = _abs(beta, self if dtype is None else self.to(dtype))
    dims = () if dim is None else dim
    if ord == 1:
        return size.sum(dims if dims != () else tuple(range(self.dim())), keepdim)
    return _amax(beta, size, dims, keepdim) if ord > 0 else _amin(beta, size, dims, keepdim)


def _norm(beta: float, self: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    return _vector_norm(beta, self, 2 if p is None else p, dim, keepdim, dtype=options.get("dtype"))


def _is_norm_kinked(self: Any, ord: Any = 2, *_: Any, **__: Any) -> bool:
    return ord in (0, 1, math.inf, -math.inf)


def _is_distance_kinked(x1: Any, x2: Any, p: float = 2.0, *_: Any, **__: Any) -> bool:
    return p in (0, 1, math.inf)


def _is_elu_kinked(self: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1, **__: Any) -> bool:
    return alpha * input_scale != 1


def _is_margin_kinked(self: Any, target: Any, p: float = 1, *_: Any, **__: Any) -> bool:
    return p == 1


_SURROGATES: dict[str, Smooth] = {
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "_prelu_kernel": _prelu,
    "rrelu_with_noise": _rrelu,
    "elu": _elu,
    "hardtanh": _hardtanh,
    "clamp": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "threshold": _threshold,
    "hardshrink": _shrink,
    "softshrink": _shrink,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "abs": _abs,
    "maximum": _maximum,
    "minimum": _minimum,
    "fmax": _maximum,
    "fmin": _minimum,
    "amax": _amax,
    "amin": _amin,
    "max": _max,
    "min": _min,
    "aminmax": _aminmax,
    "cummax": _cummax,
    "cummin": _cummin,
    "max_pool2d_with_indices": partial(_pool, 2),
    "max_pool3d_with_indices": partial(_pool, 3),
    "adaptive_max_pool2d": _adaptive_pool,
    "adaptive_max_pool3d": _adaptive_pool,
    "linalg_vector_norm": _vector_norm,
    "norm": _norm,
}

_JUMPING = frozenset(
    """
    sign sgn round floor ceil trunc frac fmod remainder heaviside floor_divide copysign fake_quantize_per_tensor_affine_cachemask
    """.split()
)

_CURVED = frozenset({"_prelu_kernel", "elu", "hardswish"})

_WITHOUT_SURROGATE = frozenset(
    """
    sort topk kthvalue median nanmedian mode msort sign sgn round floor ceil trunc frac fmod remainder heaviside
    floor_divide copysign nan_to_num logit renorm fractional_max_pool2d fractional_max_pool3d max_unpool2d max_unpool3d
    grid_sampler_2d grid_sampler_3d scatter_reduce index_reduce segment_reduce multi_margin_loss multilabel_margin_loss_forward
    dist _cdist_forward _pdist_forward fake_quantize_per_tensor_affine_cachemask
    threshold_backward hardtanh_backward leaky_relu_backward _prelu_kernel_backward rrelu_with_noise_backward
    elu_backward hardshrink_backward softshrink_backward hardsigmoid_backward hardswish_backward
    """.split()
)

_DEPENDS: dict[str, Callable[..., bool]] = {
    "linalg_vector_norm": _is_norm_kinked,
    "norm": _is_norm_kinked,
    "dist": _is_distance_kinked,
    "_cdist_forward": _is_distance_kinked,
    "_pdist_forward": _is_norm_kinked,
    "elu": _is_elu_kinked,
    "abs": lambda self: not self.is_complex(),  # a complex number's is a norm
    "multi_margin_loss": _is_margin_kinked,
    "scatter_reduce": lambda self, dim, index, src, reduce="", **_: reduce in ("amax", "amin"),
    "index_reduce": lambda self, dim, index, source, reduce="", **_: reduce in ("amax", "amin"),
    "logit": lambda self, eps=None: eps is not None,
}

# SPDX-License-Identifier: MIT
"""A ConvNet's block with batch norm as an operator; ``_blocks.py`` has that with instance norm.

Where the fused kernels do not apply, torch's own layers are composed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._blocks import (
    check_block,
    check_eps,
    check_padding,
    check_precision,
    has_bfloat16_products,
    is_fused,
    like_parameter,
)
from ._operators import (
    channels_last_like,
    only,
    register_no_second_derivative,
    without_autocast,
)
from ._operators import operators as _ops

Gradients = tuple[Tensor | None, ...]


def conv_batch_norm_relu_pool(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    padding: int = 1,
    precision: str | None = None,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A ConvNet block with batch norm: 3x3 convolution, batch norm, ReLU and 2x2 mean pooling.

    A bias of the convolution would cancel in the norm, so there is none.

    Args:
        x: [N, C, H, W], float64, float32, float16 or bfloat16, in any layout; N at least 1 unless
            there are ``statistics``.
        conv_weight: [K, C, 3, 3], stride 1. Dtype of ``x``, or float32 for float16 and bfloat16.
        weight: the norm's scale of each output channel, [K]. None: 1.
        bias: what is then added, like ``weight``. None: 0.
        eps, padding, precision: see :func:`dmfast.ops.conv_norm_relu_pool`.
        statistics: [2, K], mean and variance of each channel of the convolution, by which all
            images are normalised, and which are constants to the gradient; float32 (float64 for
            float64). None: those of the batch, the variance with ddof 0.

    Returns:
        [N, K, H' // 2, W' // 2] with H' = H + 2 padding - 2 and W' alike, dtype of ``x``,
        channels_last; and the statistics, [2, K], which have no gradient. The former is
        differentiable in ``x``, ``conv_weight``, ``weight`` and ``bias``: once, or with ``direct``
        any number of times.

        On a CPU a block of 1 to 4 channels is convolved anew in every pass rather than kept.
        Everywhere else than on a CPU, and where ``conv_norm_relu_pool`` does so, the block is
        torch's own layers.

    Raises:
        RuntimeError: the precision is unknown, a shape, dtype or device is wrong, or there are no
            images to take statistics of.

    Equivalent to ``avg_pool2d(relu(batch_norm(conv2d(x, conv_weight, padding=padding), None, None,
    weight, bias, True, 0.0, eps)), 2)`` (:func:`dmfast.reference.conv_batch_norm_relu_pool`).
    """
    op = "conv_batch_norm_relu_pool"
    _checks.tensors(
        op,
        {"x": x, "conv_weight": conv_weight},
        {"weight": weight, "bias": bias, "statistics": statistics},
    )
    check_precision(op, precision)
    eps, padding = check_eps(op, eps), check_padding(op, padding)
    check_block(op, x, conv_weight, weight, bias, padding)
    _checks.rank(op, "conv_weight", conv_weight, 4, "[filters, channels, 3, 3]")
    _check_statistics(op, x, conv_weight, statistics)
    tensors = (x, conv_weight, weight, bias)
    try:
        if x.device.type != "cpu" or not is_fused([conv_weight], padding, precision, x.dtype):
            with without_autocast(x):
                return _layers(*tensors, statistics, eps, padding)
        operands = [None if t is None else t.float() for t in (*tensors, statistics)]
    except RuntimeError as error:
        raise _checks.of_layers(op, error) from error
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    bfloat16 = has_bfloat16_products(precision, x.dtype)
    out, _, found = _ops.conv_batch_norm_relu_pool(*operands, eps, padding, bfloat16, keep)
    return out.to(x.dtype), found


def conv_batch_statistics(
    x: Tensor, conv_weight: Tensor, padding: int = 1, precision: str | None = None
) -> Tensor:
    """The statistics by which :func:`conv_batch_norm_relu_pool` normalises, [2, K], alone.

    Without a gradient. Arguments and errors are those of that function.
    """
    op = "conv_batch_statistics"
    _checks.tensors(op, {"x": x, "conv_weight": conv_weight}, {})
    check_precision(op, precision)
    padding = check_padding(op, padding)
    check_block(op, x, conv_weight, None, None, padding)
    _checks.rank(op, "conv_weight", conv_weight, 4, "[filters, channels, 3, 3]")
    _check_statistics(op, x, conv_weight, None)
    with torch.no_grad():
        if x.device.type != "cpu" or not is_fused([conv_weight], padding, precision, x.dtype):
            with without_autocast(x):
                return statistics_of(F.conv2d(x, conv_weight.to(x.dtype), padding=padding))
        bfloat16 = has_bfloat16_products(precision, x.dtype)
        found: Tensor = _ops._conv_batch_statistics(
            x.float(), conv_weight.float(), padding, bfloat16
        )
    return found


def _layers(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    eps: float,
    padding: int,
) -> tuple[Tensor, Tensor]:
    """The operator in torch's layers, in the dtype of x."""
    z = F.conv2d(x, conv_weight.to(x.dtype), padding=padding)
    of_batch = statistics is None
    if statistics is None:
        with torch.no_grad():
            statistics = statistics_of(z)
    scale, shift = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    mean, variance = (None, None) if of_batch else statistics.to(x.dtype).unbind()
    y = F.batch_norm(z, mean, variance, scale, shift, of_batch, 0.0, eps)
    out = F.avg_pool2d(F.relu(y), 2).contiguous(memory_format=torch.channels_last)
    return out, statistics


def statistics_of(z: Tensor) -> Tensor:
    """Mean and variance (ddof 0) of each channel of z [N, K, H, W]: [2, K], float32 or wider."""
    variance, mean = torch.var_mean(z.to(_wide(z.dtype)), (0, 2, 3), correction=0)
    return torch.stack([mean, variance])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_statistics(op: str, x: Tensor, conv_weight: Tensor, statistics: Tensor | None) -> None:
    if statistics is None:
        if x.shape[0] == 0:
            raise RuntimeError(f"{op}: x has no images to take statistics of; give statistics")
        return
    _checks.dtype(op, "statistics", statistics, _wide(x.dtype))
    expected = [2, conv_weight.shape[0]]
    if list(statistics.shape) != expected:
        raise RuntimeError(
            f"{op}: statistics must have shape {expected}, got {list(statistics.shape)}"
        )
    if statistics.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: statistics are constants: detach them")


@torch.library.register_fake("dmfast::conv_batch_norm_relu_pool")
def _(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor | None,
    eps: float,
    padding: int,
    bfloat16: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, height, width = x.shape
    filters = conv_weight.shape[0]
    height, width = height + 2 * padding - 2, width + 2 * padding - 2
    out = channels_last_like(x, (n, filters, height // 2, width // 2))
    kept = keep and channels > 4
    z = channels_last_like(x, (n, filters, height, width)) if kept else x.new_empty(0)
    return out, z, x.new_empty((2, filters))


@torch.library.register_fake("dmfast::_conv_batch_norm_relu_pool_backward")
def _(
    gradient: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    statistics: Tensor,
    is_given: bool,
    eps: float,
    padding: int,
    bfloat16: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_x = channels_last_like(x, x.shape) if wanted[0] else x.new_empty(0)
    parameters = zip((conv_weight, weight, bias), wanted[1:], strict=True)
    of_conv, of_weight, of_bias = (like_parameter(p, want, x) for p, want in parameters)
    return of_x, of_conv, of_weight, of_bias


@torch.library.register_fake("dmfast::_conv_batch_statistics")
def _(x: Tensor, conv_weight: Tensor, padding: int, bfloat16: bool) -> Tensor:
    return x.new_empty((2, conv_weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, given, ctx.eps, ctx.padding, ctx.bfloat16, _ = inputs
    _, z, statistics = output
    ctx.is_given = given is not None
    ctx.mark_non_differentiable(z, statistics)
    ctx.set_materialize_grads(False)  # zeros for z would take as much memory as z
    ctx.save_for_backward(*tensors, z, statistics)


def _backward(ctx: Any, gradient: Tensor | None, *rest: Tensor | None) -> Gradients:
    if gradient is None:
        return (None,) * 9
    wanted = list(ctx.needs_input_grad[:4])
    gradients = _ops._conv_batch_norm_relu_pool_backward(
        gradient,
        *ctx.saved_tensors,
        ctx.is_given,
        ctx.eps,
        ctx.padding,
        ctx.bfloat16,
        wanted,
    )
    return *only(gradients, wanted), *(None,) * 5


torch.library.register_autograd(
    "dmfast::conv_batch_norm_relu_pool", _backward, setup_context=_setup
)
register_no_second_derivative("_conv_batch_norm_relu_pool_backward", "conv_batch_norm_relu_pool")

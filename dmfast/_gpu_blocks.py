# SPDX-License-Identifier: MIT
"""The ways of a ConvNet's block on a GPU, and the kernel of a whole block: its fake and autograd.

A way is a function of tensors, of any device that has its operators. Nothing in it waits for the
GPU or reads from it, and all memory is torch's, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._operators import (
    accumulation_dtype,
    channels_last_like,
    only,
    register_no_second_derivative,
)
from ._operators import operators as _ops

Gradients = tuple[Tensor | None, ...]

_WAYS = ("cudnn", "fused", "wgmma", "torch")


def gpu_way() -> str:
    """How blocks go on a GPU, as the environment variable DMFAST_GPU says.

    ``cudnn``: torch's convolution, then :func:`dmfast.ops.instance_norm_relu_pool`. ``fused``: in
    one kernel where it takes the block, in bfloat16; ``wgmma``: in its form for sm_90a where there
    is one. ``torch``: torch's own layers.

    Raises:
        RuntimeError: the variable has another value.
    """
    asked = os.environ.get("DMFAST_GPU") or _WAYS[0]
    if asked not in _WAYS:
        raise RuntimeError(f"DMFAST_GPU must be {', '.join(_WAYS[:-1])} or torch, got {asked!r}")
    return asked


# To torch.compile the answer is a constant, as in _blocks.py.
gpu_way._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_whole(
    x: Tensor, conv_weight: Tensor, padding: int, dtype: torch.dtype, backward: bool
) -> bool:
    """Whether a block of images like ``x`` in that dtype goes in one kernel."""
    if dtype != torch.bfloat16 or gpu_way() not in ("fused", "wgmma"):
        return False
    filters, channels = conv_weight.shape[-4:-2]
    # operator.index() makes constants of what torch.compile has as symbols.
    sizes = [operator.index(size) for size in (channels, filters, *x.shape[-2:])]
    return _takes(*sizes, padding, backward, x.device.index or 0)


def _takes(*arguments: int) -> bool:
    return _takes_cached(*arguments)


_takes._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _takes_cached(*arguments: int) -> bool:
    taken: bool = _ops._fused_block_takes(*arguments)
    return taken


def gpu_block(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding: int,
    packed: Tensor | None = None,
) -> Tensor:
    """A block in the dtype of ``x``, bfloat16 or float32, which is that of the products too.

    Args:
        packed: what :func:`packed_weights` made of ``conv_weight``, where it is kept.
    """
    tensors = (x, conv_weight, weight, bias)
    backward = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if is_whole(x, conv_weight, padding, x.dtype, backward):
        return whole_block(x, conv_weight, weight, bias, eps, padding, packed)
    return convolved_block(x, conv_weight, weight, bias, eps, padding)


def of_networks(
    function: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor],
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The function of each network's images and parameters."""
    networks = conv_weight.shape[0]
    if x.shape[0] == 0:
        # Without images the first network's will do: there may be any number of networks.
        return function(x, conv_weight[0], *(None if p is None else p[0] for p in (weight, bias)))
    parts = x.view(networks, x.shape[0] // networks, *x.shape[1:]).unbind()
    rows = [[None] * networks if p is None else p.unbind() for p in (weight, bias)]
    return torch.cat(
        [function(*row) for row in zip(parts, conv_weight.unbind(), *rows, strict=True)]
    )


# ---- Torch's convolution, then what follows it in one pass -------------------------------------


def convolved_block(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding: int,
) -> Tensor:
    """See :func:`gpu_block`; float64 too."""
    x = x.contiguous(memory_format=torch.channels_last)
    of_norm = accumulation_dtype(x.dtype)

    def block(x: Tensor, conv_weight: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        z = F.conv2d(x, conv_weight.to(x.dtype), padding=padding)
        parameters = [None if p is None else p.to(of_norm) for p in (weight, bias)]
        out: Tensor = _ops.instance_norm_relu_pool(z, *parameters, eps)[0]
        return out.contiguous(memory_format=torch.channels_last)

    if conv_weight.dim() == 5:
        return of_networks(block, x, conv_weight, weight, bias)
    return block(x, conv_weight, weight, bias)


# ---- One kernel --------------------------------------------------------------------------------


def packed_weights(x: Tensor, conv_weight: Tensor, padding: int) -> Tensor | None:
    """The weights as the kernel reads them, for images like ``x``; not under torch.compile."""
    if torch.compiler.is_compiling():
        return None
    packed: Tensor = _ops._fused_block_pack(conv_weight.float(), *x.shape[-2:], padding)
    return packed


def whole_block(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding: int,
    packed: Tensor | None = None,
) -> Tensor:
    """See :func:`gpu_block`; bfloat16 only, once differentiable."""
    parameters = [None if p is None else p.float() for p in (conv_weight, weight, bias)]
    out: Tensor = _ops._fused_block(x, *parameters, packed, eps, padding, gpu_way() == "wgmma")[0]
    return out


@torch.library.register_fake("dmfast::_fused_block")
def _(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
    eps: float,
    padding: int,
    wgmma: bool,
) -> tuple[Tensor, Tensor]:
    n, _, height, width = x.shape
    filters = conv_weight.shape[-4]
    height, width = height + 2 * padding - 2, width + 2 * padding - 2
    out = channels_last_like(x, (n, filters, height // 2, width // 2))
    return out, x.new_empty((n, 2, filters), dtype=torch.float32)


@torch.library.register_fake("dmfast::_fused_block_backward")
def _(
    gradient: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    padding: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, _, height, width = x.shape
    filters = conv_weight.shape[-4]
    of_z = (n, filters, height + 2 * padding - 2, width + 2 * padding - 2)
    of_weight, of_bias = (
        statistics.new_empty(p.shape if want and p is not None else 0)
        for p, want in zip((weight, bias), wanted[2:], strict=True)
    )
    return (
        channels_last_like(x, x.shape) if wanted[0] else x.new_empty(0),
        channels_last_like(x, of_z) if wanted[1] else x.new_empty(0),
        of_weight,
        of_bias,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, _, ctx.padding, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> Gradients:
    if gradient is None:
        return (None,) * 8
    x, conv_weight, weight, bias, statistics = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    of_x, of_z, of_weight, of_bias = _ops._fused_block_backward(
        gradient, x, conv_weight, weight, bias, statistics, ctx.padding, wanted
    )
    of_conv = _of_conv_weight(of_z, x, conv_weight, ctx.padding) if wanted[1] else None
    gradients = only((of_x, of_conv, of_weight, of_bias), wanted)
    return *gradients, None, None, None, None


def _of_conv_weight(of_z: Tensor, x: Tensor, conv_weight: Tensor, padding: int) -> Tensor:
    """The gradient of the convolution's weights from that of its output, in their dtype."""

    def of_network(of_z: Tensor, x: Tensor, conv_weight: Tensor) -> Tensor:
        sides = [padding, padding]
        gradients = torch.ops.aten.convolution_backward(
            of_z,
            x,
            conv_weight,
            None,
            [1, 1],
            sides,
            [1, 1],
            False,
            [0, 0],
            1,
            [False, True, False],
        )
        of_weight: Tensor = gradients[1]
        return of_weight

    if x.shape[0] == 0:
        return torch.zeros_like(conv_weight)
    narrow = conv_weight.to(x.dtype)
    if conv_weight.dim() == 4:
        return of_network(of_z, x, narrow).to(conv_weight.dtype)
    parts = (t.tensor_split(len(narrow)) for t in (of_z, x))
    rows = zip(*parts, narrow.unbind(), strict=True)
    return torch.stack([of_network(*row) for row in rows]).to(conv_weight.dtype)


torch.library.register_autograd("dmfast::_fused_block", _backward, setup_context=_setup)
register_no_second_derivative("_fused_block_backward", "conv_norm_relu_pool")

# SPDX-License-Identifier: MIT
"""The blocks of a ConvNet as operators: per operator its wrapper, its fake and its autograd (on a
GPU: ``_gpu_blocks.py``).

Where the fused kernels do not apply, torch's own layers are composed: slower, any dtype and shape,
differentiable any number of times. Which way is taken follows from dtypes, shapes and the device
alone, never from values, and the checks come before the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _load
from ._gpu_blocks import gpu_block, gpu_way
from ._operators import (
    accumulation_dtype,
    channels_last_like,
    images_format,
    like_images,
    only,
    register_no_second_derivative,
    without_autocast,
)
from ._operators import operators as _ops

Gradients = tuple[Tensor | None, ...]

_PRECISIONS = ("direct", "float32", "bfloat16")
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LARGEST_PADDING = 8  # of the fused kernels
_MOST_PADDING = 2**20  # far beyond it the sizes of images pass 64 bits


# ---- instance_norm_relu_pool -------------------------------------------------------------------


def instance_norm_relu_pool(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Instance norm, ReLU and 2x2 mean pooling in one pass: what follows a ConvNet's convolution.

    Each channel of each image is normalised by its own mean and variance (ddof 0), as by a
    GroupNorm with one group a channel.

    Args:
        x: [N, C, H, W], C at least 1, H and W at least 2; float64, float32, float16 or bfloat16, in
            any layout.
        weight: the scale of each channel, [C], or [R, C] for R networks over which the images are
            split evenly; dtype of ``x``, or float32 for float16 and bfloat16. None: 1.
        bias: what is then added, like ``weight``. None: 0.
        eps: what is added to the variance, 0 or more.

    Returns:
        [N, C, H // 2, W // 2], dtype of ``x``, channels_last where ``x`` is and contiguous
        otherwise. Pooling leaves out the last row or column of odd sides, the statistics do not.
        Statistics and sums are float32 (float64 for float64), in a fixed order. Differentiable in
        ``x``, ``weight`` and ``bias``; further derivatives are those of torch's layers.

    Raises:
        RuntimeError: a shape, dtype or device is wrong, or the images do not divide evenly.

    Equivalent to ``avg_pool2d(relu(group_norm(x, C, weight, bias, eps)), 2)``
    (:func:`dmfast.reference.instance_norm_relu_pool`).
    """
    op = "instance_norm_relu_pool"
    _checks.tensors(op, {"x": x}, {"weight": weight, "bias": bias})
    eps = check_eps(op, eps)
    _check_norm(op, x, weight, bias)
    if x.device.type not in ("cpu", "cuda"):
        try:
            with without_autocast(x):
                pooled = _norm_relu_pool_layers(x, weight, bias, eps)
            return pooled.contiguous(memory_format=images_format(x))
        except RuntimeError as error:
            raise _checks.of_layers(op, error) from error
    out: Tensor = _ops.instance_norm_relu_pool(x, weight, bias, eps)[0]
    return out


def _norm_relu_pool_layers(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The operator in torch's layers."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # group_norm has no backward for a bias alone
    scale, shift = (
        None if p is None else _of_a_network(x, p, 1).to(x.dtype) for p in (weight, bias)
    )
    if scale is None or scale.dim() == 1:
        y = F.group_norm(x, x.shape[1], scale, shift, eps)
    else:
        shifts = [None] * len(scale) if shift is None else shift
        rows = zip(_of_networks(x, len(scale)), scale, shifts, strict=True)
        y = torch.cat([F.group_norm(part, x.shape[1], w, b, eps) for part, w, b in rows])
    return F.avg_pool2d(F.relu(y), 2)


def _of_networks(x: Tensor, networks: int) -> Tensor:
    return x.view(networks, x.shape[0] // networks, *x.shape[1:])


def _of_a_network(x: Tensor, parameter: Tensor, axes: int) -> Tensor:
    """Without images the first network's parameter will do: there may be any number of networks."""
    return parameter[0] if x.shape[0] == 0 and parameter.dim() > axes else parameter


@torch.library.register_fake("dmfast::instance_norm_relu_pool")
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    n, channels, height, width = x.shape
    out = torch.empty(
        (n, channels, height // 2, width // 2),
        dtype=x.dtype,
        device=x.device,
        memory_format=images_format(x),
    )
    return out, x.new_empty((n, 2, channels), dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake("dmfast::_instance_norm_relu_pool_backward")
def _(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    of_x = like_images(x) if wanted[0] else x.new_empty(0)
    return of_x, like_parameter(weight, wanted[1], x), like_parameter(bias, wanted[2], x)


def like_parameter(parameter: Tensor | None, wanted: bool, x: Tensor) -> Tensor:
    if parameter is None or not wanted:
        return x.new_empty(0)
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, bias, output[1])


def _norm_backward(ctx: Any, gradient: Tensor, _: Tensor) -> Gradients:
    x, weight, bias, statistics = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    gradients = _ops._instance_norm_relu_pool_backward(
        gradient, x, weight, bias, statistics, ctx.eps, wanted
    )
    return *only(gradients, wanted), None


def _norm_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, _, ctx.eps, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)


def _norm_double_backward(ctx: Any, *of_gradients: Tensor) -> Gradients:
    # The statistics are functions of x here, so what is derived again are the layers.
    tensors = ctx.saved_tensors
    with torch.enable_grad():
        aliases: list[Any] = [_differentiable(tensor) for tensor in tensors]
        gradient, *operands = aliases
        x, weight, bias = operands
        out = _norm_relu_pool_layers(x, weight, bias, ctx.eps)
        chosen = [
            (operand, of_gradient)
            for operand, want, of_gradient in zip(operands, ctx.wanted, of_gradients, strict=True)
            if want and operand is not None
        ]
        gradients = torch.autograd.grad(out, [c[0] for c in chosen], gradient, create_graph=True)
    inputs = [alias for alias in aliases if alias is not None]
    second = iter(
        torch.autograd.grad(
            gradients,
            inputs,
            [c[1] for c in chosen],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    return *(None if alias is None else next(second) for alias in aliases), None, None, None


def _differentiable(tensor: Tensor | None) -> Tensor | None:
    """The tensor as an end of derivation, with its history where it has one."""
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


torch.library.register_autograd(
    "dmfast::instance_norm_relu_pool", _norm_backward, setup_context=_norm_setup
)
torch.library.register_autograd(
    "dmfast::_instance_norm_relu_pool_backward",
    _norm_double_backward,
    setup_context=_norm_backward_setup,
)


# ---- conv_norm_relu_pool -----------------------------------------------------------------------


def conv_norm_relu_pool(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    padding: int = 1,
    precision: str | None = None,
) -> Tensor:
    """A whole ConvNet block: 3x3 convolution, instance norm, ReLU and 2x2 mean pooling.

    A bias of the convolution would cancel in the norm, so there is none.

    Args:
        x: [N, C, H, W], float64, float32, float16 or bfloat16, in any layout.
        conv_weight: [K, C, 3, 3], stride 1; or [R, K, C, 3, 3] for R networks at once, over which
            the images are split evenly. Dtype of ``x``, or float32 for float16 and bfloat16.
        weight: the norm's scale of each output channel, [K], or [R, K] with R networks. None: 1.
        bias: what is then added, like ``weight``. None: 0.
        eps: what is added to the variance, 0 or more.
        padding: of the convolution, in pixels of zeros on each side, at most 2**20. H and W must be
            at least 1, and plus twice the padding at least 4.
        precision: ``float32``: on a CPU products of 128 channels and the like by Winograd
            F(4x4, 3x3), whose result has an rms error of at most ten times plain torch's own in
            float32; on a GPU torch's convolution, with TF32 where ``torch.backends`` allows it.
            ``bfloat16``: the operands of products are also rounded to bfloat16, sums stay float32;
            on a GPU what the convolution gives, and the result, are rounded too. ``direct``:
            torch's own layers in the dtype of ``x``. None: ``bfloat16`` for bfloat16, else
            ``float32``.

    Returns:
        [N, K, H' // 2, W' // 2] with H' = H + 2 padding - 2 and W' alike, dtype of ``x``,
        channels_last. Differentiable in ``x``, ``conv_weight``, ``weight`` and ``bias``: once, or
        with ``direct`` any number of times.

        ``direct`` is also what is done for float64; on a CPU for a padding above 8, where C is
        neither at most 4 nor a multiple of 16, where K is no multiple of 16, and everywhere where
        the environment variable ``DMFAST_CPU`` says ``direct``; on a GPU where ``DMFAST_GPU`` says
        ``torch``. Its other values there: ``cudnn`` (the default), torch's convolution and
        :func:`instance_norm_relu_pool`; ``fused``, one kernel for what it takes in bfloat16, and
        ``wgmma``, its form for sm_90a.

    Raises:
        RuntimeError: the precision is unknown, a shape, dtype or device is wrong, or the images do
            not divide evenly.

    Equivalent to ``avg_pool2d(relu(group_norm(conv2d(x, conv_weight, padding=padding), K, weight,
    bias, eps)), 2)`` (:func:`dmfast.reference.conv_norm_relu_pool`).
    """
    op = "conv_norm_relu_pool"
    _checks.tensors(op, {"x": x, "conv_weight": conv_weight}, {"weight": weight, "bias": bias})
    check_precision(op, precision)
    eps, padding = check_eps(op, eps), check_padding(op, padding)
    check_block(op, x, conv_weight, weight, bias, padding)
    fused = is_fused([conv_weight], padding, precision, x.dtype)
    bfloat16 = has_bfloat16_products(precision, x.dtype)
    if not fused or x.device.type != "cpu":
        try:
            with without_autocast(x):
                if not fused:
                    return block_layers(x, conv_weight, weight, bias, eps, padding)
                return _block_on_gpu(x, conv_weight, weight, bias, eps, padding, bfloat16)
        except RuntimeError as error:
            raise _checks.of_layers(op, error) from error
    tensors = (x, conv_weight, weight, bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    try:
        operands = [None if t is None else t.float() for t in tensors]
    except RuntimeError as error:
        raise _checks.of_layers(op, error) from error
    out: Tensor = _ops.conv_norm_relu_pool(*operands, eps, padding, bfloat16, keep)[0]
    return out.to(x.dtype)


def block_layers(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding: int,
) -> Tensor:
    """The operator in torch's layers, in the dtype of x."""
    conv_weight = _of_a_network(x, conv_weight, 4).to(x.dtype)
    if conv_weight.dim() == 4:
        z = F.conv2d(x, conv_weight, padding=padding)
    else:
        pairs = zip(_of_networks(x, len(conv_weight)), conv_weight, strict=True)
        z = torch.cat([F.conv2d(part, w, padding=padding) for part, w in pairs])
    out = _norm_relu_pool_layers(z, weight, bias, eps)
    return out.contiguous(memory_format=torch.channels_last)


def _block_on_gpu(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding: int,
    bfloat16: bool,
) -> Tensor:
    """The operator in the dtype of its products, from and to that of x."""
    images = x.to(torch.bfloat16 if bfloat16 else torch.float32)
    return gpu_block(images, conv_weight, weight, bias, eps, padding).to(x.dtype)


def is_fused(
    conv_weights: Sequence[Tensor], padding: int, precision: str | None, dtype: torch.dtype
) -> bool:
    """Whether blocks of these weights, on images of that dtype, go by more than torch's layers."""
    if precision == "direct" or dtype == torch.float64:
        return False
    device = conv_weights[0].device.type
    if device != "cpu":
        return device == "cuda" and _load.has_cuda_operators() and gpu_way() != "torch"
    if padding > _LARGEST_PADDING:
        return False
    for conv_weight in conv_weights:
        filters, channels = conv_weight.shape[-4:-2]
        if filters % 16 or (channels > 4 and channels % 16):
            return False
    return not _cpu_is_direct()


@cache
def cpu_kernels() -> str:
    """The instructions that the CPU's kernels use, with ``,direct`` where they are not to be used.

    Raises:
        RuntimeError: DMFAST_CPU says what no CPU or this one does not have.
    """
    kernels: str = _ops._cpu_kernels()
    return kernels


def _cpu_is_direct() -> bool:
    """Whether DMFAST_CPU asks for torch's layers; raises what is wrong with its value."""
    return cpu_kernels().endswith("direct")


# To torch.compile the answer is a constant. torch.compiler.assume_constant_result says the same,
# but imports the whole of the compiler.
_cpu_is_direct._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.register_fake("dmfast::conv_norm_relu_pool")
def _(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    padding: int,
    bfloat16: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, height, width = x.shape
    filters = conv_weight.shape[-4]
    height, width = height + 2 * padding - 2, width + 2 * padding - 2
    out = channels_last_like(x, (n, filters, height // 2, width // 2))
    kept = keep and channels > 4
    z = channels_last_like(x, (n, filters, height, width)) if kept else x.new_empty(0)
    return out, z, x.new_empty((n, 2, filters))


@torch.library.register_fake("dmfast::_conv_norm_relu_pool_backward")
def _(
    gradient: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    statistics: Tensor,
    padding: int,
    bfloat16: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_x = channels_last_like(x, x.shape) if wanted[0] else x.new_empty(0)
    parameters = zip((conv_weight, weight, bias), wanted[1:], strict=True)
    of_conv, of_weight, of_bias = (like_parameter(p, want, x) for p, want in parameters)
    return of_x, of_conv, of_weight, of_bias


def _block_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, ctx.padding, ctx.bfloat16, _ = inputs
    _, z, statistics = output
    ctx.mark_non_differentiable(z, statistics)
    ctx.set_materialize_grads(False)  # zeros for z would take as much memory as z
    ctx.save_for_backward(*tensors, z, statistics)


def _block_backward(ctx: Any, gradient: Tensor | None, *rest: Tensor | None) -> Gradients:
    if gradient is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:4])
    gradients = _ops._conv_norm_relu_pool_backward(
        gradient, *ctx.saved_tensors, ctx.padding, ctx.bfloat16, wanted
    )
    return *only(gradients, wanted), None, None, None, None


torch.library.register_autograd(
    "dmfast::conv_norm_relu_pool", _block_backward, setup_context=_block_setup
)
register_no_second_derivative("_conv_norm_relu_pool_backward", "conv_norm_relu_pool")


# ---- shared ------------------------------------------------------------------------------------


def has_bfloat16_products(precision: str | None, dtype: torch.dtype) -> bool:
    """Whether blocks of that precision round the operands of products, for images of a dtype."""
    return (precision or str(dtype)) in ("bfloat16", "torch.bfloat16")


def check_precision(op: str, precision: str | None) -> None:
    if precision is None or (isinstance(precision, str) and precision in _PRECISIONS):
        return
    got = repr(precision) if isinstance(precision, str) else type(precision).__name__
    raise RuntimeError(
        f"{op}: precision must be 'direct', 'float32', 'bfloat16' or None, got {got}"
    )


def check_eps(op: str, eps: float) -> float:
    number = _checks.number(op, "eps", eps)
    if not number >= 0:
        raise RuntimeError(f"{op}: eps must be 0 or more, got {number}")
    return number


def check_padding(op: str, padding: int) -> int:
    number = _checks.whole(op, "padding", padding)
    if number < 0:
        raise RuntimeError(f"{op}: padding must be 0 or more, got {number}")
    if number > _MOST_PADDING:
        raise RuntimeError(f"{op}: padding must be at most 2**20, got {number}")
    return number


def _check_images(op: str, x: Tensor) -> None:
    _checks.rank(op, "x", x, 4, "[images, channels, height, width]")
    _checks.dtype(op, "x", x, *_FLOATING)


def _check_parameter(op: str, name: str, parameter: Tensor, x: Tensor) -> None:
    _checks.dtype(op, name, parameter, x.dtype, accumulation_dtype(x.dtype))


def _check_networks(op: str, x: Tensor, networks: int) -> None:
    if networks < 1 or x.shape[0] % networks:
        raise RuntimeError(
            f"{op}: the {x.shape[0]} images of x must divide evenly into the {networks} networks"
        )


def _check_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    _check_images(op, x)
    _, channels, height, width = x.shape
    if channels == 0:
        raise RuntimeError(f"{op}: x must have channels, got {list(x.shape)}")
    if height < 2 or width < 2:
        raise RuntimeError(f"{op}: x must be at least 2 pixels high and wide, got {list(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.dim() not in (1, 2) or parameter.shape[-1] != channels:
            raise RuntimeError(
                f"{op}: {name} must have shape [{channels}] or [networks, {channels}], got "
                f"{list(parameter.shape)}"
            )
        _check_parameter(op, name, parameter, x)
        if parameter.dim() == 2:
            _check_networks(op, x, parameter.shape[0])
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise RuntimeError(
            f"{op}: weight and bias must have one shape, got {list(weight.shape)} and "
            f"{list(bias.shape)}"
        )


def check_block(
    op: str,
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    padding: int,
) -> None:
    _check_images(op, x)
    _, channels, height, width = x.shape
    if conv_weight.dim() not in (4, 5) or conv_weight.shape[-3:] != (channels, 3, 3):
        raise RuntimeError(
            f"{op}: conv_weight must have shape [filters, {channels}, 3, 3] or [networks, filters, "
            f"{channels}, 3, 3], got {list(conv_weight.shape)}"
        )
    if 0 in conv_weight.shape[-4:]:
        raise RuntimeError(f"{op}: conv_weight must not be empty, got {list(conv_weight.shape)}")
    _check_parameter(op, "conv_weight", conv_weight, x)
    if conv_weight.dim() == 5:
        _check_networks(op, x, conv_weight.shape[0])
    expected = conv_weight.shape[:-3]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            if parameter.shape != expected:
                raise RuntimeError(
                    f"{op}: {name} must have shape {list(expected)} as the filters of conv_weight, "
                    f"got {list(parameter.shape)}"
                )
            _check_parameter(op, name, parameter, x)
    least = max(1, 4 - 2 * padding)
    if min(height, width) < least:
        raise RuntimeError(
            f"{op}: x must be at least {least} pixels high and wide with padding {padding}, got "
            f"{list(x.shape)}"
        )

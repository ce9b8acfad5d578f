# SPDX-License-Identifier: MIT
"""The fused operators: per operator its wrapper, its fake and its autograd (the blocks of a network
in ``_blocks.py`` and ``_convnet.py``).

Tensors are dense and live on one device. *Groups* of rows (classes, or networks, or single images)
are given by ``offsets``, int64 [G + 1]: rows ``offsets[g]`` to ``offsets[g + 1] - 1`` belong to
group g; left out, the rows are split evenly. Autocast leaves the operators alone: the dtype of the
output is what each docstring says.

What is drawn is a pure function of ``(seed, step, stream, group)`` through Philox 4x32-10 (the map
stands in ``csrc/philox.h``), never of a generator's state. ``seed`` is from 0 to 2**63 - 1;
``step`` is an int from 0 to 2**32 - 1, or an int64 tensor of one element that is read when the
operator runs; ``stream`` is the purpose.

On a GPU nothing is synchronised, and every operator can be captured in a CUDA graph. What stands in
a tensor there is not checked but made harmless: offsets and indices are clamped, rows that no group
covers are zero, parameters with NaN give NaN images, a class with rows on one side only gives a NaN
loss, a batch larger than its class begins again with its first image, a step counts modulo 2**32.

What cannot be used is named in one line: a TypeError for what is no tensor or no number, else a
ValueError or a RuntimeError.

Derivatives are those of reverse mode (``backward``, ``torch.autograd.grad``); forward mode
(``torch.func.jvp``) and ``torch.func`` transforms are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._batch_norm import conv_batch_norm_relu_pool, conv_batch_statistics
from ._blocks import conv_norm_relu_pool, instance_norm_relu_pool
from ._convnet import convnet_class_mean
from ._operators import accumulation_dtype, like_images, no_gradient
from ._operators import operators as _ops
from .augment import STRENGTH, WORDS, Column, full_strength, parse_strategy

__all__ = [
    "Stream",
    "class_mean_discrepancy",
    "conv_batch_norm_relu_pool",
    "conv_batch_statistics",
    "conv_norm_relu_pool",
    "convnet_class_mean",
    "draw_augmentation",
    "draw_batch",
    "draw_weights_",
    "gather_augment",
    "instance_norm_relu_pool",
    "siamese_augment",
]


class Stream(IntEnum):
    """The purpose of a random choice: choices of different purpose never share a counter."""

    INITIAL_IMAGES = 0
    REAL_BATCH = 1
    AUGMENTATION = 2
    WEIGHTS = 3
    EVALUATION_INITIAL_IMAGES = 4
    EVALUATION_BATCH = 5
    EVALUATION_AUGMENTATION = 6
    EVALUATION_WEIGHTS = 7
    TRAINING_BATCH = 8  # of the networks that gradient matching trains
    TRAINING_AUGMENTATION = 9
    NORM_BATCH = 10


# ---- siamese_augment ---------------------------------------------------------------------------


def siamese_augment(x: Tensor, params: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Applies to each group of images the transforms that its row of parameters selects.

    Args:
        x: images [N, C, H, W], float64, float32, float16 or bfloat16, in any layout.
        params: one row a group, [G, 13] float32; columns as in :class:`dmfast.augment.Column`. With
            G = N every image has a row of its own. Columns at their identity change no bit.
        offsets: the groups, [G + 1] int64.

    Returns:
        The augmented images, shape and dtype of ``x``, channels_last where ``x`` is and contiguous
        otherwise. Differentiable in ``x``, twice.

    Raises:
        RuntimeError: a shape or dtype is wrong, offsets do not ascend from 0 to N, the images do
            not divide evenly into the groups, or the parameters hold NaN.

    Equivalent to :func:`dmfast.reference.siamese_augment`: of each image x [C, H, W] with its row::

        x = (x + b - m) * s + m  # b, s, c and so on: the columns; m = (x + b).mean(0)
        x = (x - x.mean()) * c + x.mean()
        x = F.pad(x, (-dx, dx, -dy, dy))
        x[:, top : top + height, left : left + width] = 0
        x = x.flip(-1)
        x = F.grid_sample(x, F.affine_grid([[sx, 0, 0], [0, sy, 0]], x.shape))
        x = F.grid_sample(x, F.affine_grid([[cos, -sin, 0], [sin, cos, 0]], x.shape))
    """
    _checks.tensors("siamese_augment", {"x": x, "params": params}, {"offsets": offsets})
    if params.requires_grad:
        raise ValueError("siamese_augment: params must not require a gradient; detach them")
    out: Tensor = _ops.siamese_augment(x, params, offsets)
    return out


@torch.library.register_fake("dmfast::siamese_augment")
def _(x: Tensor, params: Tensor, offsets: Tensor | None = None) -> Tensor:
    return like_images(x)


@torch.library.register_fake("dmfast::_siamese_augment_backward")
def _(gradient: Tensor, params: Tensor, offsets: Tensor | None) -> Tensor:
    return like_images(gradient)


def _siamese_augment_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, params, offsets = inputs
    ctx.save_for_backward(params, offsets)


def _siamese_augment_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
    params, offsets = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, None, None
    return _ops._siamese_augment_backward(gradient, params, offsets), None, None


def _siamese_augment_double_backward(
    ctx: Any, gradient: Tensor
) -> tuple[Tensor | None, None, None]:
    # The transforms are affine in the images: the adjoint of the adjoint is their linear part,
    # which is all of them but the brightness.
    params, offsets = ctx.saved_tensors
    if not ctx.needs_input_grad[0]:
        return None, None, None
    linear = params.clone()
    linear[:, Column.BRIGHTNESS] = 0
    return _ops.siamese_augment(gradient, linear, offsets), None, None


torch.library.register_autograd(
    "dmfast::siamese_augment", _siamese_augment_backward, setup_context=_siamese_augment_setup
)
torch.library.register_autograd(
    "dmfast::_siamese_augment_backward",
    _siamese_augment_double_backward,
    setup_context=_siamese_augment_setup,
)


# ---- gather_augment ----------------------------------------------------------------------------


def gather_augment(
    images: Tensor,
    index: Tensor,
    params: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    offsets: Tensor | None = None,
) -> Tensor:
    """Picks images, normalises and augments them, in one pass.

    Args:
        images: [M, H, W, C], uint8 (scaled to [0, 1]) or float32 (taken as they are), any strides:
            a synthetic set [M, C, H, W] passes ``images.permute(0, 2, 3, 1)``, mean 0 and std 1.
        index: which images, [N] int64 in 0 .. M - 1.
        params: one row of augmentation parameters a group, [G, 13] float32, as in
            :func:`siamese_augment`.
        mean: what is subtracted from each channel, [C] float32.
        std: what each channel is then divided by, [C] float32.
        dtype: of the output: float64, float32, float16 or bfloat16.
        offsets: the groups of ``index``, [G + 1] int64.

    Returns:
        [N, C, H, W] in ``dtype``, channels_last. There is no gradient: use :func:`siamese_augment`
        for images that are learned.

    Raises:
        RuntimeError: as :func:`siamese_augment`, or an index is out of range.

    Equivalent to :func:`dmfast.reference.gather_augment`: for bytes ::

        siamese_augment(
            ((images[index] / 255 - mean) / std).permute(0, 3, 1, 2), params, offsets
        ).to(dtype)
    """
    required = {"images": images, "index": index, "params": params, "mean": mean, "std": std}
    _checks.tensors("gather_augment", required, {"offsets": offsets})
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"gather_augment: dtype must be a torch.dtype, got {type(dtype).__name__}")
    for name in ("images", "params", "mean", "std"):
        if required[name].requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"gather_augment: {name} must not require a gradient, there is none; detach it, or "
                "use siamese_augment for images that are learned"
            )
    out: Tensor = _ops.gather_augment(images, index, params, mean, std, dtype, offsets)
    return out


@torch.library.register_fake("dmfast::gather_augment")
def _(
    images: Tensor,
    index: Tensor,
    params: Tensor,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
    offsets: Tensor | None = None,
) -> Tensor:
    _, height, width, channels = images.shape
    shape = (index.shape[0], channels, height, width)
    return images.new_empty(shape, dtype=dtype).to(memory_format=torch.channels_last)


# ---- class_mean_discrepancy --------------------------------------------------------------------


def class_mean_discrepancy(
    real: Tensor,
    syn: Tensor,
    classes: int,
    real_offsets: Tensor | None = None,
    syn_offsets: Tensor | None = None,
) -> Tensor:
    """Sum over the classes of the squared distance between the mean embeddings (equation 5).

    Args:
        real: embeddings of real images [N, D], rows grouped by class.
        syn: embeddings of synthetic images [M, D], rows grouped by class.
        classes: how many classes there are, K.
        real_offsets: the rows of each class in ``real``, [K + 1] int64.
        syn_offsets: the rows of each class in ``syn``, [K + 1] int64.

    Returns:
        A scalar: float64 where an input is float64, else float32; sums are accumulated in that type
        and in a fixed order. A class without rows adds nothing. Differentiable in both inputs,
        twice.

    Raises:
        RuntimeError: a shape or dtype is wrong, the offsets do not fit the rows, or a class has
            rows on one side only.

    Equivalent to :func:`dmfast.reference.class_mean_discrepancy`: for even classes ::

        sum(
            ((r.mean(0) - s.mean(0)) ** 2).sum()
            for r, s in zip(real.chunk(classes), syn.chunk(classes))
        )
    """
    op = "class_mean_discrepancy"
    optional = {"real_offsets": real_offsets, "syn_offsets": syn_offsets}
    _checks.tensors(op, {"real": real, "syn": syn}, optional)
    classes = _checks.whole(op, "classes", classes)
    loss: Tensor = _ops.class_mean_discrepancy(real, syn, classes, real_offsets, syn_offsets)[0]
    return loss


@torch.library.register_fake("dmfast::class_mean_discrepancy")
def _(
    real: Tensor,
    syn: Tensor,
    classes: int,
    real_offsets: Tensor | None = None,
    syn_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(real.dtype, syn.dtype)
    shape = (classes, real.shape[1])
    return real.new_empty((), dtype=dtype), real.new_empty(shape, dtype=dtype)


@torch.library.register_fake("dmfast::_class_mean")
def _(rows: Tensor, classes: int, offsets: Tensor | None) -> Tensor:
    return rows.new_empty((classes, rows.shape[1]), dtype=accumulation_dtype(rows.dtype))


@torch.library.register_fake("dmfast::_class_mean_backward")
def _(gradient: Tensor, rows: int, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty((rows, gradient.shape[1]), dtype=dtype)


def _discrepancy_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    real, syn, _, real_offsets, syn_offsets = inputs
    ctx.save_for_backward(output[1], real_offsets, syn_offsets)
    ctx.sides = (real.shape[0], real.dtype), (syn.shape[0], syn.dtype)


def _discrepancy_backward(
    ctx: Any, loss_gradient: Tensor, difference_gradient: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    difference, *offsets = ctx.saved_tensors
    total = 2 * loss_gradient * difference + difference_gradient
    gradients: list[Tensor | None] = [None, None]
    for side, (rows, dtype) in enumerate(ctx.sides):
        if ctx.needs_input_grad[side]:
            signed = (-total if side else total).to(accumulation_dtype(dtype))
            gradients[side] = _ops._class_mean_backward(signed, rows, offsets[side], dtype)
    return gradients[0], gradients[1], None, None, None


def _class_mean_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, _, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.rows, ctx.dtype = rows.shape[0], rows.dtype


def _class_mean_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (offsets,) = ctx.saved_tensors
    return _ops._class_mean_backward(gradient, ctx.rows, offsets, ctx.dtype), None, None


def _class_mean_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gradient, _, offsets, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.classes = gradient.shape[0]


def _class_mean_double_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    # Means and their gradient are each other's adjoint.
    (offsets,) = ctx.saved_tensors
    return _ops._class_mean(gradient, ctx.classes, offsets), None, None, None


torch.library.register_autograd(
    "dmfast::class_mean_discrepancy", _discrepancy_backward, setup_context=_discrepancy_setup
)
torch.library.register_autograd(
    "dmfast::_class_mean", _class_mean_gradient, setup_context=_class_mean_setup
)
torch.library.register_autograd(
    "dmfast::_class_mean_backward",
    _class_mean_double_backward,
    setup_context=_class_mean_backward_setup,
)


# ---- draw_augmentation -------------------------------------------------------------------------


def draw_augmentation(
    strategy: str,
    groups: int,
    size: tuple[int, int],
    seed: int,
    step: int | Tensor,
    *,
    rows: int = 1,
    first_group: int = 0,
    stream: int,
    strength: Mapping[str, float] | None = None,
    mode: str = "single",
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws rows of augmentation parameters.

    Args:
        strategy: words joined by underscores, as ``color_crop_cutout_flip_scale_rotate``, or none.
        groups: how many groups, G.
        size: (H, W) of the images, in pixels.
        seed: 0 <= seed < 2**63.
        step: iteration, or epoch, or batch.
        rows: rows a group, R, which share the transform and have numbers of their own.
        first_group: group g is drawn as group ``first_group + g``.
        stream: the purpose, a :class:`Stream`.
        strength: published names (:data:`dmfast.augment.STRENGTH`) with other values.
        mode: ``single`` draws one of the words for each group (published mode S), ``all`` applies
            all of them (mode M); they are applied in the order of the table, so ``all`` takes them
            in that order only.
        device: where the table is to live; by default that of a step tensor, else the CPU.

    Returns:
        [G * R, 13] float32, for :func:`siamese_augment` and :func:`gather_augment`.

    Raises:
        InputError: the strategy or a strength is unknown or out of range.
        ValueError: the mode is unknown, or the strategy's order is not the table's in mode ``all``.

    Equivalent in distribution to ``randint`` over the words, once a group, then to a ``uniform_``
    or a ``randint`` a column, within the ranges that :data:`dmfast.augment.STRENGTH` gives.
    """
    op = "draw_augmentation"
    words = parse_strategy(strategy)
    if mode not in ("single", "all"):
        raise ValueError(f"draw_augmentation: mode must be 'single' or 'all', got {mode!r}")
    codes = [WORDS.index(word) for word in words]
    if mode == "all" and codes != sorted(set(codes)):
        raise ValueError(
            f"draw_augmentation: mode 'all' applies transforms in the order {'_'.join(WORDS)}, got "
            f"{strategy!r}; draw and apply them one after another for another order"
        )
    values = STRENGTH if strength is None else full_strength(strength)
    height, width = _checks.size(op, size)
    seed, number, tensor, stream = _checks.key(op, seed, step, stream)
    groups, rows, first_group = (
        _checks.whole(op, name, value)
        for name, value in (("groups", groups), ("rows", rows), ("first_group", first_group))
    )
    if groups < 0 or rows < 0:
        raise ValueError(f"{op}: groups and rows must be 0 or more, got {groups} and {rows}")
    total = _checks.whole(op, "groups * rows", groups * rows)
    if device is None and tensor is not None:
        device = tensor.device
    device = _checks.device(op, "cpu" if device is None else device)
    try:
        params = torch.empty(total, len(Column), dtype=torch.float32, device=device)
    except RuntimeError as error:
        raise type(error)(f"{op}: no memory for {groups} groups of {rows} rows") from error
    _checks.tensors(op, {"params": params}, {"step": tensor})
    _ops.draw_augmentation_(
        params,
        codes,
        mode == "all",
        groups,
        rows,
        height,
        width,
        [values[name] for name in STRENGTH],
        seed,
        number,
        tensor,
        first_group,
        stream,
    )
    return params


@torch.library.register_fake("dmfast::draw_augmentation_")
def _(params: Tensor, *rest: Any) -> None:
    return None


# ---- draw_batch --------------------------------------------------------------------------------


def draw_batch(
    order: Tensor,
    class_offsets: Tensor,
    offsets: Tensor,
    rows: int,
    seed: int,
    step: int | Tensor,
    *,
    first_class: int = 0,
    stream: int,
) -> Tensor:
    """Draws a batch of each class, without replacement within a class.

    Args:
        order: indices of the images sorted by class, [M] int64.
        class_offsets: images ``order[class_offsets[k]:class_offsets[k + 1]]`` are class k's,
            [K + 1] int64.
        offsets: rows ``offsets[k]`` to ``offsets[k + 1] - 1`` of the result are class k's, [K + 1]
            int64 (:meth:`dmfast.data.ImageData.batch_offsets`).
        rows: how many rows there are, the last of ``offsets``.
        seed: 0 <= seed < 2**63.
        step: iteration, or epoch.
        first_class: class k is drawn as class ``first_class + k``.
        stream: the purpose, a :class:`Stream`.

    Returns:
        Indices of images [rows] int64: each class's are the first of a keyed permutation of it.

    Raises:
        RuntimeError: offsets do not ascend or do not fit, or a class has fewer images than rows.

    Equivalent in distribution to, for the images a to b and the n rows of each class ::

        order[a:b][torch.randperm(b - a)[:n]]
    """
    op = "draw_batch"
    seed, number, tensor, stream = _checks.key(op, seed, step, stream)
    required = {"order": order, "class_offsets": class_offsets, "offsets": offsets}
    _checks.tensors(op, required, {"step": tensor})
    rows = _checks.whole(op, "rows", rows)
    first_class = _checks.whole(op, "first_class", first_class)
    index: Tensor = _ops.draw_batch(
        order, class_offsets, offsets, rows, seed, number, tensor, first_class, stream
    )
    return index


@torch.library.register_fake("dmfast::draw_batch")
def _(order: Tensor, class_offsets: Tensor, offsets: Tensor, rows: int, *rest: Any) -> Tensor:
    return order.new_empty(rows)


# ---- draw_weights_ -----------------------------------------------------------------------------


def draw_weights_(
    tensors: Sequence[Tensor],
    bounds: Sequence[float],
    seed: int,
    step: int | Tensor,
    *,
    networks: int | None = None,
    first_network: int = 0,
    stream: int,
) -> None:
    """Fills the tensors of a network in place, each uniformly in [-bound, bound).

    With bound 1 / sqrt(fan in) that is torch's default initialisation of convolutions and linear
    layers, of weights and biases alike.

    Args:
        tensors: weights of any shape and layout, float64, float32, float16 or bfloat16; drawn in
            float32. Elements are numbered through the list, in logical order.
        bounds: one a tensor, 0 or more.
        seed: 0 <= seed < 2**63.
        step: iteration.
        networks: R: each tensor has a leading axis of R networks; network r is drawn as network
            ``first_network + r`` alone would be.
        first_network: the number of the first network.
        stream: the purpose, a :class:`Stream`.

    Raises:
        RuntimeError: lengths, shapes or bounds do not fit, or a tensor overlaps itself.

    Equivalent in distribution to ``tensor.uniform_(-bound, bound)`` for each tensor.
    """
    op = "draw_weights_"
    tensors, bounds = _checks.listed(op, "tensors", tensors), _checks.numbers(op, "bounds", bounds)
    seed, number, step_tensor, stream = _checks.key(op, seed, step, stream)
    networks = None if networks is None else _checks.whole(op, "networks", networks)
    first_network = _checks.whole(op, "first_network", first_network)
    if len(bounds) != len(tensors):
        raise RuntimeError(
            f"{op}: bounds must have one element a tensor ({len(tensors)}), got {len(bounds)}"
        )
    if not tensors:
        return
    named = {f"tensor {i}": tensor for i, tensor in enumerate(tensors)}
    _checks.tensors(op, named, {"step": step_tensor})
    compiling = torch.compiler.is_compiling()
    for name, tensor in named.items():
        if not compiling and tensor.is_neg():
            raise RuntimeError(f"{op}: {name} must not be a view that negates; clone it first")
    detached = [tensor.detach() for tensor in tensors]
    _ops.draw_weights_(
        detached,
        bounds,
        seed,
        number,
        step_tensor,
        networks,
        first_network,
        stream,
    )
    if not compiling:
        # So that a backward that still needs the old values says so.
        torch.autograd.graph.increment_version(
            [tensor for tensor in detached if not tensor.is_inference()]
        )


@torch.library.register_fake("dmfast::draw_weights_")
def _(tensors: Sequence[Tensor], *rest: Any) -> None:
    return None


for _name in ("gather_augment", "draw_batch"):
    no_gradient(_name)

# SPDX-License-Identifier: MIT
"""The gradient-free pass over real images as one operator: its wrapper, fake and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import _checks
from ._blocks import block_layers, check_eps, check_padding, check_precision, is_fused
from ._gpu_blocks import gpu_block, is_whole, packed_weights
from ._operators import no_gradient, without_autocast
from ._operators import operators as _ops
from .augment import Column

# Torch's layers are given so many images at once that the largest output of a convolution has at
# most so many elements: 256 images of CIFAR-10 at 128 channels.
_ELEMENTS_OF_A_SLICE = 2**25
# On a GPU the largest that a slice writes is to be read again while it is in the second-level
# cache: 32 MiB, of the 50 MB of an H100. Not measured yet.
_BYTES_OF_A_SLICE = 2**25
# Elements that are gathered at once there; more would only take memory.
_ELEMENTS_GATHERED = 2**26


def convnet_class_mean(
    images: Tensor,
    index: Tensor,
    offsets: Tensor,
    params: Tensor,
    mean: Tensor,
    std: Tensor,
    weights: Sequence[Tensor],
    *,
    padding: int = 1,
    eps: float = 1e-5,
    precision: str | None = None,
) -> Tensor:
    """The mean embedding of each group of real images, without a gradient.

    Picks images, normalises and augments them, passes them through the blocks of a ConvNet and
    takes the mean of each group: the first of the two means of equation 5 for every class, in one
    call that keeps no activations (on a GPU the embeddings only, until their means are taken).

    Args:
        images: [M, H, W, C], uint8 (scaled to [0, 1]) or float32, as in :func:`gather_augment`.
        index: which images, grouped, [N] int64 in 0 .. M - 1.
        offsets: the groups of ``index``, [G + 1] int64.
        params: one row of augmentation parameters a group, [G, 13] float32.
        mean: what is subtracted from each channel, [C] float32.
        std: what each channel is then divided by, [C] float32.
        weights: for each block three float32 tensors: the convolution's weight [K, C, 3, 3] (C as
            the block before gives), the norm's weight [K] and the norm's bias [K].
        padding: of the first block's convolution, at most 2**20; that of the others is 1.
        eps: what the norms add to variances, 0 or more.
        precision: ``float32`` (None too), ``bfloat16`` or ``direct``, as in
            :func:`conv_norm_relu_pool`; ``direct`` is also what is done where that says so for any
            of the blocks. On a GPU ``bfloat16`` is also what passes from block to block.

    Returns:
        [G, D] float32: the means, accumulated in float32 in a fixed order, of the last block's
        output, flattened (C, H, W). A group without images has mean 0.

    Raises:
        ValueError: a tensor requires a gradient, and gradients are enabled.
        RuntimeError: the precision is unknown, a shape, dtype or device is wrong, the images are
            too small for so many blocks, an index is out of range, offsets do not ascend from 0 to
            N, or the parameters hold NaN.

    Equivalent to :func:`dmfast.reference.convnet_class_mean`.
    """
    op = "convnet_class_mean"
    weights = _checks.listed(op, "weights", weights)
    named = {"images": images, "index": index, "offsets": offsets, "params": params}
    named |= {"mean": mean, "std": std}
    named |= {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    _checks.tensors(op, named)
    for name, tensor in named.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} must not require a gradient, there is none; call it under "
                "torch.no_grad()"
            )
    check_precision(op, precision)
    eps, padding = check_eps(op, eps), check_padding(op, padding)
    _check_shapes(op, images, index, offsets, params, mean, std)
    _check_weights(op, images, weights, padding)
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(op, images, index, offsets, params)
    bfloat16 = precision == "bfloat16"
    fused = is_fused(weights[::3], padding, precision, torch.float32)
    if fused and images.device.type == "cpu":
        means: Tensor = _ops.convnet_class_mean(
            images, index, offsets, params, mean, std, weights, padding, eps, bfloat16
        )
        return means
    try:
        with torch.no_grad(), without_autocast(images):
            if fused:
                dtype = torch.bfloat16 if bfloat16 else torch.float32
                return _on_gpu(
                    images, index, offsets, params, mean, std, weights, padding, eps, dtype
                )
            return _in_layers(images, index, offsets, params, mean, std, weights, padding, eps)
    except RuntimeError as error:
        raise _checks.of_layers(op, error) from error


def _in_layers(
    images: Tensor,
    index: Tensor,
    offsets: Tensor,
    params: Tensor,
    mean: Tensor,
    std: Tensor,
    weights: Sequence[Tensor],
    padding: int,
    eps: float,
) -> Tensor:
    groups, rows = len(offsets) - 1, len(index)
    sides = _sides(images, len(weights) // 3, padding)
    largest = max(
        len(weight) * height * width
        for weight, (height, width) in zip(weights[::3], sides, strict=True)
    )
    step = max(1, _ELEMENTS_OF_A_SLICE // largest)
    counts = offsets.diff().clamp(min=1)[:, None]
    means = images.new_zeros((groups, _features(weights, sides)), dtype=torch.float32)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        # The groups as this slice sees them; those outside of it are empty.
        part = (offsets - first).clamp(0, count)
        x = _ops.gather_augment(
            images, index[first : first + count], params, mean, std, torch.float32, part
        )
        for block in range(len(sides)):
            conv_weight, weight, bias = weights[3 * block : 3 * block + 3]
            x = block_layers(x, conv_weight, weight, bias, eps, 1 if block else padding)
        means += _ops._class_mean(x.flatten(1), groups, part) * (part.diff()[:, None] / counts)
    return means


def _on_gpu(
    images: Tensor,
    index: Tensor,
    offsets: Tensor,
    params: Tensor,
    mean: Tensor,
    std: Tensor,
    weights: Sequence[Tensor],
    padding: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """The operator with blocks in that dtype, in slices; the embeddings of all are kept.

    A function of tensors of any device that has the operators.
    """
    groups, rows = len(offsets) - 1, len(index)
    sides = _sides(images, len(weights) // 3, padding)
    if rows == 0:
        return images.new_zeros((groups, _features(weights, sides)), dtype=torch.float32)
    per_slice, at_once = 0, max(1, _ELEMENTS_GATHERED // images.shape[1:].numel())
    blocks: list[tuple[tuple[Tensor, Tensor, Tensor], int, Tensor | None]] = []
    embeddings: list[Tensor] = []
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        # The groups as these images see them; those outside of them are empty.
        part = offsets if count == rows else (offsets - first).clamp(0, count)
        chosen = index[first : first + count]
        x = _ops.gather_augment(images, chosen, params, mean, std, dtype, part)
        if not blocks:
            blocks, per_slice = _blocks_on_gpu(x, weights, sides, padding)
        for slice_ in x.split(per_slice):
            for block, block_padding, packed in blocks:
                slice_ = gpu_block(slice_, *block, eps, block_padding, packed)
            embeddings.append(slice_.permute(0, 2, 3, 1).flatten(1))
    means: Tensor = _ops._class_mean(torch.cat(embeddings), groups, offsets)
    height, width = sides[-1]
    # From channels_last to the order of an embedding.
    return means.view(groups, height // 2, width // 2, -1).permute(0, 3, 1, 2).flatten(1)


def _blocks_on_gpu(
    x: Tensor, weights: Sequence[Tensor], sides: Sequence[tuple[int, int]], padding: int
) -> tuple[list[tuple[tuple[Tensor, Tensor, Tensor], int, Tensor | None]], int]:
    """The weights of each block in the dtype of x, with its padding and, where it is one kernel,
    what that reads of them; and how many images a slice takes."""
    blocks: list[tuple[tuple[Tensor, Tensor, Tensor], int, Tensor | None]] = []
    largest = 1
    like = x[:0]
    for block, (height, width) in enumerate(sides):
        conv_weight, weight, bias = weights[3 * block : 3 * block + 3]
        of_block = 1 if block else padding
        filters, packed, written = len(conv_weight), None, height * width
        if is_whole(like, conv_weight, of_block, x.dtype, backward=False):
            packed = packed_weights(like, conv_weight, of_block)
            written //= 4
        else:
            conv_weight = conv_weight.to(x.dtype, memory_format=torch.channels_last)
        blocks.append(((conv_weight, weight, bias), of_block, packed))
        largest = max(largest, filters * written * x.element_size())
        like = x.new_empty((0, filters, height // 2, width // 2))
    return blocks, max(1, _BYTES_OF_A_SLICE // largest)


def _sides(images: Tensor, blocks: int, padding: int) -> list[tuple[int, int]]:
    """What each block's convolution makes of the images' height and width."""
    _, height, width, _ = images.shape
    sides = []
    for block in range(blocks):
        grown = 2 * (1 if block else padding) - 2
        height, width = height + grown, width + grown
        sides.append((height, width))
        height, width = height // 2, width // 2
    return sides


def _features(weights: Sequence[Tensor], sides: Sequence[tuple[int, int]]) -> int:
    height, width = sides[-1]
    return weights[-3].shape[0] * (height // 2) * (width // 2)


@torch.library.register_fake("dmfast::convnet_class_mean")
def _(
    images: Tensor,
    index: Tensor,
    offsets: Tensor,
    params: Tensor,
    mean: Tensor,
    std: Tensor,
    weights: Sequence[Tensor],
    padding: int,
    eps: float,
    bfloat16: bool,
) -> Tensor:
    features = _features(weights, _sides(images, len(weights) // 3, padding))
    return images.new_empty((offsets.shape[0] - 1, features), dtype=torch.float32)


no_gradient("convnet_class_mean")


def _check_shapes(
    op: str,
    images: Tensor,
    index: Tensor,
    offsets: Tensor,
    params: Tensor,
    mean: Tensor,
    std: Tensor,
) -> None:
    _checks.rank(op, "images", images, 4, "[images, height, width, channels]")
    _checks.dtype(op, "images", images, torch.uint8, torch.float32)
    if 0 in images.shape[1:]:
        raise RuntimeError(f"{op}: images must have pixels, got {list(images.shape)}")
    _checks.rank(op, "index", index, 1, "[N]")
    _checks.dtype(op, "index", index, torch.int64)
    _checks.rank(op, "params", params, 2, "[groups, 13]")
    if params.shape[1] != len(Column):
        raise RuntimeError(f"{op}: params must have {len(Column)} columns, got {params.shape[1]}")
    _checks.dtype(op, "params", params, torch.float32)
    _checks.rank(op, "offsets", offsets, 1, "[groups + 1]")
    _checks.dtype(op, "offsets", offsets, torch.int64)
    if offsets.shape[0] != params.shape[0] + 1:
        raise RuntimeError(
            f"{op}: offsets must have {params.shape[0] + 1} elements (groups + 1), got "
            f"{offsets.shape[0]}"
        )
    for name, tensor in (("mean", mean), ("std", std)):
        _checks.dtype(op, name, tensor, torch.float32)
        if tensor.shape != images.shape[3:]:
            raise RuntimeError(
                f"{op}: {name} must have one element a channel ({images.shape[3]}), got "
                f"{list(tensor.shape)}"
            )
    named = {"index": index, "params": params, "offsets": offsets, "mean": mean, "std": std}
    for name, tensor in named.items():
        if not tensor.is_contiguous():
            raise RuntimeError(f"{op}: {name} must be contiguous")


def _check_weights(op: str, images: Tensor, weights: Sequence[Tensor], padding: int) -> None:
    if not weights or len(weights) % 3:
        raise RuntimeError(
            f"{op}: weights must have 3 tensors a block (convolution, norm weight, norm bias), got "
            f"{len(weights)}"
        )
    channels = images.shape[3]
    for i, weight in enumerate(weights):
        _checks.dtype(op, f"weights[{i}]", weight, torch.float32)
        if i % 3 == 0:
            if weight.dim() != 4 or weight.shape[1:] != (channels, 3, 3) or 0 in weight.shape:
                raise RuntimeError(
                    f"{op}: weights[{i}] must have shape [filters, {channels}, 3, 3], got "
                    f"{list(weight.shape)}"
                )
            channels = weight.shape[0]
        elif weight.shape != (channels,):
            raise RuntimeError(
                f"{op}: weights[{i}] must have shape [{channels}], got {list(weight.shape)}"
            )
    for block, (height, width) in enumerate(_sides(images, len(weights) // 3, padding)):
        if height < 2 or width < 2:
            raise RuntimeError(
                f"{op}: images must leave 2x2 pixels for each block to pool, got "
                f"{images.shape[1]}x{images.shape[2]}, which leaves {max(0, height)}x"
                f"{max(0, width)} in block {block + 1}"
            )


def _check_values(op: str, images: Tensor, index: Tensor, offsets: Tensor, params: Tensor) -> None:
    """What lies on a GPU is not read."""
    positions = offsets.tolist()
    if positions[0] != 0:
        raise RuntimeError(f"{op}: offsets must start at 0, got {positions[0]}")
    for g, (here, after) in enumerate(pairwise(positions)):
        if here > after:
            raise RuntimeError(
                f"{op}: offsets must ascend, got {here} before {after} at position {g}"
            )
    if positions[-1] != len(index):
        raise RuntimeError(
            f"{op}: offsets must end at the number of rows {len(index)}, got {positions[-1]}"
        )
    if len(index) and not len(images):
        raise RuntimeError(f"{op}: images must not be empty where an index is given")
    outside = (index < 0) | (index >= len(images))
    if outside.any():
        position = int(outside.int().argmax())
        raise RuntimeError(
            f"{op}: index must be from 0 to {len(images) - 1}, got {int(index[position])} at "
            f"position {position}"
        )
    nan = params.isnan()
    if nan.any():
        row, column = divmod(int(nan.int().argmax()), params.shape[1])
        raise RuntimeError(f"{op}: params must not hold NaN, got one in row {row}, column {column}")

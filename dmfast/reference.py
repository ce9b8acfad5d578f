# SPDX-License-Identifier: MIT
"""The operators of :mod:`dmfast.ops` in plain torch, with the same signatures.

The oracle of the tests and the words to read when a formula is in doubt: written to be checked by
eye, not to be fast. Sampling is left to torch's own ``affine_grid`` and ``grid_sample``, gradients
to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import IDENTITY, Column, full_strength, parse_strategy

_LOW = 0xFFFFFFFF


# ---- Groups ------------------------------------------------------------------------------------


def _group_of_row(offsets: Tensor | None, groups: int, rows: int) -> Tensor:
    if offsets is None:
        return torch.arange(groups).repeat_interleave(rows // groups if groups else 0)
    return torch.arange(groups).repeat_interleave(offsets.diff())


# ---- siamese_augment ---------------------------------------------------------------------------


def siamese_augment(x: Tensor, params: Tensor, offsets: Tensor | None = None) -> Tensor:
    """As :func:`dmfast.ops.siamese_augment`."""
    if x.numel() == 0:
        return x.clone()
    rows = params[_group_of_row(offsets, params.shape[0], x.shape[0])]
    return torch.stack([_augment(image, row) for image, row in zip(x, rows, strict=True)])


def _augment(x: Tensor, row: Tensor) -> Tensor:
    """One image [C, H, W] under one row; a step whose parameters are the identity is left out."""
    _, height, width = x.shape
    value = [float(v) for v in row]
    if value[Column.BRIGHTNESS] != 0:
        x = x + value[Column.BRIGHTNESS]
    if value[Column.SATURATION] != 1:
        mean = x.mean(0, keepdim=True)
        x = (x - mean) * value[Column.SATURATION] + mean
    if value[Column.CONTRAST] != 1:
        mean = x.mean()
        x = (x - mean) * value[Column.CONTRAST] + mean
    dy, dx = round(value[Column.CROP_Y]), round(value[Column.CROP_X])
    if dy or dx:
        # Padding by more than the image moves it out of sight; a negative pad cuts.
        dy = max(-height, min(height, dy))
        dx = max(-width, min(width, dx))
        x = F.pad(x, (-dx, dx, -dy, dy))
    top, left, tall, wide = (round(v) for v in value[Column.CUT_TOP : Column.CUT_WIDTH + 1])
    keep = torch.ones(height, width, dtype=torch.bool)
    keep[max(0, top) : max(0, top + tall), max(0, left) : max(0, left + wide)] = False
    x = torch.where(keep, x, 0)
    if value[Column.FLIP] != 0:
        x = x.flip(-1)
    sx, sy, angle = value[Column.SCALE_X], value[Column.SCALE_Y], value[Column.ANGLE]
    if sx != 1 or sy != 1:
        x = _sample(x, [[sx, 0, 0], [0, sy, 0]])
    if angle != 0:
        cos, sin = math.cos(angle), math.sin(angle)
        x = _sample(x, [[cos, -sin, 0], [sin, cos, 0]])
    return x


def _sample(x: Tensor, matrix: list[list[float]]) -> Tensor:
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32  # as the kernels' arithmetic
    theta = torch.tensor([matrix], dtype=dtype)
    grid = F.affine_grid(theta, [1, *x.shape], align_corners=False)
    sampled = F.grid_sample(x[None].to(dtype), grid, padding_mode="zeros", align_corners=False)
    return sampled[0].to(x.dtype)


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
    """As :func:`dmfast.ops.gather_augment`."""
    picked = images[index].float()
    if images.dtype == torch.uint8:
        picked = picked / 255
    x = ((picked - mean) / std).permute(0, 3, 1, 2)
    if dtype == torch.float64:
        x = x.double()
    x = siamese_augment(x, params, offsets)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


# ---- class_mean_discrepancy --------------------------------------------------------------------


def class_mean_discrepancy(
    real: Tensor,
    syn: Tensor,
    classes: int,
    real_offsets: Tensor | None = None,
    syn_offsets: Tensor | None = None,
) -> Tensor:
    """As :func:`dmfast.ops.class_mean_discrepancy`."""
    dtype = torch.float64 if torch.float64 in (real.dtype, syn.dtype) else torch.float32
    loss = torch.zeros((), dtype=dtype)
    real_class = _group_of_row(real_offsets, classes, real.shape[0])
    syn_class = _group_of_row(syn_offsets, classes, syn.shape[0])
    for k in range(classes):
        of_real, of_syn = real[real_class == k], syn[syn_class == k]
        if len(of_real):
            loss = loss + (of_real.to(dtype).mean(0) - of_syn.to(dtype).mean(0)).square().sum()
    return loss


# ---- instance_norm_relu_pool, conv_norm_relu_pool ----------------------------------------------


def instance_norm_relu_pool(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As :func:`dmfast.ops.instance_norm_relu_pool`."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # group_norm has no backward for a bias alone
    networks = len(weight) if weight is not None and weight.dim() == 2 else 1
    parts = []
    for r, part in enumerate(x.tensor_split(networks)):
        scale, shift = (p[r] if p is not None and p.dim() == 2 else p for p in (weight, bias))
        y = F.group_norm(part, part.shape[1], scale, shift, eps)
        parts.append(F.avg_pool2d(F.relu(y), 2))
    return torch.cat(parts)


def conv_norm_relu_pool(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    padding: int = 1,
    precision: str | None = None,
) -> Tensor:
    """As :func:`dmfast.ops.conv_norm_relu_pool`, in the dtype of x whatever the precision."""
    networks = conv_weight if conv_weight.dim() == 5 else conv_weight[None]
    parts = zip(x.tensor_split(len(networks)), networks, strict=True)
    z = torch.cat([F.conv2d(part, filters, padding=padding) for part, filters in parts])
    return instance_norm_relu_pool(z, weight, bias, eps)


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
    """As :func:`dmfast.ops.conv_batch_norm_relu_pool`, in the dtype of x whatever the precision."""
    z = F.conv2d(x, conv_weight, padding=padding)
    mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    if statistics is not None:
        mean, variance = statistics
    y = (z - mean[:, None, None]) / (variance[:, None, None] + eps).sqrt()
    y = y if weight is None else y * weight[:, None, None]
    y = y if bias is None else y + bias[:, None, None]
    return F.avg_pool2d(F.relu(y), 2), torch.stack([mean, variance]).detach()


def conv_batch_statistics(
    x: Tensor, conv_weight: Tensor, padding: int = 1, precision: str | None = None
) -> Tensor:
    """As :func:`dmfast.ops.conv_batch_statistics`, in the dtype of x whatever the precision."""
    return conv_batch_norm_relu_pool(x, conv_weight, padding=padding)[1]


# ---- convnet_class_mean ------------------------------------------------------------------------


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
    """As :func:`dmfast.ops.convnet_class_mean`, in the dtype of the weights."""
    x = gather_augment(images, index, params, mean, std, weights[0].dtype, offsets)
    for block in range(0, len(weights), 3):
        conv_weight, weight, bias = weights[block : block + 3]
        x = conv_norm_relu_pool(x, conv_weight, weight, bias, eps, 1 if block else padding)
    rows = [x.flatten(1)[first:end] for first, end in pairwise(offsets.tolist())]
    return torch.stack([of_group.sum(0) / max(1, len(of_group)) for of_group in rows])


# ---- Random numbers ----------------------------------------------------------------------------


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox 4x32-10 (Salmon and others, SC 2011): four words of 32 bits from four and two."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & _LOW, (p0 >> 32) ^ c[3] ^ k[1], p0 & _LOW]
        k = [(k[0] + 0x9E3779B9) & _LOW, (k[1] + 0xBB67AE85) & _LOW]
    return c


def _words(seed: int, step: int | Tensor, stream: int, group: int, element: int) -> list[int]:
    # Plain ints: NumPy's would overflow.
    return philox(
        [element, int(group), int(stream), int(step)], [int(seed) & _LOW, int(seed) >> 32]
    )


def _uniform(word: int) -> float:
    return (word >> 8) * 2.0**-24


def _below(word: int, n: int) -> int:
    return word * n >> 32


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


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
    """As :func:`dmfast.ops.draw_augmentation`."""
    words = parse_strategy(strategy)
    ratio = full_strength(strength)
    crop = [int(side * ratio["ratio_crop_pad"] + 0.5) for side in size]
    hole = [int(side * ratio["ratio_cutout"] + 0.5) for side in size]
    scale = ratio["ratio_scale"]
    table = torch.tensor(IDENTITY, dtype=torch.float32).repeat(groups * rows, 1)
    for group in range(groups):
        number = first_group + group
        selected = words
        if words and mode == "single":
            first = _words(seed, step, stream, number, 0)[0]
            selected = (words[_below(first, len(words))],)
        for r in range(rows):
            w = [
                word
                for block in range(3)
                for word in _words(seed, step, stream, number, 1 + 3 * r + block)
            ]
            row = table[group * rows + r]
            if "color" in selected:
                row[Column.BRIGHTNESS] = (_f32(_uniform(w[0])) - 0.5) * _f32(ratio["brightness"])
                row[Column.SATURATION] = _f32(_uniform(w[1])) * _f32(ratio["saturation"])
                row[Column.CONTRAST] = _f32(_uniform(w[2])) + _f32(ratio["contrast"])
            if "crop" in selected:
                row[Column.CROP_Y] = _below(w[3], 2 * crop[0] + 1) - crop[0]
                row[Column.CROP_X] = _below(w[4], 2 * crop[1] + 1) - crop[1]
            if "cutout" in selected:
                row[Column.CUT_TOP] = _below(w[5], size[0] + 1 - hole[0] % 2) - hole[0] // 2
                row[Column.CUT_LEFT] = _below(w[6], size[1] + 1 - hole[1] % 2) - hole[1] // 2
                row[Column.CUT_HEIGHT], row[Column.CUT_WIDTH] = hole
            if "flip" in selected:
                row[Column.FLIP] = _uniform(w[7]) < ratio["prob_flip"]
            if "scale" in selected:
                low, span = _f32(1 / scale), _f32(scale - 1 / scale)
                row[Column.SCALE_X] = _f32(_uniform(w[8])) * span + low
                row[Column.SCALE_Y] = _f32(_uniform(w[9])) * span + low
            if "rotate" in selected:
                angle = _f32(ratio["ratio_rotate"] / 180 * math.pi)
                row[Column.ANGLE] = (2 * _f32(_uniform(w[10])) - 1) * angle
    return table.to(device or "cpu")


def _mix(x: int) -> int:
    """MurmurHash3's 32-bit finaliser."""
    x = ((x ^ x >> 16) * 0x85EBCA6B) & _LOW
    x = ((x ^ x >> 13) * 0xC2B2AE35) & _LOW
    return x ^ x >> 16


def _shuffle(n: int, seed: int, step: int | Tensor, stream: int, group: int) -> list[int]:
    """0 .. n - 1 in the order of Durstenfeld's shuffle, a word an element."""
    order = list(range(n))
    for i in range(n):
        word = _words(seed, step, stream, group, i // 4)[i % 4]
        other = i + _below(word, n - i)
        order[i], order[other] = order[other], order[i]
    return order


def _network(i: int, n: int, keys: Sequence[int]) -> int:
    """The image of i under a Feistel network on the next power of two, walked until below n."""
    bits = (n - 1).bit_length()
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << bits - low_bits) - 1
    while True:
        low, high = i & low_mask, i >> low_bits
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            high ^= _mix((_mix(low ^ even) + even) & _LOW) & high_mask
            low ^= _mix((_mix(high ^ odd) + odd) & _LOW) & low_mask
        i = high << low_bits | low
        if i < n:
            return i


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
    """As :func:`dmfast.ops.draw_batch`."""
    starts, batch = class_offsets.tolist(), offsets.tolist()
    index = []
    for k in range(len(starts) - 1):
        images = order[starts[k] : starts[k + 1]].tolist()
        count, group = batch[k + 1] - batch[k], first_class + k
        if len(images) <= 64:
            picks = _shuffle(len(images), seed, step, stream, group)[:count]
        else:
            keys = [w for block in range(2) for w in _words(seed, step, stream, group, block)]
            picks = [_network(j, len(images), keys) for j in range(count)]
        index += [images[pick] for pick in picks]
    assert len(index) == rows
    return torch.tensor(index, dtype=torch.int64)


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
    """As :func:`dmfast.ops.draw_weights_`."""
    for r in range(1 if networks is None else networks):
        block = 0
        for tensor, bound in zip(tensors, bounds, strict=True):
            one = tensor if networks is None else tensor[r]
            values = []
            for _ in range(math.ceil(one.numel() / 4)):
                words = _words(seed, step, stream, first_network + r, block)
                values += [(2 * _f32(_uniform(word)) - 1) * _f32(bound) for word in words]
                block += 1
            with torch.no_grad():
                one.copy_(torch.stack(values)[: one.numel()].view(one.shape))

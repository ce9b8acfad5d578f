# SPDX-License-Identifier: MIT
"""What the operators are measured against, in plain torch: the published way, and a tidied one.

Both take a table of parameters as :func:`dmfast.ops.siamese_augment` does, with the groups even, in
place of drawing them, so that all contenders do the same work and their results can be compared.
``published`` is a rendering of the published augmentation: class by class in float32, index grids
for crop and cutout, a sampling matrix and a sampling grid an image. ``tidied`` is what a careful
engineer makes of it with torch's own functions: all classes in one call, one matrix and one grid
a class, no index grids. ``WORDS`` name the transforms; a call applies those that the table's rows
select, which are the same for all of its rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dmfast.augment import Column

Augment = Callable[[Tensor, Tensor], Tensor]

# ---- published ---------------------------------------------------------------------------------


def _published_color(x: Tensor, row: Tensor) -> Tensor:
    def drawn(column: Column) -> Tensor:
        return row[column].repeat(x.shape[0]).view(-1, 1, 1, 1)

    x = x + drawn(Column.BRIGHTNESS)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * drawn(Column.SATURATION) + mean
    mean = x.mean(dim=[1, 2, 3], keepdim=True)
    return (x - mean) * drawn(Column.CONTRAST) + mean


def _index_grids(x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    ranges = [torch.arange(n, device=x.device) for n in (x.shape[0], height, width)]
    images, rows, columns = torch.meshgrid(*ranges, indexing="ij")
    return images, rows, columns


def _published_crop(x: Tensor, row: Tensor) -> Tensor:
    shift = [
        row[column].long().repeat(x.shape[0]).view(-1, 1, 1)
        for column in (Column.CROP_Y, Column.CROP_X)
    ]
    images, rows, columns = _index_grids(x, *x.shape[2:])
    rows = torch.clamp(rows + shift[0] + 1, 0, x.shape[2] + 1)
    columns = torch.clamp(columns + shift[1] + 1, 0, x.shape[3] + 1)
    padded = F.pad(x, [1, 1, 1, 1])
    return padded.permute(0, 2, 3, 1).contiguous()[images, rows, columns].permute(0, 3, 1, 2)


def _published_cutout(x: Tensor, row: Tensor) -> Tensor:
    top, left, height, width = (int(v) for v in row[Column.CUT_TOP : Column.CUT_WIDTH + 1])
    images, rows, columns = _index_grids(x, height, width)
    rows = torch.clamp(rows + torch.full((x.shape[0], 1, 1), top, device=x.device), 0)
    columns = torch.clamp(columns + torch.full((x.shape[0], 1, 1), left, device=x.device), 0)
    mask = torch.ones(x.shape[0], *x.shape[2:], dtype=x.dtype, device=x.device)
    mask[images, rows.clamp(max=x.shape[2] - 1), columns.clamp(max=x.shape[3] - 1)] = 0
    return x * mask.unsqueeze(1)


def _published_flip(x: Tensor, row: Tensor) -> Tensor:
    mirrored = row[Column.FLIP].repeat(x.shape[0]).view(-1, 1, 1, 1)
    return torch.where(mirrored > 0.5, x.flip(3), x)


def _published_sample(x: Tensor, matrices: list[list[list[Tensor]]]) -> Tensor:
    theta = torch.tensor(matrices, dtype=torch.float)  # a list of tensors with one element each
    grid = F.affine_grid(theta, x.shape, align_corners=False).to(x.device)
    return F.grid_sample(x, grid, align_corners=False)


def _published_scale(x: Tensor, row: Tensor) -> Tensor:
    sx = row[Column.SCALE_X].cpu().repeat(x.shape[0])
    sy = row[Column.SCALE_Y].cpu().repeat(x.shape[0])
    zero = torch.tensor(0.0)
    return _published_sample(
        x, [[[sx[i], zero, zero], [zero, sy[i], zero]] for i in range(x.shape[0])]
    )


def _published_rotate(x: Tensor, row: Tensor) -> Tensor:
    angle = row[Column.ANGLE].cpu().repeat(x.shape[0])
    zero = torch.tensor(0.0)
    return _published_sample(
        x,
        [[[torch.cos(a), torch.sin(-a), zero], [torch.sin(a), torch.cos(a), zero]] for a in angle],
    )


def published(word: str) -> Augment:
    """One of the transforms, class by class in float32."""
    transform = {
        "color": _published_color,
        "crop": _published_crop,
        "cutout": _published_cutout,
        "flip": _published_flip,
        "scale": _published_scale,
        "rotate": _published_rotate,
    }[word]

    def augment(x: Tensor, params: Tensor) -> Tensor:
        batches = x.float().chunk(len(params))
        return torch.cat(
            [transform(batch, row) for batch, row in zip(batches, params, strict=True)]
        )

    return augment


def published_discrepancy(real: Tensor, syn: Tensor, classes: int) -> Tensor:
    """The loss, class by class."""
    loss = torch.zeros((), device=real.device)
    for of_real, of_syn in zip(real.chunk(classes), syn.chunk(classes), strict=True):
        loss = loss + torch.sum((of_real.mean(dim=0) - of_syn.mean(dim=0)) ** 2)
    return loss


# ---- tidied ------------------------------------------------------------------------------------


def _by_group(x: Tensor, params: Tensor) -> Tensor:
    """[N, C, H, W] as [groups, N / groups, C, H, W]."""
    return x.unflatten(0, (len(params), -1))


def _column(params: Tensor, column: Column, like: Tensor) -> Tensor:
    return params[:, column].to(like.dtype).view(-1, 1, 1, 1, 1)


def _tidied_color(x: Tensor, params: Tensor) -> Tensor:
    images = _by_group(x, params) + _column(params, Column.BRIGHTNESS, x)
    mean = images.mean(2, keepdim=True)
    images = torch.lerp(mean, images, _column(params, Column.SATURATION, x))
    mean = images.mean((2, 3, 4), keepdim=True)
    return torch.lerp(mean, images, _column(params, Column.CONTRAST, x)).flatten(0, 1)


def _tidied_crop(x: Tensor, params: Tensor) -> Tensor:
    shifts = params[:, [Column.CROP_Y, Column.CROP_X]].int().tolist()
    return torch.cat(
        [
            F.pad(images, (-dx, dx, -dy, dy))
            for images, (dy, dx) in zip(x.chunk(len(params)), shifts, strict=True)
        ]
    )


def _tidied_cutout(x: Tensor, params: Tensor) -> Tensor:
    mask = torch.ones(len(params), 1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    holes = params[:, Column.CUT_TOP : Column.CUT_WIDTH + 1].int().tolist()
    for hole, row in zip(mask, holes, strict=True):
        top, left, height, width = row
        hole[..., max(top, 0) : top + height, max(left, 0) : left + width] = 0
    return (_by_group(x, params) * mask).flatten(0, 1)


def _tidied_flip(x: Tensor, params: Tensor) -> Tensor:
    if bool((params[:, Column.FLIP] != 0).all()):
        return x.flip(3)
    mirrored = (params[:, Column.FLIP] != 0).view(-1, 1, 1, 1, 1)
    images = _by_group(x, params)
    return torch.where(mirrored, images.flip(4), images).flatten(0, 1)


def _tidied_sample(x: Tensor, theta: Tensor) -> Tensor:
    size = [len(theta), 1, *x.shape[2:]]
    grid = F.affine_grid(theta, size, align_corners=False)
    grid = grid.unsqueeze(1).expand(-1, x.shape[0] // len(theta), -1, -1, -1).flatten(0, 1)
    # torch has no sampling of bfloat16 on the CPU.
    return F.grid_sample(x.float(), grid, align_corners=False).to(x.dtype)


def _tidied_scale(x: Tensor, params: Tensor) -> Tensor:
    factors = params[:, [Column.SCALE_X, Column.SCALE_Y]]
    return _tidied_sample(x, F.pad(torch.diag_embed(factors), (0, 1)))


def _tidied_rotate(x: Tensor, params: Tensor) -> Tensor:
    angle = params[:, Column.ANGLE]
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    return _tidied_sample(x, F.pad(theta, (0, 1)))


def tidied(word: str) -> Augment:
    """One of the transforms, all classes in one call, in the images' dtype."""
    return {
        "color": _tidied_color,
        "crop": _tidied_crop,
        "cutout": _tidied_cutout,
        "flip": _tidied_flip,
        "scale": _tidied_scale,
        "rotate": _tidied_rotate,
    }[word]


def tidied_discrepancy(real: Tensor, syn: Tensor, classes: int) -> Tensor:
    """The loss, all classes in one call."""
    means = [rows.unflatten(0, (classes, -1)).mean(1) for rows in (real, syn)]
    return (means[0] - means[1]).square().sum()


# ---- picking and normalising -------------------------------------------------------------------


def published_gather(word: str, images: Tensor) -> Callable[..., Tensor]:
    """Of images normalised in float32, as the published code keeps them; class by class."""
    augment = published(word)

    def gather(index: Tensor, params: Tensor, dtype: torch.dtype) -> Tensor:
        return augment(images[index], params).to(dtype, memory_format=torch.channels_last)

    return gather


def tidied_gather(
    word: str, images: Tensor, mean: Tensor, std: Tensor
) -> Callable[[Tensor, Tensor, torch.dtype], Tensor]:
    """Of bytes [M, H, W, C]: picked as bytes, normalised by a multiplication and an addition."""
    augment = tidied(word)
    factor, bias = (1 / (255 * std)).view(-1, 1, 1), (-mean / std).view(-1, 1, 1)

    def gather(index: Tensor, params: Tensor, dtype: torch.dtype) -> Tensor:
        x = images[index].permute(0, 3, 1, 2).contiguous().float()
        x = torch.addcmul(bias, x, factor)
        return augment(x, params).to(dtype, memory_format=torch.channels_last)

    return gather

# SPDX-License-Identifier: MIT
"""Drop-in replacements for the field's augmentation code.

``from dmfast.compat import DiffAugment, ParamDiffAug`` in place of the copy in a repository's
``utils.py``: same signature, same values on the CPU for the same seed, gradients too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .augment import IDENTITY, WORDS, Column, parse_strategy
from .ops import siamese_augment

__all__ = ["DiffAugment", "ParamDiffAug"]


class ParamDiffAug:
    """Strengths and state of :func:`DiffAugment`, by their published names.

    ``aug_mode`` is ``"S"`` (one of the strategy's transforms) or ``"M"`` (all of them, in its
    order). ``Siamese`` (``batchmode`` in the trajectory-matching lineage) and ``latestseed`` are
    written by :func:`DiffAugment`: whether the last call shared its parameters over the batch, and
    the seed that the next draw of that call would have used.
    """

    def __init__(self) -> None:
        self.aug_mode = "S"
        self.prob_flip = 0.5
        self.ratio_scale = 1.2
        self.ratio_rotate = 15.0
        self.ratio_crop_pad = 0.125
        self.ratio_cutout = 0.5
        self.brightness = 1.0
        self.saturation = 2.0
        self.contrast = 0.5
        self.Siamese = False
        self.latestseed = -1

    @property
    def batchmode(self) -> bool:
        return self.Siamese

    @batchmode.setter
    def batchmode(self, value: bool) -> None:
        self.Siamese = value


def DiffAugment(
    x: Tensor, strategy: str = "", seed: int = -1, param: ParamDiffAug | None = None
) -> Tensor:
    """Differentiable Siamese augmentation as published.

    Args:
        x: images [N, C, H, W].
        strategy: words joined by underscores; ``""`` and ``"none"`` return ``x``.
        seed: -1 draws parameters for each image from torch's global generator; any other seed gives
            the whole batch the parameters that the published code draws for its first image.
        param: strengths and mode; a new :class:`ParamDiffAug` where left out.

    Returns:
        The augmented images, differentiable in ``x``. On the CPU the values of the published code
        for the same seed, up to the rounding of its sampling grids. Unlike the published code it
        works on a batch of one, leaves the global generator alone when a seed is given, and never
        waits for a GPU.

    Raises:
        InputError: the strategy holds an unknown word.
        ValueError: ``x`` is no batch of images, or ``aug_mode`` is neither S nor M.
        RuntimeError: a CUDA graph is being captured: the parameters are drawn on the host, so every
            replay would repeat them. Use :func:`dmfast.ops.draw_augmentation` there.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "DiffAugment draws on the host and cannot be captured in a CUDA graph; use "
            "dmfast.ops.draw_augmentation with a step tensor, and dmfast.ops.siamese_augment"
        )
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"DiffAugment: x must be floats [N, C, H, W], got {x.dtype} {list(x.shape)}"
        )
    param = param or ParamDiffAug()
    if param.aug_mode not in ("S", "M"):
        raise ValueError(f"DiffAugment: aug_mode must be 'S' or 'M', got {param.aug_mode!r}")
    param.Siamese = seed != -1
    param.latestseed = seed
    for params in _published_rows(parse_strategy(strategy), x, param):
        x = siamese_augment(x, params.to(x.device, non_blocking=True))
    return x


def _published_rows(words: tuple[str, ...], x: Tensor, param: ParamDiffAug) -> list[Tensor]:
    """Tables of parameters, to be applied in turn: [1, 13] for the batch or [N, 13]."""
    if not words or x.shape[0] == 0:
        return []
    if param.aug_mode == "S":
        words = (words[int(torch.randint(0, len(words), (1,), generator=_generator(param)))],)
    tables: list[Tensor] = []
    last = len(WORDS)
    for word in words:
        code = WORDS.index(word)
        if code <= last:  # a row is applied in the order of its columns: another order, another row
            tables.append(
                torch.tensor(IDENTITY, dtype=torch.float32).repeat(
                    1 if param.Siamese else x.shape[0], 1
                )
            )
        _fill(tables[-1], word, x, param)
        last = code
    return tables


def _generator(param: ParamDiffAug) -> torch.Generator | None:
    """The generator of the next draw: seeded anew each time, as published, or the global one."""
    if param.latestseed == -1:
        return None
    generator = torch.Generator().manual_seed(param.latestseed)
    param.latestseed += 1
    return generator


def _fill(table: Tensor, word: str, x: Tensor, param: ParamDiffAug) -> None:
    """Draws one transform's parameters, in the published order, into its columns."""
    images, _, height, width = x.shape

    def put(column: Column, values: Tensor) -> None:
        # The batch's draw is made whole even where only its first element counts: that is what the
        # published code consumes.
        table[:, column] = values[: table.shape[0]].to(table.dtype)

    def uniform(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(images, generator=_generator(param), dtype=dtype)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (images,), generator=_generator(param))

    if word == "color":
        put(Column.BRIGHTNESS, (uniform(x.dtype) - 0.5) * param.brightness)
        put(Column.SATURATION, uniform(x.dtype) * param.saturation)
        put(Column.CONTRAST, uniform(x.dtype) + param.contrast)
    elif word == "crop":
        for column, size in ((Column.CROP_Y, height), (Column.CROP_X, width)):
            shift = int(size * param.ratio_crop_pad + 0.5)
            put(column, integers(-shift, shift + 1))
    elif word == "cutout":
        for column, extent, size in (
            (Column.CUT_TOP, Column.CUT_HEIGHT, height),
            (Column.CUT_LEFT, Column.CUT_WIDTH, width),
        ):
            hole = int(size * param.ratio_cutout + 0.5)
            put(column, integers(0, size + 1 - hole % 2) - hole // 2)
            table[:, extent] = hole
    elif word == "flip":
        put(Column.FLIP, uniform() < param.prob_flip)
    elif word == "scale":
        for column in (Column.SCALE_X, Column.SCALE_Y):
            low = 1.0 / param.ratio_scale
            put(column, uniform() * (param.ratio_scale - low) + low)
    else:
        put(Column.ANGLE, (uniform() - 0.5) * 2 * param.ratio_rotate / 180 * math.pi)

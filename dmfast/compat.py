# SPDX-License-Identifier: MIT
"""Drop-in replacements for the field's augmentation code, of both lineages.

``from dmfast.compat import DiffAugment, ParamDiffAug`` in place of the copy in a repository's
``utils.py``: same signature, same values on the CPU for the same seed, gradients too.
``from dmfast.compat import DiffAug`` in place of the class in ``misc/augment.py`` or
``utils/diffaug.py``: same signature, same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _checks
from .augment import DEFAULT_STRATEGY, IDENTITY, STRENGTH, WORDS, Column, parse_strategy
from .ops import siamese_augment

__all__ = ["DiffAug", "DiffAugment", "ParamDiffAug"]

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
#: A generator for the next draw; None is torch's global one.
Generators = Callable[[], torch.Generator | None]


# ---- The published lineage ---------------------------------------------------------------------


class ParamDiffAug:
    """Strengths and state of :func:`DiffAugment`, by their published names.

    Replaces ``ParamDiffAug`` of VICO-UoE/DatasetCondensation and of its descendants, the
    trajectory-matching family among them.

    ``aug_mode`` is ``"S"`` (one of the strategy's transforms) or ``"M"`` (all of them, in its
    order). ``Siamese`` (``batchmode`` in the trajectory-matching lineage) and ``latestseed`` are
    written by :func:`DiffAugment`: whether the last call shared its parameters over the batch, and
    the seed that the next draw of that call would have used. ``ratio_noise`` is there for code that
    names it; as in the published code no transform reads it.
    """

    def __init__(self) -> None:
        self.aug_mode = "S"
        self.prob_flip = 0.5
        self.ratio_scale = 1.2
        self.ratio_rotate = 15.0
        self.ratio_crop_pad = 0.125
        self.ratio_cutout = 0.5
        self.ratio_noise = 0.05
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
    x: Tensor, strategy: str | None = "", seed: int = -1, param: ParamDiffAug | None = None
) -> Tensor:
    """Differentiable Siamese augmentation as published.

    Replaces ``DiffAugment`` of VICO-UoE/DatasetCondensation and of its descendants, the
    trajectory-matching family among them (whose sampling with ``align_corners`` gives the same
    values on square images and others on images that are not square; here they are VICO's).

    Args:
        x: images [N, C, H, W].
        strategy: words joined by underscores; ``""``, ``"none"``, ``"None"`` and None return ``x``.
        seed: -1 draws parameters for each image from torch's global generator; any other seed gives
            the whole batch the parameters that the published code draws for its first image.
        param: strengths and mode; a new :class:`ParamDiffAug` where left out.

    Returns:
        The augmented images, differentiable in ``x``. On the CPU the values of the published code
        for the same seed, up to the rounding of its sampling grids. Unlike the published code it
        works on a batch of one, leaves the global generator alone when a seed is given, and never
        waits for a GPU. On a GPU it draws what it draws on the CPU.

    Raises:
        InputError: the strategy holds an unknown word.
        ValueError: ``x`` is no batch of images, ``aug_mode`` is neither S nor M, or a strength or
            the seed is out of range.
        TypeError: ``x`` is no tensor, a strength no number, or the seed no whole number.
        RuntimeError: a CUDA graph is being captured: the parameters are drawn on the host, so every
            replay would repeat them. Use :func:`dmfast.ops.draw_augmentation` there.
    """
    param = param or ParamDiffAug()
    seed = _checks.whole("DiffAugment", "seed", seed)
    words = parse_strategy("" if strategy is None else strategy)
    param.Siamese = seed != -1
    param.latestseed = seed
    if not words:
        return x
    if param.aug_mode not in ("S", "M"):
        raise ValueError(f"DiffAugment: aug_mode must be 'S' or 'M', got {param.aug_mode!r}")
    _check_images("DiffAugment", x)
    return _apply(_published_rows(words, x, param), x)


def _published_rows(words: tuple[str, ...], x: Tensor, param: ParamDiffAug) -> list[Tensor]:
    """Tables of parameters, to be applied in turn: [1, 13] for the batch or [N, 13]."""
    strengths = _checked_strengths("DiffAugment", param)
    if x.shape[0] == 0:
        return []

    def generator() -> torch.Generator | None:
        # Each draw of a seeded call has a seed of its own, as published.
        if not param.Siamese:
            return None
        param.latestseed += 1
        return torch.Generator().manual_seed(param.latestseed - 1)

    if param.aug_mode == "S":
        words = (words[_choice(len(words), generator())],)
    tables = _Tables(x, strengths, rows=1 if param.Siamese else x.shape[0], draws=x.shape[0])
    tables.add(words, generator)
    return tables.tables


# ---- The multi-formation lineage ---------------------------------------------------------------


class DiffAug:
    """Differentiable augmentation with several transforms at once.

    Replaces ``DiffAug`` of snu-mllab/Efficient-Dataset-Condensation (IDC) and of its descendants,
    DREAM, DANCE and NCFM among them. What is drawn has the same distribution; the values are
    others.

    A call applies, where the strategy names them, flip and color; then one of the other words
    (``crop``, ``scale``, ``rotate``, ``translate``: a crop along x only), drawn anew for each call
    and shared by the batch, or with ``single_aug=False`` all of them in their order; then cutout.
    With ``single=True`` flip, color and cutout are among the words of which one is drawn.

    Three things are as they were meant, not as they were written. A seed gives one sequence of
    numbers a call (the original began the same sequence again before each transform, so that with
    a seed the flip, the brightness, the saturation and the contrast all hung on one number) and
    settles which word is drawn (the original left that to numpy's global state). Every seed but -1
    counts, 0 too. And the global generators are left alone where a seed is given; without one,
    numbers come from torch's (the original took some from numpy's).

    Args:
        strategy: words joined by underscores; ``""`` and ``"none"`` return the images as they are.
        batch: True draws once for the whole batch, so that ``aug(torch.cat([real, synthetic]))`` is
            Siamese; False draws for each image.
        ratio_cutout: side of the hole as a share of the image's.
        single: whether flip, color and cutout are alternatives like the other words.

    The attributes ``prob_flip``, ``ratio_scale``, ``ratio_rotate``, ``ratio_crop_pad``,
    ``ratio_cutout``, ``brightness``, ``saturation``, ``contrast`` and ``batch`` may be set.

    Raises:
        InputError: the strategy holds an unknown word.
    """

    def __init__(
        self,
        strategy: str = DEFAULT_STRATEGY,
        batch: bool = False,
        ratio_cutout: float = 0.5,
        single: bool = False,
    ) -> None:
        self.prob_flip = 0.5
        self.ratio_scale = 1.2
        self.ratio_rotate = 15.0
        self.ratio_crop_pad = 0.125
        self.ratio_cutout = ratio_cutout
        self.ratio_noise = 0.05
        self.brightness = 1.0
        self.saturation = 2.0
        self.contrast = 0.5
        self.batch = batch
        words = parse_strategy(strategy, known=(*WORDS, "translate"))
        always = () if single else ("flip", "color", "cutout")
        self.aug = bool(words)
        self.flip, self.color, self.cutout = (
            not single and word in words for word in ("flip", "color", "cutout")
        )
        self.strategy = [word for word in words if word not in always]

    def __call__(self, x: Tensor, single_aug: bool = True, seed: int = -1) -> Tensor:
        """Augments images.

        Args:
            x: images [N, C, H, W].
            single_aug: one of the words other than flip, color and cutout, or all of them.
            seed: -1 draws from torch's global generator; any other makes the call repeatable.

        Returns:
            The augmented images, differentiable in ``x``.

        Raises:
            ValueError: ``x`` is no batch of images, or a strength or the seed is out of range.
            TypeError: ``x`` is no tensor, a strength no number, or the seed no whole number.
            RuntimeError: a CUDA graph is being captured: the parameters are drawn on the host, so
                every replay would repeat them. Use :func:`dmfast.ops.draw_augmentation` there.
        """
        seed = _checks.whole("DiffAug", "seed", seed)
        if not self.aug:
            return x
        _check_images("DiffAug", x)
        strengths = _checked_strengths("DiffAug", self)
        if x.shape[0] == 0:
            return x
        generator = None if seed == -1 else torch.Generator().manual_seed(seed)
        chosen = list(self.strategy)
        if chosen and single_aug:
            chosen = [chosen[_choice(len(chosen), generator)]]
        rows = 1 if self.batch else x.shape[0]
        tables = _Tables(x, strengths, rows=rows, draws=rows)
        # A row flips after its crop and its cutout. Their draws are symmetric, so that is as good
        # as flipping first.
        words = [*["color"] * self.color, *chosen, *["cutout"] * self.cutout]
        tables.add(words, lambda: generator)
        if self.flip:
            tables.add_to_first("flip", lambda: generator)
        return _apply(tables.tables, x)


# ---- Shared ------------------------------------------------------------------------------------


def _check_images(name: str, x: Tensor) -> None:
    if getattr(x, "is_cuda", False) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} draws on the host and cannot be captured in a CUDA graph; use "
            "dmfast.ops.draw_augmentation with a step tensor, and dmfast.ops.siamese_augment"
        )
    _checks.tensors(name, {"x": x})
    if x.dim() != 4 or x.dtype not in DTYPES:
        raise ValueError(f"{name}: x must be floats [N, C, H, W], got {x.dtype} {list(x.shape)}")


def _checked_strengths(name: str, holder: Any) -> dict[str, float]:
    values = {}
    for attribute in STRENGTH:
        try:
            value = float(getattr(holder, attribute))
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"{name}: {attribute} must be a number") from None
        low = 0 if attribute in ("ratio_crop_pad", "ratio_cutout") else -1e6
        low = 1e-6 if attribute == "ratio_scale" else low
        if not low <= value <= 1e6:
            raise ValueError(f"{name}: {attribute} must be from {low:g} to 1e6, got {value}")
        values[attribute] = value
    return values


def _choice(count: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(0, count, (1,), generator=generator, device="cpu"))


def _apply(tables: list[Tensor], x: Tensor) -> Tensor:
    for table in tables:
        # From pinned memory the copy does not wait for what the GPU has to do before it.
        table = table.pin_memory() if x.is_cuda else table
        x = siamese_augment(x, table.to(x.device, non_blocking=True))
    return x


class _Tables:
    """Tables of parameters, [rows, 13] each, that are applied to the images in turn.

    A row is applied in the order of its columns: where a word comes before one that it follows in
    the strategy, it begins another table.
    """

    def __init__(self, x: Tensor, strengths: dict[str, float], *, rows: int, draws: int) -> None:
        self._x = x
        self._strengths = strengths
        self._rows, self._draws = rows, draws
        self.tables: list[Tensor] = []

    def add(self, words: Iterable[str], generator: Generators) -> None:
        last = len(WORDS)
        for word in words:
            code = WORDS.index("crop" if word == "translate" else word)
            if code <= last:
                self._begin()
            self._fill(self.tables[-1], word, generator)
            last = code

    def add_to_first(self, word: str, generator: Generators) -> None:
        if not self.tables:
            self._begin()
        self._fill(self.tables[0], word, generator)

    def _begin(self) -> None:
        row = torch.tensor(IDENTITY, dtype=torch.float32, device="cpu")
        self.tables.append(row.repeat(self._rows, 1))

    def _fill(self, table: Tensor, word: str, generator: Generators) -> None:
        """Draws one transform's parameters, in the published order, into its columns."""
        strengths, dtype = self._strengths, self._x.dtype
        _, _, height, width = self._x.shape

        def put(column: Column, values: Tensor) -> None:
            # The published code draws for the whole batch even where only the first element counts.
            table[:, column] = values[: self._rows].to(table.dtype)

        def uniform(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.rand(self._draws, generator=generator(), dtype=dtype, device="cpu")

        def integers(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (self._draws,), generator=generator(), device="cpu")

        def shift(size: int) -> Tensor:
            most = int(size * strengths["ratio_crop_pad"] + 0.5)
            return integers(-most, most + 1)

        if word == "color":
            put(Column.BRIGHTNESS, (uniform(dtype) - 0.5) * strengths["brightness"])
            put(Column.SATURATION, uniform(dtype) * strengths["saturation"])
            put(Column.CONTRAST, uniform(dtype) + strengths["contrast"])
        elif word == "crop":
            put(Column.CROP_Y, shift(height))
            put(Column.CROP_X, shift(width))
        elif word == "translate":
            put(Column.CROP_X, shift(width))
        elif word == "cutout":
            for column, extent, size in (
                (Column.CUT_TOP, Column.CUT_HEIGHT, height),
                (Column.CUT_LEFT, Column.CUT_WIDTH, width),
            ):
                hole = int(size * strengths["ratio_cutout"] + 0.5)
                put(column, integers(0, size + 1 - hole % 2) - hole // 2)
                table[:, extent] = hole
        elif word == "flip":
            put(Column.FLIP, uniform() < strengths["prob_flip"])
        elif word == "scale":
            for column in (Column.SCALE_X, Column.SCALE_Y):
                low = 1.0 / strengths["ratio_scale"]
                put(column, uniform() * (strengths["ratio_scale"] - low) + low)
        else:
            put(Column.ANGLE, (uniform() - 0.5) * 2 * strengths["ratio_rotate"] / 180 * math.pi)

# SPDX-License-Identifier: MIT
"""Augmentation strategies by name, and the published strengths.

A *strategy* is a string of words joined by underscores, as ``color_crop_cutout_flip_scale_rotate``:
the transforms that may be applied (differentiable Siamese augmentation, Zhao and Bilen, ICML 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType

from .errors import InputError

#: The transforms, in the order in which a row of parameters applies them.
WORDS = ("color", "crop", "cutout", "flip", "scale", "rotate")

#: The published strategy, and the one for digits, which a mirror turns into something else.
DEFAULT_STRATEGY = "color_crop_cutout_flip_scale_rotate"
DIGITS_STRATEGY = "color_crop_cutout_scale_rotate"


class Column(IntEnum):
    """The columns of a row of augmentation parameters, in the order in which they are applied.

    The identity of ``SATURATION``, ``CONTRAST``, ``SCALE_X`` and ``SCALE_Y`` is 1, of all others 0.

    ============== =================================================================================
    BRIGHTNESS     b: x + b
    SATURATION     s: (x - m) s + m, with m the mean over the channels at each pixel
    CONTRAST       c: (x - M) c + M, with M the mean of the image after brightness and saturation
    CROP_Y, CROP_X dy, dx in pixels: out(y, x) = in(y + dy, x + dx), 0 outside
    CUT_TOP, ...   top, left, height, width in pixels: zeroed, clipped at the borders
    FLIP           not 0: mirrors x
    SCALE_X, _Y    sx, sy: bilinear sample at x' = (x + .5 - W/2) sx + W/2 - .5, y' likewise; 0
                   outside
    ANGLE          a in radians: with u = (2x + 1)/W - 1 and v = (2y + 1)/H - 1, bilinear sample of
                   the scaled image at u cos a - v sin a, u sin a + v cos a; 0 outside
    ============== =================================================================================
    """

    BRIGHTNESS = 0
    SATURATION = 1
    CONTRAST = 2
    CROP_Y = 3
    CROP_X = 4
    CUT_TOP = 5
    CUT_LEFT = 6
    CUT_HEIGHT = 7
    CUT_WIDTH = 8
    FLIP = 9
    SCALE_X = 10
    SCALE_Y = 11
    ANGLE = 12


#: A row that changes nothing.
IDENTITY = tuple(
    1.0 if column in (Column.SATURATION, Column.CONTRAST, Column.SCALE_X, Column.SCALE_Y) else 0.0
    for column in Column
)

#: The published strengths: the attributes of ``ParamDiffAug``, with their defaults.
STRENGTH: Mapping[str, float] = MappingProxyType(
    {
        "brightness": 1.0,  # b in [-1/2, 1/2) of it
        "saturation": 2.0,  # s in [0, it)
        "contrast": 0.5,  # c in [it, it + 1)
        "ratio_crop_pad": 0.125,  # shift of at most this share of the size
        "ratio_cutout": 0.5,  # side of the hole as a share of the size
        "prob_flip": 0.5,
        "ratio_scale": 1.2,  # factors in [1 / it, it)
        "ratio_rotate": 15.0,  # degrees either way
    }
)


def parse_strategy(strategy: str, known: tuple[str, ...] = WORDS) -> tuple[str, ...]:
    """The words of a strategy, in its own order; ``""`` and ``"none"`` mean no augmentation.

    Raises:
        InputError: a word is unknown, or it is no string.
    """
    if not isinstance(strategy, str):
        raise InputError(
            f"augmentation strategy must be words in a string, got {type(strategy).__name__}"
        )
    if strategy.lower() in ("", "none"):
        return ()
    words = tuple(strategy.lower().split("_"))
    for word in words:
        if word not in known:
            raise InputError(
                f"augmentation strategy {strategy!r}: unknown transform {word!r}; choose from "
                f"{', '.join(known)}, joined by underscores, or none"
            )
    return words


def full_strength(strength: Mapping[str, float] | None) -> dict[str, float]:
    """The published strengths with those of ``strength`` in their place, all checked.

    Raises:
        InputError: a name is unknown, or a value is outside its range.
    """
    values = dict(STRENGTH)
    strength = {} if strength is None else strength
    if not isinstance(strength, Mapping):
        raise InputError(
            f"augmentation strength must map names to values, got {type(strength).__name__}"
        )
    for name, value in strength.items():
        if name not in values:
            raise InputError(
                f"augmentation strength {name!r} is unknown; choose from {list(values)}"
            )
        try:
            values[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            raise InputError(
                f"augmentation strength {name} must be a number, got {type(value).__name__}"
            ) from None
    for name, value in values.items():
        if not 0 <= value <= 1e6:
            raise InputError(f"augmentation strength {name} must be from 0 to 1e6, got {value}")
    for name in ("ratio_crop_pad", "ratio_cutout", "prob_flip"):
        if values[name] > 1:
            raise InputError(f"augmentation strength {name} must be at most 1, got {values[name]}")
    if values["ratio_scale"] < 1:
        raise InputError(
            f"augmentation strength ratio_scale must be at least 1, got {values['ratio_scale']}"
        )
    return values

# SPDX-License-Identifier: MIT
"""The list of cases that every operator is tried on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmfast.augment import IDENTITY, Column

LAYOUTS = ("contiguous", "channels_last", "sliced")


def rows(*changes: dict[str, float]) -> Tensor:
    """A table with one row for each dict of changed columns, by their lower-case names."""
    table = torch.tensor(IDENTITY).repeat(len(changes), 1)
    for row, changed in zip(table, changes, strict=True):
        for name, value in changed.items():
            row[Column[name.upper()]] = value
    return table


COLOR = {"brightness": 0.4, "saturation": 1.7, "contrast": 0.6}
CROP = {"crop_y": -3, "crop_x": 2}
CUTOUT = {"cut_top": -2, "cut_left": 3, "cut_height": 5, "cut_width": 4}
FLIP = {"flip": 1}
SCALE = {"scale_x": 1.17, "scale_y": 0.86}
ROTATE = {"angle": 0.23}
ALL = COLOR | CROP | CUTOUT | FLIP | SCALE | ROTATE

#: Tables by name. "extreme" is far outside what is ever drawn.
TABLES: dict[str, Tensor] = {
    "identity": rows({}),
    "brightness": rows({"brightness": -0.3}),
    "saturation": rows({"saturation": 0.0}),
    "contrast": rows({"contrast": 1.4}),
    "color": rows(COLOR),
    "crop": rows(CROP),
    "cutout": rows(CUTOUT),
    "flip": rows(FLIP),
    "scale": rows(SCALE),
    "rotate": rows(ROTATE),
    "rotate_back": rows({"angle": -0.26}),
    "all": rows(ALL),
    "each": rows(COLOR, CROP, CUTOUT, FLIP, SCALE, ROTATE),
    "extreme": rows(
        {"crop_y": 1e12, "crop_x": -1e12},
        {"cut_top": -100, "cut_left": -100, "cut_height": 300, "cut_width": 300},
        {"scale_x": 0.0, "scale_y": 1.0},
        {"scale_x": -1.3, "scale_y": 7.0},
        {"angle": 3.0},
        {"scale_x": 0.03, "scale_y": 40.0, "angle": -1.6},
    ),
}


@dataclass(frozen=True)
class Case:
    table: str
    shape: tuple[int, int, int, int]
    layout: str = "contiguous"
    offsets: tuple[int, ...] | None = None

    @property
    def params(self) -> Tensor:
        return TABLES[self.table]

    @property
    def offsets_tensor(self) -> Tensor | None:
        return None if self.offsets is None else torch.tensor(self.offsets)

    def images(self, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
        return lay_out(
            torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
            self.layout,
        )

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.table}-{shape}-{self.layout}" + ("-offsets" if self.offsets else "")


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        n, c, h, w = x.shape
        around = torch.nan if x.is_floating_point() else 1
        larger = torch.full((n, c + 1, h + 2, 2 * w + 1), around, dtype=x.dtype)
        view = larger[:, 1:, 1 : h + 1, 1::2]
        return view.copy_(x)
    return x.contiguous()


CASES = [
    *(Case(name, (len(table), 3, 8, 8)) for name, table in TABLES.items()),
    *(Case("each", (6, 3, 7, 10), layout) for layout in LAYOUTS),
    *(Case("all", (2, 1, 9, 6), layout) for layout in LAYOUTS),
    Case("each", (12, 2, 5, 5), "channels_last"),
    Case("each", (7, 3, 6, 6), offsets=(0, 2, 2, 3, 5, 6, 7)),
    Case("all", (1, 3, 8, 8)),
    Case("all", (0, 3, 8, 8)),
    Case("all", (3, 3, 0, 8)),
    Case("all", (2, 4, 1, 1)),
    Case("all", (2, 3, 1, 13)),
    Case("extreme", (6, 3, 9, 4), "channels_last"),
    Case("all", (2, 17, 40, 33)),
]

# SPDX-License-Identifier: MIT
"""The boundaries of the CPU's loops for augmentation: vectors that images fill in part, runs of
images that share a row, and what a thread keeps from one call to the next."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import ALL, COLOR, CROP, CUTOUT, FLIP, LAYOUTS, ROTATE, SCALE, lay_out, rows
from test_ops import assert_as_exact
from torch import Tensor

from dmfast import ops, reference

OP = torch.ops.dmfast
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# A vector holds 16 values, or 8 of float64: 5 or 2 images of three channels.
SHAPES = [
    (1, 3, 4, 4),
    (7, 3, 4, 4),
    (19, 3, 5, 7),
    (12, 3, 16, 3),
    (33, 1, 4, 8),
    (9, 4, 3, 6),
    (5, 16, 4, 4),
    (4, 17, 5, 5),
]
TABLE = rows(ROTATE, SCALE, COLOR, ALL, CROP | FLIP | CUTOUT)


def uneven(count: int, groups: int) -> Tensor:
    """Offsets of groups of very different sizes, one of them empty where there are few rows."""
    return torch.tensor([count * k * k // (groups * groups) for k in range(groups + 1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vectors_that_are_filled_in_part(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (lay_out(torch.randn(shape, generator=generator).to(dtype), layout) for _ in range(2))
    for table in (TABLE, TABLE.flip(0)):
        arguments = table, uneven(shape[0], len(table))

        def both(function, x: Tensor, y: Tensor, arguments=arguments) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            out = function(x, *arguments)
            return out.detach(), torch.autograd.grad(out, x, y)[0]

        plain = both(reference.siamese_augment, x, y)
        exact = both(reference.siamese_augment, x.double(), y.double())
        for actual, of_plain, truth in zip(
            both(ops.siamese_augment, x, y), plain, exact, strict=True
        ):
            assert_as_exact(actual, of_plain, truth)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shift_and_its_adjoint(layout: str, channels: int) -> None:
    """Crop, cutout and flip move values: to the bit, and back to where they came from."""
    holes = [
        {},
        *(
            {"cut_top": t, "cut_left": s, "cut_height": 2, "cut_width": 3}
            for t, s in itertools.product((-1, 0, 3), (-2, 1, 3))
        ),
    ]
    table = rows(
        *(
            {"crop_y": dy, "crop_x": dx, "flip": flip} | hole
            for dy, dx, flip, hole in itertools.product(
                (-5, -1, 0, 2, 4), (-6, -2, 0, 1, 5), (0, 1), holes
            )
        )
    )
    shape = (len(table), channels, 4, 5)
    numbers = torch.arange(float(torch.Size(shape).numel())).view(shape)
    for dtype in (torch.float64, torch.float32):
        x = lay_out(numbers.to(dtype), layout)
        out = ops.siamese_augment(x, table)
        assert torch.equal(out, reference.siamese_augment(x, table))
        back = OP._siamese_augment_backward(lay_out(out, layout), table, None)
        # What went somewhere comes back to its place; the rest is 0.
        seen = torch.isin(x, out) & (x != 0)
        assert torch.equal(back, torch.where(seen, x, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_moves_keep_the_bits_of_every_nan(layout: str, dtype: torch.dtype) -> None:
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    generator = torch.Generator().manual_seed(0)
    info = torch.iinfo(word)
    bits = torch.randint(info.min, info.max, (3, 3, 6, 6), generator=generator, dtype=word)
    out = ops.siamese_augment(lay_out(bits, layout).view(dtype), rows(FLIP))
    assert torch.equal(out.view(word), bits.flip(3))


def test_a_zero_keeps_its_sign_where_one_pixel_is_taken() -> None:
    x = torch.full((1, 1, 4, 5), -0.0)
    out = ops.siamese_augment(x, rows({"scale_x": 0.5}))
    assert torch.signbit(out).all()


def test_calls_one_after_another_do_not_disturb_each_other() -> None:
    """A thread keeps tables and memory: sizes, layouts, types and directions take turns."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 9, 6, 3), generator=generator, dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    calls = []
    for table in (rows(ALL), rows(ROTATE)):
        for shape in ((6, 3, 6, 9), (6, 3, 9, 6), (2, 1, 3, 18), (1, 2, 300, 310)):
            x = torch.randn(shape, generator=generator)
            for one in (x, x.double(), lay_out(x, "channels_last")):
                calls += [(OP.siamese_augment, (one, table, None))]
                calls += [(OP._siamese_augment_backward, (one, table, None))]
        index = torch.tensor([3, 0, 1])
        calls += [(OP.gather_augment, (images, index, table, mean, std, torch.float32, None))]
    first = [operator(*arguments) for operator, arguments in calls]
    again = [operator(*arguments) for operator, arguments in reversed(calls)]
    for one, other in zip(first, reversed(again), strict=True):
        assert torch.equal(one, other)
    for (operator, (x, table, *_)), made in zip(calls, first, strict=True):
        if operator is OP.siamese_augment and x.dtype == torch.float64:
            torch.testing.assert_close(made, reference.siamese_augment(x, table))


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_augment_of_any_layout(layout: str, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, channels, 6, 7), generator=generator, dtype=torch.uint8)
    mean, std = torch.rand(2, channels, generator=generator).add(0.2).unbind()
    index, offsets = torch.tensor([4, 0, 4, 2, 1, 3, 0, 2, 2]), uneven(9, len(TABLE))
    for source in (images, images / 255):
        source = lay_out(source, layout).permute(0, 2, 3, 1)
        arguments = source, index, TABLE, mean, std
        out = ops.gather_augment(*arguments, torch.float32, offsets)
        plain = reference.gather_augment(*arguments, torch.float32, offsets)
        exact = reference.gather_augment(*arguments, torch.float64, offsets)
        assert_as_exact(out, plain, exact)


def test_too_many_pixels_are_refused() -> None:
    x = torch.empty(1).expand(1, 1, 2**15, 2**14)
    with pytest.raises(RuntimeError, match="must have fewer than 536870912 pixels, got 32768 x"):
        ops.siamese_augment(x, rows({}))

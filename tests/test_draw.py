# SPDX-License-Identifier: MIT
"""What is drawn: known answers, the reference, independence of how the work is split, fairness."""

from __future__ import annotations

import math

import pytest
import torch

from dmfast import ops, reference
from dmfast.augment import Column
from dmfast.errors import InputError
from dmfast.ops import Stream

ALL = "color_crop_cutout_flip_scale_rotate"
MAX = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MAX] * 4, [MAX] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], answer: list[int]) -> None:
    """The vectors that the generator's authors publish; the operators are seen to use the same
    generator by their equality with the reference."""
    assert reference.philox(counter, key) == answer


def test_operators_use_the_published_generator() -> None:
    """The third vector through an operator: counter = (element, group, stream, step), key = seed.
    A weight of bound 1 is 2 u - 1 with u the upper 24 bits of a word."""
    seed = 0x299F31D0 << 32 | 0xA4093822
    group, stream, step = 0x85A308D3, 0x13198A2E, 0x03707344
    answer = reference.philox([0, group, stream, step], [seed & MAX, seed >> 32])
    weights = torch.empty(4)
    ops.draw_weights_([weights], [1.0], seed, step, first_network=group, stream=stream)
    expected = [2 * (word >> 8) * 2.0**-24 - 1 for word in answer]
    assert weights.tolist() == expected


@pytest.mark.parametrize("mode", ["single", "all"])
@pytest.mark.parametrize("size", [(32, 32), (9, 14), (1, 1), (0, 3)])
def test_draw_augmentation_matches_reference(size: tuple[int, int], mode: str) -> None:
    arguments = (ALL, 7, size, 2**62 + 12345, 2**32 - 1)
    options = {"rows": 3, "first_group": 5, "stream": Stream.AUGMENTATION, "mode": mode}
    drawn = ops.draw_augmentation(*arguments, **options)
    assert drawn.shape == (21, 13)
    assert torch.equal(drawn, reference.draw_augmentation(*arguments, **options))


def test_draw_augmentation_does_not_depend_on_the_split() -> None:
    whole = ops.draw_augmentation(ALL, 10, (32, 32), 3, 8, rows=2, stream=2)
    parts = [
        ops.draw_augmentation(ALL, 5, (32, 32), 3, 8, rows=2, first_group=first, stream=2)
        for first in (0, 5)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_step_may_be_a_tensor() -> None:
    step = torch.tensor([41])
    for number in (41, 42):
        drawn = ops.draw_augmentation(ALL, 4, (8, 8), 0, step, stream=2)
        assert torch.equal(drawn, ops.draw_augmentation(ALL, 4, (8, 8), 0, number, stream=2))
        step += 1


def test_draws_differ_in_every_part_of_the_key() -> None:
    base = {"seed": 0, "step": 0, "first_group": 0, "stream": 2}
    draws = [
        ops.draw_augmentation("color", 1, (8, 8), **(base | {name: other}))
        for name in base
        for other in (base[name], base[name] + 1)
    ]
    different = {tuple(row.flatten().tolist()) for row in draws}
    assert len(different) == 1 + len(base)


def test_draw_augmentation_ranges_and_fairness() -> None:
    """Each transform as often as another, each parameter over the whole of its range."""
    groups = 12_000
    drawn = ops.draw_augmentation(ALL, groups, (32, 32), 0, 0, stream=2)
    used = {
        "color": drawn[:, Column.CONTRAST] != 1,
        "crop": (drawn[:, Column.CROP_Y] != 0) | (drawn[:, Column.CROP_X] != 0),
        "cutout": drawn[:, Column.CUT_HEIGHT] == 16,
        "flip": drawn[:, Column.FLIP] == 1,
        "scale": drawn[:, Column.SCALE_X] != 1,
        "rotate": drawn[:, Column.ANGLE] != 0,
    }
    expected = dict.fromkeys(used, 1 / 6) | {"flip": 1 / 12, "crop": 80 / 81 / 6}
    for word, share in expected.items():
        deviation = (share * (1 - share) / groups) ** 0.5
        assert abs(used[word].double().mean().item() - share) < 5 * deviation
    assert torch.stack(list(used.values())).sum(0).max() == 1
    ranges = {
        Column.BRIGHTNESS: ("color", -0.5, 0.5),
        Column.SATURATION: ("color", 0, 2),
        Column.CONTRAST: ("color", 0.5, 1.5),
        Column.CROP_Y: ("crop", -4, 4),
        Column.CROP_X: ("crop", -4, 4),
        Column.CUT_TOP: ("cutout", -8, 24),
        Column.CUT_LEFT: ("cutout", -8, 24),
        Column.SCALE_X: ("scale", 1 / 1.2, 1.2),
        Column.SCALE_Y: ("scale", 1 / 1.2, 1.2),
        Column.ANGLE: ("rotate", -0.26180, 0.26180),
    }
    for column, (word, low, high) in ranges.items():
        values = drawn[used[word], column]
        width = high - low
        assert low - 1e-6 <= values.min() < low + 0.01 * width
        assert high - 0.01 * width < values.max() <= high + 1e-6
        assert abs(values.mean().item() - (low + high) / 2) < 0.03 * width


def test_strength_and_strategy_none() -> None:
    drawn = ops.draw_augmentation(
        "rotate", 500, (8, 8), 0, 0, stream=2, strength={"ratio_rotate": 90.0}
    )
    assert 1.5 < drawn[:, Column.ANGLE].abs().max() <= 1.5708
    for strategy in ("", "none", "None"):
        drawn = ops.draw_augmentation(strategy, 2, (8, 8), 0, 0, stream=2)
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(ops.siamese_augment(x, drawn), x)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("blur_flip",), {}, r"unknown transform 'blur'; choose from color, crop, cutout"),
        (("flip",), {"mode": "both"}, r"mode must be 'single' or 'all', got 'both'"),
        (("flip_crop",), {"mode": "all"}, r"order color_crop_cutout_flip_scale_rotate"),
        (("flip",), {"strength": {"blur": 1}}, r"strength 'blur' is unknown"),
        (("flip",), {"strength": {"prob_flip": 2}}, r"prob_flip must be at most 1, got 2"),
        (("scale",), {"strength": {"ratio_scale": 0.5}}, r"ratio_scale must be at least 1"),
        (
            ("flip",),
            {"strength": {"ratio_rotate": float("nan")}},
            r"ratio_rotate must be from 0 to 1e6",
        ),
        (("color",), {"strength": {"brightness": 1e300}}, r"brightness must be from 0 to 1e6"),
    ],
)
def test_bad_augmentation_is_named(arguments, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.draw_augmentation(*arguments, 1, (8, 8), 0, 0, stream=2, **options)


def test_parameters_are_float32_on_the_cpu_whatever_the_defaults_are() -> None:
    expected = ops.draw_augmentation(ALL, 4, (8, 8), 0, 0, stream=2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            drawn = ops.draw_augmentation(ALL, 4, (8, 8), 0, 0, stream=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(drawn, expected)


def test_a_step_is_a_whole_number_and_a_seed_has_63_bits() -> None:
    with pytest.raises(TypeError):
        ops.draw_augmentation("flip", 1, (8, 8), 0, 2.9, stream=2)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"draw_augmentation: seed must be .*got {seed}"):
            ops.draw_augmentation("flip", 1, (8, 8), seed, 0, stream=2)


def test_an_unknown_word_is_an_input_error() -> None:
    with pytest.raises(InputError):
        ops.draw_augmentation("color-crop", 1, (8, 8), 0, 0, stream=2)


@pytest.mark.parametrize(
    ("seed", "step", "message"),
    [
        (0, 2**32, "step must be from 0 to"),
        (0, torch.tensor([-1]), "step must be from 0 to"),
        (0, torch.tensor([1, 2]), "step must have one element, got 2"),
        (0, torch.tensor([1.0]), "step must be int64, got float32"),
    ],
)
def test_bad_keys_are_named(seed: int, step, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^draw_augmentation: {message}"):
        ops.draw_augmentation("flip", 1, (8, 8), seed, step, stream=2)


# ---- draw_batch --------------------------------------------------------------------------------


def draw_of_one_class(size: int, count: int, *, seed: int = 0, step: int = 0) -> torch.Tensor:
    return ops.draw_batch(
        torch.arange(size),
        torch.tensor([0, size]),
        torch.tensor([0, count]),
        count,
        seed,
        step,
        stream=Stream.REAL_BATCH,
    )


def test_draw_batch_matches_reference() -> None:
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    class_offsets = torch.tensor([0, 1, 18, 18, 400])  # of 1, 17, 0 and 382 images
    offsets = torch.tensor([0, 1, 9, 9, 209])
    arguments = (order, class_offsets, offsets, 209, 2**40 + 9, 77)
    drawn = ops.draw_batch(*arguments, first_class=3, stream=1)
    assert torch.equal(drawn, reference.draw_batch(*arguments, first_class=3, stream=1))


def test_draw_batch_does_not_depend_on_the_split() -> None:
    order, class_offsets = torch.arange(100), torch.tensor([0, 30, 60, 100])
    whole = ops.draw_batch(order, class_offsets, torch.tensor([0, 8, 16, 24]), 24, 5, 6, stream=1)
    last = ops.draw_batch(
        order, class_offsets[2:], torch.tensor([0, 8]), 8, 5, 6, first_class=2, stream=1
    )
    assert torch.equal(whole[16:], last)
    shorter = ops.draw_batch(
        order, class_offsets[2:], torch.tensor([0, 3]), 3, 5, 6, first_class=2, stream=1
    )
    assert torch.equal(last[:3], shorter)


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 63, 64, 65, 128, 255, 256, 257, 5000])
def test_draw_batch_is_a_permutation(size: int) -> None:
    for step in range(3):
        drawn = draw_of_one_class(size, size, step=step)
        assert torch.equal(drawn.sort().values, torch.arange(size))
    if size > 15:
        assert not torch.equal(drawn, draw_of_one_class(size, size, step=0))


def chi_squared(counts: torch.Tensor) -> float:
    """How many standard deviations the counts are off those of equally likely outcomes."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic - freedom) / (2 * freedom) ** 0.5).item()


@pytest.mark.parametrize("size", [2, 3, 4, 5, 17, 33, 64, 65, 100, 200])
def test_draw_batch_is_fair(size: int) -> None:
    """The first two of a class: each ordered pair as often as another, over 400,000 classes."""
    classes = 400_000
    starts = torch.arange(classes + 1)
    pairs = ops.draw_batch(
        torch.arange(size).repeat(classes),
        starts * size,
        starts * 2,
        classes * 2,
        0,
        0,
        stream=Stream.REAL_BATCH,
    ).view(classes, 2)
    counts = torch.bincount(pairs[:, 0] * size + pairs[:, 1], minlength=size * size)
    counts = counts.view(size, size).double()
    assert counts.diagonal().sum() == 0
    assert chi_squared(counts[~torch.eye(size, dtype=torch.bool)]) < 5
    assert chi_squared(counts.sum(1)) < 5


@pytest.mark.parametrize("size", [4, 5])
def test_every_order_of_a_small_class_is_as_likely(size: int) -> None:
    classes = 200_000
    starts = torch.arange(classes + 1) * size
    drawn = ops.draw_batch(
        torch.arange(size).repeat(classes), starts, starts, classes * size, 1, 0, stream=1
    )
    _, counts = drawn.view(classes, size).unique(dim=0, return_counts=True)
    assert len(counts) == math.factorial(size)
    assert chi_squared(counts.double()) < 5


@pytest.mark.parametrize(
    ("class_offsets", "offsets", "rows", "message"),
    [
        ([0, 4, 9], [0, 5, 6], 6, "class 0 has 4 images, fewer than the 5 to draw"),
        ([0, 4, 99], [0, 1, 2], 2, "class_offsets must ascend from 0 at least to 9 at most"),
        ([0, 5, 4], [0, 1, 2], 2, "class_offsets must ascend"),
        ([-1, 4, 9], [0, 1, 2], 2, "class_offsets must ascend from 0 at least"),
        ([0, 4, 9], [0, 2], 2, "offsets must have 3 elements"),
        ([0, 4, 9], [0, 2, 4], 5, "offsets must end at the number of rows 5, got 4"),
    ],
)
def test_bad_batches_are_named(class_offsets, offsets, rows: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^draw_batch: {message}"):
        ops.draw_batch(
            torch.arange(9),
            torch.tensor(class_offsets),
            torch.tensor(offsets),
            rows,
            0,
            0,
            stream=1,
        )


def test_strided_indices_are_refused() -> None:
    strided, whole = torch.tensor([0, 9, 4, 9, 9])[::2], torch.tensor([0, 4, 9])
    rows = torch.tensor([0, 1, 2])
    order = torch.arange(9)
    for arguments in ((torch.arange(18)[::2], whole, rows), (order, strided, rows)):
        with pytest.raises(RuntimeError, match=r"^draw_batch: \w+ must be contiguous"):
            ops.draw_batch(*arguments, 2, 0, 0, stream=1)


# ---- draw_weights_ -----------------------------------------------------------------------------

SHAPES = [(4, 3, 3, 3), (5,), (7, 2), ()]
BOUNDS = [0.19245008972987526, 0.5, 1.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_draw_weights_matches_reference(dtype: torch.dtype) -> None:
    drawn = [torch.empty(shape, dtype=dtype) for shape in SHAPES]
    drawn[0] = drawn[0].to(memory_format=torch.channels_last)
    expected = [torch.empty(shape, dtype=dtype) for shape in SHAPES]
    ops.draw_weights_(drawn, BOUNDS, 11, 12, first_network=3, stream=Stream.WEIGHTS)
    reference.draw_weights_(expected, BOUNDS, 11, 12, first_network=3, stream=Stream.WEIGHTS)
    for ours, theirs in zip(drawn, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_networks_drawn_together_are_those_drawn_alone() -> None:
    together = [torch.empty(3, *shape) for shape in SHAPES]
    ops.draw_weights_(together, BOUNDS, 0, 4, networks=3, first_network=10, stream=7)
    for r in range(3):
        alone = [torch.empty(shape) for shape in SHAPES]
        ops.draw_weights_(alone, BOUNDS, 0, 4, first_network=10 + r, stream=7)
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one, many[r])


def test_weights_are_uniform_and_parameters_may_require_a_gradient() -> None:
    weight = torch.nn.Parameter(torch.empty(200, 500))
    ops.draw_weights_([weight], [0.25], 0, 0, stream=Stream.WEIGHTS)
    histogram = torch.histc(weight.detach(), 50, -0.25, 0.25)
    assert histogram.sum() == weight.numel()
    expected = weight.numel() / 50
    assert ((histogram - expected) ** 2 / expected).sum() < 49 + 5 * (2 * 49) ** 0.5
    assert weight.grad_fn is None


@pytest.mark.parametrize(
    ("tensors", "bounds", "options", "message"),
    [
        ([torch.empty(3)], [], {}, r"bounds must have one element a tensor \(1\), got 0"),
        ([torch.empty(3)], [float("nan")], {}, "bounds must be finite in float32 and 0 or more"),
        ([torch.empty(3)], [1.0], {"networks": 2}, "tensor 0 must have 2 networks"),
        ([torch.empty(3).long()], [1.0], {}, "tensors must be float64, float32"),
        ([torch.empty(3)], [1.0], {"first_network": -1}, "first_network must be from 0 to"),
        ([torch.empty(3)], [1e300], {}, "bounds must be finite in float32"),
        ([torch.empty(1).expand(3)], [1.0], {}, "tensor 0 must not overlap itself"),
        ([torch.empty(7).as_strided((3, 3), (1, 2))], [1.0], {}, "tensor 0 must not overlap"),
        ([torch.empty(3)], [1.0], {"networks": -1}, "networks must be 0 or more, got -1"),
        ([torch.empty(3), torch.empty(3, device="meta")], [1.0] * 2, {}, "tensor 1 is on meta"),
    ],
)
def test_bad_weights_are_named(tensors, bounds, options, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^draw_weights_: {message}"):
        ops.draw_weights_(tensors, bounds, 0, 0, stream=3, **options)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_drawing_weights_that_a_gradient_still_needs_is_an_error(memory_format) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3, 3, 3).to(memory_format=memory_format))
    loss = (weight * weight).sum()
    ops.draw_weights_([weight], [1.0], 0, 0, stream=Stream.WEIGHTS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_tensors_are_no_work() -> None:
    ops.draw_weights_([], [], 0, 0, stream=Stream.WEIGHTS)

# SPDX-License-Identifier: MIT
"""The drop-in augmentations: the published code's outputs, and its distribution."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CUTOUT, FLIP, ROTATE, SCALE, rows
from golden import golden_file
from torch import Tensor

from dmfast import compat, ops
from dmfast.augment import IDENTITY, Column
from dmfast.compat import DiffAug, DiffAugment, ParamDiffAug
from dmfast.errors import InputError

ALL = "color_crop_cutout_flip_scale_rotate"

# Scale and rotate: the published code computes its sampling grids in float32 and is itself off by
# 1.3e-5; where the two nest, that adds up.
TOLERANCE, SAMPLED, NESTED = 1e-5, 3e-5, 5e-5


def cases(path: Path) -> list[dict]:
    with np.load(path) as arrays:
        return json.loads(str(arrays["cases"]))


def tolerance(case: dict) -> float:
    sampling = {"scale", "rotate"} & set(case["strategy"].split("_"))
    if case["aug_mode"] == "M" and len(sampling) == 2:
        return NESTED
    return SAMPLED if sampling else TOLERANCE


GOLDEN = golden_file("diffaugment.npz")


@pytest.mark.parametrize(
    "case",
    cases(GOLDEN),
    ids=lambda c: f"{c['case']}-{c['strategy']}-{c['aug_mode']}-{'x'.join(map(str, c['shape']))}",
)
def test_values_and_gradients_are_the_published_ones(case: dict) -> None:
    with np.load(GOLDEN) as arrays:
        x, y, weight, gradient = (
            torch.from_numpy(arrays[f"{case['case']:03d}_{name}"])
            for name in ["x", "y", "w", "grad"]
        )
    x.requires_grad_()
    param = ParamDiffAug()
    param.aug_mode = case["aug_mode"]
    torch.manual_seed(case["global_seed"])
    out = DiffAugment(x, case["strategy"], seed=case["seed"], param=param)
    (out * weight).sum().backward()
    torch.testing.assert_close(out.detach(), y, rtol=0, atol=tolerance(case))
    torch.testing.assert_close(x.grad, gradient, rtol=0, atol=tolerance(case))
    assert torch.equal(out.detach(), x.detach()) != case["acts"]


@pytest.mark.parametrize("row", [SCALE, ROTATE], ids=["scale", "rotate"])
def test_square_images_are_sampled_as_the_trajectory_matching_lineage_does(row: dict) -> None:
    """Which samples with align_corners: another grid, the same map where height and width agree."""
    x = torch.randn(2, 3, 32, 32)
    sx, sy, angle = row.get("scale_x", 1.0), row.get("scale_y", 1.0), row.get("angle", 0.0)
    cos, sin = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[[cos * sx, -sin, 0], [sin, cos * sy, 0]]]).expand(2, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=True)
    expected = F.grid_sample(x, grid, align_corners=True)
    out = ops.siamese_augment(x, rows(row))
    torch.testing.assert_close(out, expected, rtol=0, atol=SAMPLED)


def test_all_six_transforms_are_covered() -> None:
    if GOLDEN.parent.name == "golden":
        assert len(cases(GOLDEN)) == 96
    words = {word for case in cases(GOLDEN) if case["acts"] for word in case["strategy"].split("_")}
    assert words == {"color", "crop", "cutout", "flip", "scale", "rotate"}


@pytest.mark.parametrize("word", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_one_image_and_a_batch_get_the_same_parameters(word: str) -> None:
    batch = torch.randn(5, 3, 16, 16)
    for seed in range(4):
        alone = DiffAugment(batch[:1], word, seed=seed)
        together = DiffAugment(batch, word, seed=seed)
        torch.testing.assert_close(alone, together[:1])


def test_a_seeded_call_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    DiffAugment(torch.zeros(2, 3, 8, 8), ALL, seed=5)
    assert torch.equal(torch.rand(4), expected)


def test_state_is_written_as_published() -> None:
    param = ParamDiffAug()
    DiffAugment(torch.zeros(2, 3, 8, 8), "crop", seed=7, param=param)
    assert (param.Siamese, param.batchmode, param.latestseed) == (True, True, 10)
    DiffAugment(torch.zeros(2, 3, 8, 8), "crop", param=param)
    assert (param.Siamese, param.latestseed) == (False, -1)


def test_the_flag_may_be_read_and_written_by_either_name() -> None:
    param = ParamDiffAug()
    param.batchmode = True
    assert param.Siamese
    param.Siamese = False
    assert not param.batchmode
    # Code of the trajectory-matching lineage has a strength that no transform reads.
    param.ratio_noise = 0.01
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(DiffAugment(x, ALL, 3, param), DiffAugment(x, ALL, 3))


@pytest.mark.parametrize("mode", ["S", "M"])
def test_without_a_seed_every_image_has_parameters_of_its_own(mode: str) -> None:
    param = ParamDiffAug()
    param.aug_mode = mode
    torch.manual_seed(0)
    same = torch.randn(1, 3, 16, 16).repeat(4, 1, 1, 1)
    out = DiffAugment(same, "scale_rotate", param=param)
    assert len({tuple(image.flatten().tolist()) for image in out}) == 4
    out = DiffAugment(same, "scale_rotate", seed=0, param=param)
    assert len({tuple(image.flatten().tolist()) for image in out}) == 1


def test_a_seed_below_minus_one_is_a_seed_too() -> None:
    """Its draws count up from it; at -1 the published code would go on without a seed."""
    x, param = torch.randn(3, 3, 8, 8), ParamDiffAug()
    param.aug_mode = "M"
    first, before = DiffAugment(x, ALL, seed=-5, param=param), torch.get_rng_state()
    assert torch.equal(first, DiffAugment(x, ALL, seed=-5, param=param))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("strategy", ["none", "None", "", None])
def test_strategy_none_returns_the_images(strategy: str | None) -> None:
    x = torch.randn(2, 3, 8, 8)
    assert DiffAugment(x, strategy) is x
    if strategy is not None:
        assert DiffAug(strategy)(x) is x


def test_an_unknown_transform_is_named() -> None:
    with pytest.raises(InputError, match="unknown transform 'blur'"):
        DiffAugment(torch.zeros(1, 3, 8, 8), "flip_blur")


@pytest.mark.parametrize("x", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_what_is_no_batch_of_images_is_named(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"DiffAugment: x must be floats \[N, C, H, W\], got"):
        DiffAugment(x, "flip")


def test_an_unknown_mode_is_named() -> None:
    param = ParamDiffAug()
    param.aug_mode = "X"
    with pytest.raises(ValueError, match="aug_mode must be 'S' or 'M', got 'X'"):
        DiffAugment(torch.zeros(1, 3, 8, 8), "flip", param=param)


# ---- The multi-formation lineage ---------------------------------------------------------------


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tables that are applied, in order; the images are left as they are."""
    seen: list[Tensor] = []

    def record(x: Tensor, params: Tensor) -> Tensor:
        seen.append(params)
        return x

    monkeypatch.setattr(compat, "siamese_augment", record)
    return seen


IMAGES = torch.zeros(()).expand(40_000, 3, 32, 32)


def deviates_from_uniform(values: Tensor, low: float, high: float) -> bool:
    """Kolmogorov's test at one in a thousand."""
    sorted_values = ((values.double() - low) / (high - low)).sort().values
    assert sorted_values[0] >= 0
    assert sorted_values[-1] <= 1
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max((sorted_values - steps[:-1]).max(), (steps[1:] - sorted_values).max())
    return bool(distance > 1.95 / n**0.5)


def chi_squared(counts: Tensor) -> float:
    """How many standard deviations counts are off those of equally likely outcomes."""
    expected, freedom = counts.sum() / counts.numel(), counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_each_parameter_has_the_original_distribution(tables: list[Tensor]) -> None:
    torch.manual_seed(0)
    DiffAug(ALL)(IMAGES, single_aug=False)
    first, second = tables
    for column, low, high in (
        (Column.BRIGHTNESS, -0.5, 0.5),
        (Column.SATURATION, 0, 2),
        (Column.CONTRAST, 0.5, 1.5),
        (Column.SCALE_X, 1 / 1.2, 1.2),
        (Column.SCALE_Y, 1 / 1.2, 1.2),
        (Column.ANGLE, -np.pi / 12, np.pi / 12),
    ):
        assert not deviates_from_uniform(first[:, column], low, high), column.name
    for table, column, low, high in (
        (first, Column.FLIP, 0, 1),
        (first, Column.CROP_Y, -4, 4),
        (first, Column.CROP_X, -4, 4),
        (second, Column.CUT_TOP, -8, 24),
        (second, Column.CUT_LEFT, -8, 24),
    ):
        counts = torch.bincount((table[:, column] - low).long())
        assert len(counts) == high - low + 1, column.name
        assert chi_squared(counts.double()) < 5, column.name
    assert second[:, [Column.CUT_HEIGHT, Column.CUT_WIDTH]].unique().tolist() == [16]


def test_parameters_of_a_seeded_call_do_not_hang_together(tables: list[Tensor]) -> None:
    """With a seed the original flips exactly where it darkens, pales and flattens."""
    aug = DiffAug("color_flip_scale_rotate", batch=True)
    for seed in range(3000):
        aug(IMAGES[:1], single_aug=False, seed=seed)
    columns = [Column.BRIGHTNESS, Column.SATURATION, Column.CONTRAST, Column.FLIP]
    columns += [Column.SCALE_X, Column.SCALE_Y, Column.ANGLE]
    correlation = torch.corrcoef(torch.cat(tables)[:, columns].double().T)
    assert (correlation - torch.eye(len(columns))).abs().max() < 4.5 / 3000**0.5


@pytest.mark.parametrize("seeded", [False, True])
def test_one_word_is_drawn_for_the_batch_and_cutout_comes_last(
    tables: list[Tensor], seeded: bool
) -> None:
    aug = DiffAug(ALL)
    used = []
    torch.manual_seed(1)
    for seed in range(600):
        tables.clear()
        aug(IMAGES[:8], seed=seed if seeded else -1)
        changed = [(table != torch.tensor(IDENTITY)).any(0) for table in tables]
        crop, scale, rotate = (
            any(bool(one[column].any()) for one in changed)
            for column in ([Column.CROP_Y, Column.CROP_X], [Column.SCALE_X], [Column.ANGLE])
        )
        assert crop + scale + rotate == 1
        assert changed[0][Column.BRIGHTNESS]
        # In one table where the order of its columns allows it.
        assert len(tables) == (1 if crop else 2)
        assert changed[-1][Column.CUT_HEIGHT]
        used.append(scale + 2 * rotate)
    assert chi_squared(torch.bincount(torch.tensor(used)).double()) < 4


def test_single_makes_every_word_an_alternative(tables: list[Tensor]) -> None:
    aug = DiffAug(ALL, batch=True, single=True)
    for seed in range(600):
        aug(IMAGES[:1], seed=seed)
    assert len(tables) == 600
    changed = torch.cat(tables) != torch.tensor(IDENTITY)
    used = torch.stack(
        [
            changed[:, columns].any(1)
            for columns in ([0, 1, 2], [3, 4], [5, 6, 7, 8], [9], [10, 11], [12])
        ]
    )
    assert used.sum(0).max() == 1
    assert (used.sum(1) > 30).all()  # 100 each, 50 of them for flip


def outcomes(strategy: str, width: int) -> list[Tensor]:
    """A row of pixels under flip, then crop, then cutout with every draw of the original."""
    images = [torch.arange(1.0, width + 1).view(1, 1, 1, width)]
    if "flip" in strategy:
        images = [flipped for x in images for flipped in (x, x.flip(3))]
    if "crop" in strategy:
        most = int(width * 0.125 + 0.5)
        padded = [F.pad(x, (most, most)) for x in images]
        images = [x[..., i : i + width] for x in padded for i in range(2 * most + 1)]
    if "cutout" in strategy:
        hole = int(width * 0.5 + 0.5)
        centre = torch.arange(width + 1 - hole % 2).view(-1, 1)
        pixel = torch.arange(width)
        cut = (pixel >= centre - hole // 2) & (pixel < centre - hole // 2 + hole)
        images = [torch.where(c, 0, x) for x in images for c in cut]
    return images


@pytest.mark.parametrize("width", [8, 10])  # holes of 4 and 5 pixels
@pytest.mark.parametrize("strategy", ["flip_crop", "flip_cutout", "flip_crop_cutout"])
def test_images_are_as_often_what_the_original_makes_of_them(strategy: str, width: int) -> None:
    """Flip, crop and cutout stand in a row of the table in another order than the original's."""
    possible = torch.cat(outcomes(strategy, width)).view(-1, width)
    torch.manual_seed(0)
    count = 400 * len(possible)
    x = torch.arange(1.0, width + 1).repeat(count, 1, 1, 1)
    kinds, made = DiffAug(strategy)(x).view(count, width).unique(dim=0, return_counts=True)
    # The same image can come from several draws.
    expected = (kinds[:, None] == possible).all(2).sum(1) * 400.0
    assert expected.sum() == count
    statistic = ((made - expected) ** 2 / expected).sum()
    freedom = len(kinds) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_values_are_those_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flip and rotation in one row, the cutout that follows them in another."""
    x = torch.randn(2, 3, 12, 12)
    draws = {Column.FLIP: FLIP, Column.ANGLE: ROTATE, Column.CUT_TOP: CUTOUT}

    def fill(self, table: Tensor, word: str, generator: object) -> None:
        column = {"flip": Column.FLIP, "rotate": Column.ANGLE, "cutout": Column.CUT_TOP}[word]
        for name, value in draws[column].items():
            table[:, Column[name.upper()]] = value

    monkeypatch.setattr(compat._Tables, "_fill", fill)
    out = DiffAug("flip_rotate_cutout", batch=True)(x)
    turned = ops.siamese_augment(x, rows(FLIP | ROTATE))
    assert torch.equal(out, ops.siamese_augment(turned, rows(CUTOUT)))


def test_translate_moves_along_x_only(tables: list[Tensor]) -> None:
    DiffAug("translate")(IMAGES)
    assert torch.bincount((tables[0][:, Column.CROP_X] + 4).long()).shape == (9,)
    assert not tables[0][:, Column.CROP_Y].any()


@pytest.mark.parametrize("single_aug", [False, True])
def test_a_batch_of_both_is_siamese(single_aug: bool) -> None:
    real, synthetic = torch.randn(5, 3, 16, 16), torch.randn(1, 3, 16, 16)
    aug = DiffAug(ALL, batch=True)
    for seed in (-1, 0, 3):
        torch.manual_seed(7)
        out = aug(torch.cat([real, synthetic, synthetic]), single_aug, seed=seed)
        assert torch.equal(out[5], out[6])
        torch.manual_seed(7)
        torch.testing.assert_close(aug(synthetic, single_aug, seed=seed), out[5:6])
        torch.manual_seed(7)
        torch.testing.assert_close(aug(real, single_aug, seed=seed), out[:5])


def test_each_image_has_a_draw_of_its_own_without_batch() -> None:
    same = torch.randn(1, 3, 16, 16).repeat(4, 1, 1, 1)
    out = DiffAug("color_crop_cutout", batch=False)(same, seed=2)
    assert len({tuple(image.flatten().tolist()) for image in out}) == 4


def test_a_seed_repeats_the_call_and_leaves_every_global_generator_alone() -> None:
    x, aug = torch.randn(3, 3, 8, 8), DiffAug(ALL)
    for seed in (0, 1, -7, 2**63 - 1):
        first = aug(x, seed=seed)
        torch.manual_seed(seed % 1000)
        np.random.seed(seed % 1000)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist()
        assert torch.equal(first, aug(x, seed=seed))
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == np.random.get_state()[1].tolist()
    aug(x)
    assert not torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_gradients(count: int, batch: bool) -> None:
    aug = DiffAug(ALL, batch=batch)
    x = torch.randn(count, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    for seed in range(4):
        assert torch.autograd.gradcheck(lambda x, seed=seed: aug(x, seed=seed), (x,))
        assert torch.autograd.gradcheck(lambda x, seed=seed: aug(x, False, seed=seed), (x,))


@pytest.mark.parametrize("augment", [DiffAug("flip"), lambda x, **o: DiffAugment(x, "flip", **o)])
def test_bad_calls_are_named(augment) -> None:
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(TypeError, match=r"^DiffAug\w*: seed must be a whole number, got float$"):
        augment(x, seed=0.5)
    with pytest.raises(ValueError, match=r"^DiffAug\w*: seed must be from -2\*\*63 to"):
        augment(x, seed=2**63)
    with pytest.raises(ValueError, match=r"^DiffAug\w*: x must be floats \[N, C, H, W\], got"):
        augment(x[0])
    with pytest.raises(ValueError, match=r"^DiffAug\w*: x must be floats \[N, C, H, W\], got"):
        augment(x.long())


def test_bad_strengths_are_named() -> None:
    for name, value in (("ratio_cutout", -1), ("ratio_scale", 0), ("contrast", float("nan"))):
        aug, param = DiffAug("flip"), ParamDiffAug()
        setattr(aug, name, value)
        setattr(param, name, value)
        with pytest.raises(ValueError, match=f"^DiffAug: {name} must be from .* to 1e6, got"):
            aug(torch.zeros(1, 3, 8, 8))
        with pytest.raises(ValueError, match=f"^DiffAugment: {name} must be from .* to 1e6, got"):
            DiffAugment(torch.zeros(1, 3, 8, 8), "flip", param=param)


def test_an_unknown_word_of_the_class_is_named() -> None:
    with pytest.raises(InputError, match=r"unknown transform 'blur'; choose from .*translate"):
        DiffAug("flip_blur")
    with pytest.raises(InputError, match="unknown transform 'translate'"):
        DiffAugment(torch.zeros(1, 3, 8, 8), "translate")


def test_under_capture_the_operators_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = SimpleNamespace(is_cuda=True)
    for augment in (DiffAug("flip"), lambda x: DiffAugment(x, "flip")):
        with pytest.raises(RuntimeError, match=r"captured .*dmfast\.ops\.draw_augmentation .*step"):
            augment(on_gpu)

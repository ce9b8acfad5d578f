# SPDX-License-Identifier: MIT
"""What dmfast is timed against computes the same: losses, gradients, images of the same draws."""

from __future__ import annotations

from typing import Any

import iteration
import numpy as np
import pytest
import torch
from baselines_matching import PublishedGradientMatching, TidiedGradientMatching
from torch import Tensor

from dmfast import _baselines as baselines
from dmfast import compat, ops
from dmfast.augment import WORDS
from dmfast.data import ImageData
from dmfast.gradient_matching import GradientMatcher, Loops, gradient_distance
from dmfast.matching import Matcher, RealImages, initial_images, matching_gradient, plan
from dmfast.networks import get_network
from dmfast.ops import Stream

STRATEGY = "color_crop_cutout_flip_scale_rotate"
MODEL = "ConvNetD2W8"
CLASSES, BATCH, IPC = 3, 8, 2


@pytest.fixture(params=[1, 3], ids=["gray", "colour"])
def data(request: pytest.FixtureRequest) -> ImageData:
    """Three classes of 12 images of 12x8."""
    generator = torch.Generator().manual_seed(0)
    shape = (12 * CLASSES, 12, 8, request.param)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.arange(CLASSES).repeat(12)
    mean, std = (0.5, 0.4, 0.3)[: request.param], (0.2, 0.3, 0.25)[: request.param]
    return ImageData(images, labels, images, labels, ("a", "b", "c"), mean, std, "x")


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("seed", [-1, *range(12)])
def test_the_published_augmentation_is_that_of_compat(seed: int) -> None:
    """Which the published code's own outputs check."""
    x = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    actual = baselines.PublishedAugment(STRATEGY)(x, seed)
    torch.manual_seed(5)
    assert close(actual, compat.DiffAugment(x, STRATEGY, seed=seed))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_tidied_augmentation_is_the_operators(word: str, rows: int) -> None:
    x = torch.randn(5, 3, 12, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    params = ops.draw_augmentation(word, 1, (12, 8), 0, 3, rows=rows, stream=Stream.AUGMENTATION)
    results = []
    for out in (baselines.tidied_augment(x, params, params), ops.siamese_augment(x, params)):
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for actual, expected in zip(*results, strict=True):
        assert close(actual, expected)


@pytest.mark.parametrize("model", [MODEL, "ConvNetD2W8BN"])
def test_the_published_loss_and_gradient(data: ImageData, model: str) -> None:
    images = initial_images(data, IPC, "noise", seed=1)
    published = baselines.PublishedIteration(data, model, images, batch_real=BATCH, strategy="")
    network = get_network(model, data.channels, CLASSES, data.size, seed=3).requires_grad_(False)
    batches = [rows[:BATCH] for rows in published._rows]
    loss = published.loss(network, batches)
    (gradient,) = torch.autograd.grad(loss, published.images)
    expected_loss, expected = matching_gradient(
        network,
        images,
        RealImages(data.train_images, torch.tensor(data.mean), torch.tensor(data.std)),
        torch.from_numpy(np.concatenate(batches)),
        ops.draw_augmentation("", CLASSES, data.size, 0, 0, stream=Stream.AUGMENTATION),
        plan(list(range(0, CLASSES * BATCH + 1, BATCH)), IPC, data.size, baselines.CPU),
    )
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert close(gradient, expected)


def test_published_steps_move_the_images(data: ImageData) -> None:
    images = initial_images(data, IPC, "noise", seed=1)
    published = baselines.PublishedIteration(
        data, MODEL, images, batch_real=BATCH, strategy=STRATEGY
    )
    losses = [published.step() for _ in range(2)]
    assert all(loss.isfinite() and loss > 0 for loss in losses)
    assert not torch.equal(published.images, images)


@pytest.mark.parametrize("model", [MODEL, "ConvNetD2W16BN"])
@pytest.mark.parametrize("strategy", ["", STRATEGY], ids=["plain", "augmented"])
def test_tidied_iterations_are_dmfasts(
    data: ImageData, strategy: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and images of three iterations; in passes of two classes and of one."""
    monkeypatch.setitem(baselines._IMAGES_PER_PASS, "cpu", 2 * BATCH)
    images = initial_images(data, IPC, "noise", seed=1)
    options = {"batch_real": BATCH, "strategy": strategy, "seed": 7}
    tidied = baselines.TidiedIteration(data, model, images, compiled=False, **options)
    network = get_network(model, data.channels, CLASSES, data.size, seed=0)
    ours = Matcher(data, network, images, lr=1.0, momentum=0.5, device=baselines.CPU, **options)
    for step in range(3):
        assert tidied.step(step).item() == pytest.approx(ours.step(step).item(), rel=1e-4)
    assert close(tidied.images.detach() - images, ours.images - images, 1e-3)


def test_the_published_gradient_distance(data: ImageData) -> None:
    """Against that of the operators' network, for the same batches."""
    images = initial_images(data, IPC, "noise", seed=1)
    options: dict[str, Any] = {"batch_real": BATCH, "strategy": "", "loops": Loops(1, 1)}
    published = PublishedGradientMatching(data, MODEL, images, **options)
    network = baselines.torch_network(MODEL, data, seed=3)
    batches = [rows[:BATCH] for rows in published._rows]
    parameters = list(network.parameters())

    def gradients(images: Tensor, label: int) -> list[Tensor]:
        labels = torch.full((len(images),), label)
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        return list(torch.autograd.grad(loss, parameters))

    expected = sum(
        gradient_distance(
            gradients(data.normalise(data.train_images[rows]), k),
            gradients(images[k * IPC : (k + 1) * IPC], k),
        ).item()
        for k, rows in enumerate(batches)
    )
    assert published.loss(network, batches).item() == pytest.approx(expected, rel=1e-4)


def test_published_rounds_move_the_images(data: ImageData) -> None:
    images = initial_images(data, IPC, "noise", seed=1)
    published = PublishedGradientMatching(
        data, MODEL, images, batch_real=BATCH, strategy=STRATEGY, loops=Loops(2, 2)
    )
    assert published.step() > 0
    assert published.images.isfinite().all()
    assert not torch.equal(published.images, images)


def test_tidied_rounds_are_dmfasts(data: ImageData) -> None:
    """Losses of two iterations of two rounds, with training in between."""
    images = initial_images(data, IPC, "noise", seed=1)
    options: dict[str, Any] = {
        **{"batch_real": BATCH, "strategy": STRATEGY, "seed": 7, "lr": 0.1, "momentum": 0.5},
        **{"loops": Loops(2, 2), "precision": "float32"},
    }
    tidied = TidiedGradientMatching(data, MODEL, images, compiled=False, **options)
    network = get_network(MODEL, data.channels, CLASSES, data.size, seed=0)
    ours = GradientMatcher(data, network, images, device=baselines.CPU, **options)
    for step in range(2):
        assert tidied.step(step).item() == pytest.approx(ours.step(step).item(), rel=1e-4)
    assert close(tidied.images - images, ours.images - images, 1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns(data: ImageData, precision: str) -> None:
    """Every way of training lowers the loss on its own images."""
    images, labels = data.normalise(data.train_images), data.train_labels
    trainers = [
        baselines.TidiedTraining(
            data, MODEL, images, labels, "flip", precision=precision, compiled=False
        ),
        baselines.PublishedTraining(data, MODEL, images, labels, "flip"),
    ]
    for trainer in trainers:
        network = trainer._network

        def loss(network: torch.nn.Module = network) -> float:
            with torch.no_grad():
                return torch.nn.functional.cross_entropy(network(images), labels).item()

        before = loss()
        for _ in range(40):
            trainer.epoch()
        assert loss() < 0.95 * before


def test_the_fastest_form_computes_the_same() -> None:
    x = torch.randn(4, 3, 8, 8)
    name, form = baselines.fastest(lambda x: x * 2, lambda form: form(x), compiled=False)
    assert name in ("eager, channels first", "eager, channels last")
    assert torch.equal(form(x), x * 2)


def test_every_case_has_every_contender() -> None:
    for case in iteration.CASES.values():
        assert set(case.contenders) == {
            *("published", "tidied float32", "tidied bfloat16"),
            *("dmfast float32", "dmfast bfloat16"),
        }
    assert iteration.CASES["3x32x32-ipc50"].flop == pytest.approx(361e9, rel=0.001)


def case_of(losses: dict[str, float | None]) -> iteration.Case:
    def run(loss: float | None) -> Tensor | None:
        return None if loss is None else torch.tensor(loss)

    contenders = {name: lambda loss=loss: lambda: run(loss) for name, loss in losses.items()}
    return iteration.Case("a case", flop=1, units=1, contenders=contenders)


def test_a_case_is_timed_in_rounds_and_its_losses_compared() -> None:
    losses: dict[str, float | None] = {
        "published": 1.0,
        "tidied float32": 2.0,
        "tidied bfloat16": 2.05,
        "dmfast float32": 2.001,
        "dmfast bfloat16": 2.0,
    }
    times = iteration.time_case(case_of(losses), seconds=0)
    assert set(times) == set(losses)
    for t in times.values():
        assert t["rounds"] == 3
        assert 0 < t["min"] <= t["median"] <= t["max"]
    assert iteration.time_case(case_of(dict.fromkeys(losses)), seconds=0)
    with pytest.raises(AssertionError, match="Scalars are not close"):
        iteration.time_case(case_of(losses | {"dmfast float32": 2.1}), seconds=0)

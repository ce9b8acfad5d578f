# SPDX-License-Identifier: MIT
"""One iteration of distribution matching against the published code's, and against a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import HERE, golden_file
from torch import Tensor

from dmfast import _in_parts, compat, matching, ops, reference
from dmfast.data import ImageData
from dmfast.errors import InputError
from dmfast.matching import Matcher, RealImages, descend_, initial_images, matching_gradient, plan
from dmfast.networks import Network, get_network, initialise_
from dmfast.ops import Stream

CPU = torch.device("cpu")
STRATEGY = "color_crop_cutout_flip_scale_rotate"


@pytest.fixture
def data() -> ImageData:
    return three_classes()


def three_classes() -> ImageData:
    """Three classes of 5, 11 and 8 images of 12x8."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 5 + [1] * 11 + [2] * 8)[torch.randperm(24, generator=generator)]
    images = torch.randint(0, 256, (24, 12, 8, 3), dtype=torch.uint8, generator=generator)
    names = ("a", "b", "c")
    return ImageData(images, labels, images, labels, names, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), "x")


def matcher(data: ImageData, model: str = "ConvNetD2W8", ipc: int = 2, **options) -> Matcher:
    # In the mode that an iteration must not be in.
    network = get_network(model, data.channels, data.classes, data.size, seed=0).eval()
    settings = {"batch_real": 8, "strategy": STRATEGY, "seed": 7, "lr": 1.0, "momentum": 0.5}
    images = initial_images(data, ipc, "noise", seed=1)
    return Matcher(data, network, images, device=CPU, **(settings | options))


# ---- against the published code


def published_rows(strategy: str, seed: int, real: Tensor) -> Tensor:
    """The augmentation of a class: what the published code draws for its real batch."""
    param = compat.ParamDiffAug()
    param.Siamese, param.latestseed = True, seed
    (rows,) = compat._published_rows(tuple(strategy.split("_")), real, param)
    return rows


@pytest.mark.parametrize(
    "path",
    sorted({golden_file("dm_steps.npz"), HERE / "data" / "dm_steps.npz"}),
    ids=lambda path: path.parent.name,
)
@pytest.mark.parametrize("classes_per_step", [None, 1])
def test_the_published_iterations_are_reproduced(path: Path, classes_per_step: int | None) -> None:
    with np.load(path) as arrays:
        words = {"strategy", "chosen"}
        golden = {name: torch.from_numpy(arrays[name]) for name in set(arrays) - words}
        strategy = str(arrays["strategy"])
    images = golden["syn"].clone()
    buffer = torch.zeros_like(images)
    iterations = sum(name.startswith("loss") for name in golden)
    for i in range(iterations):
        real = golden[f"real{i}"]
        classes, batch, channels, *size = real.shape
        network = get_network("ConvNetW32", channels, classes, tuple(size)).train()
        prefix = f"weights{i}."
        weights = {n.removeprefix(prefix): t for n, t in golden.items() if n.startswith(prefix)}
        assert not network.load_state_dict(weights, strict=False).unexpected_keys
        network.requires_grad_(False)
        seeds = golden["aug_seeds"][i].tolist()
        loss, gradient = matching_gradient(
            network,
            images,
            RealImages(
                real.permute(0, 1, 3, 4, 2).flatten(0, 1),
                torch.zeros(channels),
                torch.ones(channels),
            ),
            torch.arange(classes * batch),
            torch.cat([published_rows(strategy, s, real[c]) for c, s in enumerate(seeds)]),
            plan(
                list(range(0, classes * batch + 1, batch)),
                len(images) // classes,
                tuple(size),
                CPU,
                classes_per_step=classes_per_step,
            ),
        )
        assert loss.item() == pytest.approx(golden[f"loss{i}"].item(), rel=1e-5)
        expected = golden[f"grad{i}"]
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max()
        descend_(images, buffer, gradient, lr=1.0, momentum=0.5)
        if f"syn{i}_after" in golden:
            after = golden[f"syn{i}_after"]
            assert (images - after).abs().max() <= 1e-4 * expected.abs().max()


# ---- against a plain loop over the classes


def plain_iteration(
    data: ImageData, network: Network, images: Tensor, step: int, augment: Callable[..., Tensor]
) -> tuple[Tensor, Tensor]:
    """The same in the fewest words, for networks with and without batch norm alike."""
    images = images.clone().requires_grad_()
    initialise_(network.train(), 7, step)
    order, class_offsets = data.by_class()
    offsets, rows = data.batch_offsets(8)
    index = ops.draw_batch(order, class_offsets, offsets, rows, 7, step, stream=Stream.REAL_BATCH)
    params = ops.draw_augmentation(
        STRATEGY, data.classes, data.size, 7, step, stream=Stream.AUGMENTATION
    )
    real = data.normalise(data.train_images[index])
    real_means = class_means(network.embed(augment(real, params, offsets)), offsets.tolist())
    ipc = len(images) // data.classes
    means = class_means(network.embed(augment(images, params)), range(0, len(images) + 1, ipc))
    loss = sum((a.detach() - b).square().sum() for a, b in zip(real_means, means, strict=True))
    loss.backward()
    return loss.detach(), images.grad


def class_means(embedded: Tensor, offsets) -> list[Tensor]:
    return [embedded[start:end].mean(0) for start, end in pairwise(offsets)]


def assert_same_up_to_rounding(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("model", ["ConvNetD2W8", "ConvNetD2W8BN"])
@pytest.mark.parametrize("step", [0, 3])
def test_an_iteration_is_that_of_the_paper(data: ImageData, model: str, step: int) -> None:
    subject = matcher(data, model)
    network = get_network(model, data.channels, data.classes, data.size, seed=0)
    expected = plain_iteration(data, network, subject.images, step, reference.siamese_augment)
    assert_same_up_to_rounding(subject.gradient(step), expected)


def test_batch_norm_sees_all_classes_at_once(data: ImageData, monkeypatch) -> None:
    """However few images a pass takes."""
    expected = matcher(data, "ConvNetD2W8BN").gradient(2)
    monkeypatch.setitem(matching._PIXELS_PER_PASS, "cpu", 1)
    assert_same_up_to_rounding(matcher(data, "ConvNetD2W8BN").gradient(2), expected)


@pytest.mark.parametrize("kept", [0, 40_000, 2**30])
@pytest.mark.parametrize(
    "model", ["ConvNetD2W16BN", "ConvNetD2W8BN", "ConvNetD2W8ALBNMP", "ConvNetD3W16ASwishBNNP"]
)
def test_batch_norm_in_parts_is_that_of_all(
    data: ImageData, monkeypatch: pytest.MonkeyPatch, model: str, kept: int
) -> None:
    """With all, some or nothing kept between two layers; layers that work in place among them."""
    asked: list[int] = []

    def embed_in_parts(network, images, *, kept_bytes):
        asked.append(len(images))
        return _in_parts.embed_in_parts(network, images, kept_bytes=kept)

    whole = matcher(data, model).gradient(2)
    monkeypatch.setattr(matching, "embed_in_parts", embed_in_parts)
    monkeypatch.setattr(matching, "_BATCH_NORM_BYTES", 0)
    monkeypatch.setitem(matching._PIXELS_PER_PASS, "cpu", 5 * 12 * 8)
    assert_same_up_to_rounding(matcher(data, model).gradient(2), whole)
    assert asked == [5]  # of 21 images


@pytest.mark.parametrize("kept", [0, 60_000, 2**30])
@pytest.mark.parametrize(
    "model",
    ["ConvNetD3W16BN", "ConvNetD2W8ALBNMP", "ConvNetD3W16ASwishBNNP", "AlexNetBN", "VGG11BN"],
)
def test_the_gradient_in_parts_is_that_of_all(model: str, kept: int) -> None:
    """In float64, of few images: the statistics' part of the gradient is large."""
    size = (32, 32) if model in ("AlexNetBN", "VGG11BN") else (12, 8)
    network = get_network(model, 3, 4, size, seed=0).double()
    for norm in (m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(norm.bias, -0.5, 0.5)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(7, 3, *size, dtype=torch.float64, generator=generator).requires_grad_()
    expected = network.embed(images)
    into = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (of_all,) = torch.autograd.grad(expected, images, into)
    embedded = _in_parts.embed_with_gradient(network, images, rows=3, kept_bytes=kept)
    (in_parts,) = torch.autograd.grad(embedded, images, into)
    torch.testing.assert_close(embedded, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(in_parts, of_all, rtol=1e-8, atol=1e-10 * of_all.abs().max().item())
    # Constants in the statistics' place would not do.
    network.eval()
    (other,) = torch.autograd.grad(network.embed(images), images, into)
    assert (other - of_all).norm() > 0.1 * of_all.norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["ConvNetD2W16BN", "ConvNetD2W8BN"])
def test_many_synthetic_images_go_in_parts(
    data: ImageData, monkeypatch: pytest.MonkeyPatch, model: str, precision: str
) -> None:
    loss, gradient = matcher(data, model, precision=precision).gradient(2)
    monkeypatch.setattr(matching, "_BATCH_NORM_GRADIENT_BYTES", 0)
    monkeypatch.setitem(matching._PIXELS_PER_PASS, "cpu", 2 * 12 * 8)
    asked: list[int] = []
    original = _in_parts._gradient

    def counted(network, images, known, gradient, rows, kept_bytes):
        asked.append(len(images.split(rows)))
        return original(network, images, known, gradient, rows, kept_bytes)

    monkeypatch.setattr(_in_parts, "_gradient", counted)
    in_parts = matcher(data, model, precision=precision).gradient(2)
    assert asked == [3]  # of six images
    if precision == "float32":
        assert_same_up_to_rounding(in_parts, (loss, gradient))
    else:
        assert in_parts[0].item() == pytest.approx(loss.item(), rel=0.05)
        cosine = torch.nn.functional.cosine_similarity(in_parts[1].ravel(), gradient.ravel(), 0)
        assert cosine > 0.98


def test_networks_that_are_no_row_of_layers_see_all_at_once(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = get_network("ConvNetD2W8BN", 3, 3, (12, 8), seed=0)
    assert _in_parts.can_be_in_parts(network)
    network.features[1] = torch.nn.Sequential(network.features[1])
    assert not _in_parts.can_be_in_parts(network)
    assert not _in_parts.can_be_in_parts(get_network("ConvNetD2W8", 3, 3, (12, 8), seed=0))
    monkeypatch.setattr(matching, "_BATCH_NORM_BYTES", 0)
    monkeypatch.setitem(matching._PIXELS_PER_PASS, "cpu", 5 * 12 * 8)
    subject = Matcher(
        data,
        network,
        torch.zeros(6, 3, 12, 8),
        **{"batch_real": 8, "strategy": "", "seed": 7, "lr": 1.0, "momentum": 0.5, "device": CPU},
    )
    assert len(subject._chunks[0].passes) == 1


@pytest.mark.parametrize("images_per_pass", [1, 7, 256])
@pytest.mark.parametrize("classes_per_step", [None, 1, 2, 3, 100])
def test_dividing_an_iteration_changes_rounding_only(
    data: ImageData, monkeypatch, classes_per_step: int | None, images_per_pass: int
) -> None:
    expected = matcher(data).gradient(2)
    pixels = data.size[0] * data.size[1]
    monkeypatch.setitem(matching._PIXELS_PER_PASS, "cpu", images_per_pass * pixels)
    divided = matcher(data, classes_per_step=classes_per_step).gradient(2)
    assert_same_up_to_rounding(divided, expected)


@pytest.mark.parametrize(
    ("offsets", "ipc", "size", "classes_per_step"),
    [
        (range(0, 2561, 256), 10, (32, 32), None),
        (range(0, 2561, 256), 50, (32, 32), None),
        (range(0, 51201, 256), 1, (64, 64), None),
        ([0, 1, 300, 301, 999], 3, (28, 28), 2),
    ],
)
def test_a_plan_covers_every_row_once_within_its_bounds(offsets, ipc, size, classes_per_step):
    chunks = plan(list(offsets), ipc, size, CPU, classes_per_step=classes_per_step)
    limit = 256 * 32 * 32 // (size[0] * size[1])
    rows, classes, synthetic = [], [], []
    for chunk in chunks:
        count = chunk.classes.stop - chunk.classes.start
        classes += range(chunk.classes.start, chunk.classes.stop)
        synthetic += range(chunk.synthetic.start, chunk.synthetic.stop)
        assert count <= (classes_per_step or max(1, limit // ipc))
        assert chunk.offsets.tolist() == [
            offsets[c] - chunk.rows.start
            for c in range(chunk.classes.start, chunk.classes.stop + 1)
        ]
        for part in chunk.passes:
            rows += range(part.rows.start, part.rows.stop)
            assert part.rows.stop - part.rows.start <= limit
            assert part.offsets[0] == 0
            assert part.offsets[-1] == part.rows.stop - part.rows.start
    assert rows == list(range(offsets[-1]))
    assert classes == list(range(len(offsets) - 1))
    assert synthetic == list(range(ipc * (len(offsets) - 1)))


# ---- the update, the draws, the start


def test_the_update_is_that_of_torch_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    parameter = torch.nn.Parameter(images.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=0.5)
    buffer = torch.zeros_like(images)
    for _ in range(4):
        parameter.grad = torch.randn(images.shape, generator=generator)
        optimizer.step()
        descend_(images, buffer, parameter.grad, lr=0.3, momentum=0.5)
    assert torch.equal(images, parameter.detach())


@pytest.mark.parametrize("model", ["ConvNetD2W8", "ConvNetD2W8BN"])
def test_an_iteration_depends_on_its_number_alone(data: ImageData, model: str) -> None:
    straight, jumping = matcher(data, model), matcher(data, model)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    losses = [straight.step(step) for step in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({loss.item() for loss in losses}) == 3

    jumping.gradient(5)
    for step in range(3):
        assert torch.equal(jumping.step(torch.tensor([step])), losses[step])
    assert torch.equal(jumping.images, straight.images)
    assert torch.equal(jumping.momentum_buffer, straight.momentum_buffer)


def test_bfloat16_is_for_the_passes_only(data: ImageData) -> None:
    loss, gradient = matcher(data, "ConvNetD2W64").gradient(1)
    low_loss, low_gradient = matcher(data, "ConvNetD2W64", precision="bfloat16").gradient(1)
    assert low_loss.dtype == low_gradient.dtype == torch.float32
    assert low_loss.item() == pytest.approx(loss.item(), rel=0.05)
    assert torch.cosine_similarity(low_gradient.flatten(), gradient.flatten(), dim=0) > 0.99
    assert not torch.equal(low_gradient, gradient)


def test_images_can_start_from_real_ones(data: ImageData) -> None:
    images = initial_images(data, 4, "real", seed=3)
    everything = data.normalise(data.train_images)
    found = [
        torch.nonzero((everything == image).flatten(1).all(1)).flatten().tolist()
        for image in images
    ]
    assert all(len(match) == 1 for match in found)
    chosen = torch.tensor(found).flatten()
    assert len(set(chosen.tolist())) == 12
    assert data.train_labels[chosen].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not torch.equal(images, initial_images(data, 4, "real", seed=4))


def test_images_can_start_from_noise(data: ImageData) -> None:
    state = torch.get_rng_state()
    images = initial_images(data, 40, "noise", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert images.shape == (120, 3, 12, 8)
    assert abs(images.mean()) < 0.02
    assert abs(images.std() - 1) < 0.02
    assert torch.equal(images, initial_images(data, 40, "noise", seed=3))
    assert not torch.equal(images, initial_images(data, 40, "noise", seed=4))


def test_more_images_than_a_class_has_is_an_error(data: ImageData) -> None:
    with pytest.raises(InputError, match=r"--ipc 6: class 'a' of x has 5 images.*--init noise"):
        initial_images(data, 6, "real", seed=0)

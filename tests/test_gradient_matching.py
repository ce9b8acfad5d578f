# SPDX-License-Identifier: MIT
"""Gradient matching (DC and DSA) against the published algorithm, written out plainly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dmfast import condense, ops
from dmfast.condense import CondenseConfig
from dmfast.data import ImageData, load
from dmfast.errors import InputError
from dmfast.gradient_matching import LOOPS, GradientMatcher, Loops, gradient_distance, loops_of
from dmfast.matching import initial_images
from dmfast.networks import get_network, has_batch_norm, initialise_
from dmfast.ops import Stream
from dmfast.presets import preset

CPU = torch.device("cpu")
STRATEGY = "color_crop_cutout_scale_rotate"
SETTINGS = {"batch_real": 16, "seed": 3, "lr": 0.1, "momentum": 0.5}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits")


def make(data: ImageData, model: str, *, strategy: str = STRATEGY, ipc: int = 2, **changes):
    network = get_network(model, data.channels, data.classes, data.size, seed=0)
    images = initial_images(data, ipc, "noise", 3)
    settings = SETTINGS | {"strategy": strategy, "loops": Loops(3, 2), "device": CPU} | changes
    return GradientMatcher(data, network, images, **settings)


# ---- the distance


def test_the_distance_is_summed_over_the_outputs_of_each_layer() -> None:
    torch.manual_seed(0)
    shapes = [(4, 3, 3, 3), (4,), (5, 6, 6), (7, 8), (7,)]
    real, synthetic = ([torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(2))
    expected = 0.0
    for r, s in zip(real, synthetic, strict=True):
        if r.dim() == 1:
            continue
        for row in range(len(r)):
            a, b = r[row].flatten(), s[row].flatten()
            expected += 1 - (a @ b / (a.norm() * b.norm() + 1e-6)).item()
    assert gradient_distance(real, synthetic).item() == pytest.approx(expected, rel=1e-12)
    assert gradient_distance(real, real).item() == pytest.approx(0, abs=1e-5)
    zeros = [torch.zeros_like(r) for r in real]
    assert gradient_distance(real, zeros).item() == 4 + 5 + 7  # one a row, and no NaN


@pytest.mark.parametrize("model", ["ConvNetD1W4", "ConvNetD1W4BN"])
def test_its_second_derivative_is_there(digits: ImageData, model: str) -> None:
    """Through the augmentation and the network, to the pixels."""
    network = get_network(model, 1, 3, (4, 4), seed=0).double()
    network.fused = False
    network.eval()
    parameters = list(network.parameters())
    params = ops.draw_augmentation(STRATEGY, 1, (4, 4), 1, 0, stream=Stream.AUGMENTATION)
    torch.manual_seed(0)
    images = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    of_real = [torch.randn_like(p) for p in parameters]

    def distance(images: Tensor) -> Tensor:
        logits = network(ops.siamese_augment(images, params))
        loss = F.cross_entropy(logits, torch.tensor([1, 1]))
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return gradient_distance(of_real, gradients)

    assert torch.autograd.gradcheck(distance, images)


# ---- an iteration


class Published:
    """The published loop on the same draws, with torch's layers and optimizers."""

    def __init__(self, data: ImageData, model: str, matcher: GradientMatcher, strategy: str):
        self.data, self.strategy = data, strategy
        self.loops, self.seed = matcher._loops, SETTINGS["seed"]
        self.network = get_network(model, data.channels, data.classes, data.size, seed=0)
        self.network.fused = False
        self.images = matcher.images.clone().requires_grad_()
        self.labels = torch.arange(data.classes).repeat_interleave(len(self.images) // data.classes)
        self.optimizer = torch.optim.SGD([self.images], SETTINGS["lr"], SETTINGS["momentum"])

    def real(self, count: int, step: int, stream: Stream, params: Tensor | None) -> list[Tensor]:
        """Of each class: normalised and augmented images."""
        order, class_offsets = self.data.by_class()
        offsets, rows = self.data.batch_offsets(count)
        index = ops.draw_batch(order, class_offsets, offsets, rows, self.seed, step, stream=stream)
        images = self.data.normalise(self.data.train_images[index])
        parts = [images[a:b] for a, b in itertools.pairwise(offsets)]
        if params is None:
            return parts
        return [ops.siamese_augment(part, params[k : k + 1]) for k, part in enumerate(parts)]

    def step(self, number: int) -> float:
        data, network = self.data, self.network
        initialise_(network, self.seed, number)
        network.train()
        parameters = list(network.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        loss_sum = 0.0
        for outer in range(self.loops.outer):
            step = number * self.loops.outer + outer
            if has_batch_norm(network):
                network.train()
                network(torch.cat(self.real(16, step, Stream.NORM_BATCH, None)))
                for module in network.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.eval()
            params = ops.draw_augmentation(
                self.strategy, data.classes, data.size, self.seed, step, stream=Stream.AUGMENTATION
            )
            real = self.real(SETTINGS["batch_real"], step, Stream.REAL_BATCH, params)
            loss = torch.zeros(())
            for k in range(data.classes):
                of_real = torch.autograd.grad(
                    F.cross_entropy(network(real[k]), torch.full((len(real[k]),), k)), parameters
                )
                mine = ops.siamese_augment(self.images[self.labels == k], params[k : k + 1])
                of_mine = torch.autograd.grad(
                    F.cross_entropy(network(mine), torch.full((len(mine),), k)),
                    parameters,
                    create_graph=True,
                )
                loss = loss + gradient_distance(of_real, of_mine)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.item()
            if outer == self.loops.outer - 1:
                break
            for inner in range(self.loops.inner):
                self.train(optimizer, step * self.loops.inner + inner)
        return loss_sum / self.loops.outer

    def train(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        self.network.train()
        images, labels = self.images.detach(), self.labels
        rows = torch.tensor([0, len(images)])
        order = ops.draw_batch(
            torch.arange(len(images)), rows, rows, len(images), self.seed, epoch,
            stream=Stream.TRAINING_BATCH,
        )  # fmt: skip
        images, labels = images[order], labels[order]
        if self.strategy:
            params = ops.draw_augmentation(
                self.strategy, 1, self.data.size, self.seed, epoch, rows=len(images),
                stream=Stream.TRAINING_AUGMENTATION,
            )  # fmt: skip
            images = ops.siamese_augment(images, params)
        optimizer.zero_grad()
        F.cross_entropy(self.network(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("strategy", [STRATEGY, ""], ids=["dsa", "dc"])
@pytest.mark.parametrize("model", ["ConvNetD1W16", "ConvNetD2W8BN", "ConvNetD1W8LN"])
def test_iterations_are_the_published_ones(digits: ImageData, model: str, strategy: str) -> None:
    matcher = make(digits, model, strategy=strategy)
    published = Published(digits, model, matcher, strategy)
    for number in range(3):
        loss = matcher.step(number)
        assert loss.item() == pytest.approx(published.step(number), rel=1e-4)
    moved = (published.images - initial_images(digits, 2, "noise", 3)).abs().max().item()
    assert moved > 0.01
    torch.testing.assert_close(matcher.images, published.images.detach(), rtol=0, atol=1e-3 * moved)


def test_a_step_may_be_a_tensor(digits: ImageData) -> None:
    a, b = (make(digits, "ConvNetD1W16") for _ in range(2))
    assert a.step(2).item() == b.step(torch.tensor([2])).item()
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.momentum_buffer, b.momentum_buffer)


def test_a_gradient_changes_nothing_that_lasts(digits: ImageData) -> None:
    matcher = make(digits, "ConvNetD1W16")
    before = matcher.images.clone()
    first, second = (matcher.gradient(0) for _ in range(2))
    assert torch.equal(matcher.images, before)
    assert not matcher.momentum_buffer.any()
    assert torch.equal(first[1], second[1])


def test_real_images_that_fill_no_batch_are_all_used(digits: ImageData) -> None:
    matcher = make(digits, "ConvNetD1W8", batch_real=10_000, loops=Loops(2, 0))
    assert matcher.real_images_per_step == 2 * len(digits.train_images)
    assert matcher.step(0).isfinite()


def test_bfloat16_products_leave_the_distance_in_float32(digits: ImageData) -> None:
    full, half = (make(digits, "ConvNetD1W16", precision=p) for p in ("float32", "bfloat16"))
    a, b = full.step(0), half.step(0)
    assert b.dtype == torch.float32
    assert a.item() != b.item()
    torch.testing.assert_close(a, b, rtol=0.02, atol=0)


# ---- the command's job


@pytest.mark.parametrize("method", ["dc", "dsa"])
def test_a_run_gets_better_and_resumes_to_the_same_bits(method: str, tmp_path: Path) -> None:
    config = CondenseConfig(
        method=method, ipc=1, model="ConvNetD1W16", iterations=12, batch_real=16
    )

    def run(out: Path, **changes: object) -> None:
        condense.run(CondenseConfig(**(vars(config) | {"out": str(out)} | changes)))

    run(tmp_path / "straight")
    run(tmp_path / "resumed", iterations=5, checkpoint_every=2)
    run(tmp_path / "resumed", resume=True)
    a, b = (
        load_file(tmp_path / name / "synthetic.safetensors") for name in ("straight", "resumed")
    )
    assert torch.equal(a["images"], b["images"])
    lines = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 12
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    options = json.loads((tmp_path / "straight" / "config.json").read_text())["options"]
    assert (options["outer_loops"], options["inner_loops"], options["init"]) == (
        1,
        1,
        "real" if method == "dsa" else "noise",
    )
    assert options["dsa_strategy"] == (STRATEGY if method == "dsa" else "")
    with pytest.raises(InputError, match="was begun with --method"):
        run(tmp_path / "straight", method="dm", resume=True)


def test_the_presets_are_the_papers() -> None:
    for method in ("dc", "dsa"):
        chosen = preset("cifar10", 10, method=method)
        assert (chosen.lr_img, chosen.iterations) == (0.1, 1000)
        assert chosen.init == ("real" if method == "dsa" else "noise")
        assert bool(chosen.dsa_strategy) == (method == "dsa")


@pytest.mark.parametrize(("ipc", "loops"), LOOPS.items())
def test_the_loops_are_the_published_ones(ipc: int, loops: Loops) -> None:
    published = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert loops_of(ipc, None, None) == published[ipc]
    assert loops_of(ipc, 3, None) == (3, loops.inner)
    assert loops_of(ipc, None, 0) == (loops.outer, 0)
    assert loops_of(7, 3, 4) == (3, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "kip"}, "'kip'; choose from dm, dc, dsa"),
        ({"method": "dsa", "ipc": 3}, "--ipc 3: .* --outer-loops and --inner-loops"),
        ({"method": "dc", "dsa_strategy": "color"}, "--method dsa does"),
        ({"method": "dsa", "preset": "fast"}, "--preset fast is for --method dm"),
        ({"method": "dsa", "classes_per_step": 3}, "--classes-per-step goes with --method dm"),
        ({"method": "dc", "memory_budget": "1G"}, "--memory-budget goes with --method dm"),
        ({"method": "dc", "graph": "required"}, "--graph required: --method dc"),
        ({"outer_loops": 2}, "--outer-loops goes with --method dc or dsa"),
        ({"method": "dsa", "outer_loops": 0}, "--outer-loops must be 1 or more"),
        ({"method": "dsa", "ipc": 10, "iterations": 2**30}, "are more than 4294967296"),
    ],
)
def test_what_does_not_fit_a_method_is_named(changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        condense.run(CondenseConfig(**({"ipc": 1, "out": str(tmp_path / "run")} | changes)))
    assert not (tmp_path / "run").exists()

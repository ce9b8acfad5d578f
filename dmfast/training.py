# SPDX-License-Identifier: MIT
"""Training freshly drawn networks on a few images, and testing them on real ones.

Initial weights, batches and augmentation are pure functions of the seed and the network's number.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .augment import parse_strategy
from .data import ImageData, NormalisedImages
from .devices import autocast, memory_format, resolve_device, resolve_precision
from .errors import choose
from .networks import get_network, initialise_
from .ops import Stream

_TEST_BATCH = 500


@dataclass(frozen=True)
class Protocol:
    """How a network is trained on a small set: SGD on the cross entropy, epochs 0 to E.

    After epoch E // 2 + 1 the learning rate is multiplied by ``decay`` and the optimizer made anew,
    which loses its momentum. Each batch is augmented by one transform, drawn for the batch, with
    parameters drawn for each image. The result is the test accuracy after the last epoch. The paper
    is silent on this; it is what its published code does.

    Attributes:
        networks, epochs: how many networks, and E, where the user does not say.
        plain_epochs: in place of ``epochs`` where nothing is augmented.
        test_every: epochs between tests, of which the best is the result; 0 for the last epoch's.
    """

    batch: int = 256
    learning_rate: float = 0.01
    decay: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    networks: int = 20
    epochs: int = 1000
    plain_epochs: int = 1000
    test_every: int = 0

    @property
    def accuracy_of(self) -> str:
        """Which accuracy of a network is its result."""
        if self.test_every == 0:
            return "the last epoch"
        return f"the best, on the test images, of every {self.test_every}th epoch and the last"


#: ``dc-bench`` is DC-BENCH's with Siamese augmentation or without any. ``best-epoch`` reports as
#: NCFM's code does on CIFAR-10, and IDC's more coarsely; it trains as published, not as they do.
PROTOCOLS = {
    "published": Protocol(),
    "dc-bench": Protocol(networks=5, plain_epochs=300),
    "best-epoch": Protocol(test_every=20),
}


def train(
    network: nn.Module,
    images: Tensor | NormalisedImages,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    index: int = 0,
    strategy: str = "",
    precision: str = "float32",
    protocol: Protocol = PROTOCOLS["published"],
    on_batch: Callable[[Tensor, Tensor], object] | None = None,
    on_epoch: Callable[[], object] | None = None,
) -> None:
    """Trains ``network`` in place, for epochs 0 to ``epochs``.

    Args:
        images: [N, C, H, W] float32, normalised, on the network's device. Batches keep the
            memory format.
        labels: [N] int64, or [N, K] float32: a probability for each class.
        index: the network's number: batches and augmentation follow from it and the seed.
        strategy: words of the augmentation joined by underscores; "" for none.
        precision: ``float32``, or ``bfloat16`` for the network's passes (weights stay float32).
        on_batch: called with the rows of each batch and the logits it was given, before the update.
        on_epoch: called after each epoch.
    """
    learning_rate = protocol.learning_rate

    def new_optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD(
            network.parameters(),
            learning_rate,
            protocol.momentum,
            weight_decay=protocol.weight_decay,
            fused=True,
        )

    network.train()
    optimizer = new_optimizer()
    for epoch in range(epochs + 1):
        train_epoch(
            network,
            optimizer,
            images,
            labels,
            seed=seed,
            epoch=epoch,
            index=index,
            batch=protocol.batch,
            strategy=strategy,
            precision=precision,
            on_batch=on_batch,
        )
        if epoch == epochs // 2 + 1:
            learning_rate *= protocol.decay
            optimizer = new_optimizer()
        if on_epoch:
            on_epoch()


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor | NormalisedImages,
    labels: Tensor,
    *,
    seed: int,
    epoch: int | Tensor,
    index: int = 0,
    batch: int = Protocol.batch,
    strategy: str = "",
    precision: str = "float32",
    streams: tuple[Stream, Stream] = (Stream.EVALUATION_BATCH, Stream.EVALUATION_AUGMENTATION),
    on_batch: Callable[[Tensor, Tensor], object] | None = None,
) -> None:
    """One epoch of SGD on the cross entropy: each image once, in a random order.

    Args:
        epoch: from 0; with ``seed``, ``index`` and the ``streams`` of batches and of augmentation
            it decides what is drawn. An int, or an int64 tensor of one element on the device.
        batch: images a step; the last step has the rest.
        on_batch: see :func:`train`.
    """
    device, (height, width) = images.device, images.shape[-2:]
    offsets = torch.tensor([0, len(images)], device=device)
    order = ops.draw_batch(
        torch.arange(len(images), device=device),
        offsets,
        offsets,
        len(images),
        seed,
        epoch,
        first_class=index,
        stream=streams[0],
    )
    batches = torch.split(order, batch)
    for number, rows in enumerate(batches):
        x = images[rows]
        if strategy:
            params = ops.draw_augmentation(
                strategy,
                1,
                (height, width),
                seed,
                epoch * len(batches) + number,
                rows=len(rows),
                first_group=index,
                stream=streams[1],
                device=device,
            )
            x = ops.siamese_augment(x, params)
        with autocast(device, precision):
            logits = network(x)
        if on_batch:
            on_batch(rows, logits.detach())
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@dataclass(frozen=True)
class EvaluationResult:
    """The test accuracies, in %, of networks 0, 1, ..., and the time that took."""

    accuracies: tuple[float, ...]
    seconds: float

    @property
    def accuracy_mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def accuracy_std(self) -> float:
        """The standard deviation of the networks (ddof 0, as published)."""
        return statistics.pstdev(self.accuracies)

    @property
    def interval_95(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean (Student's t); None for a single network.

        It covers what is drawn for each network. How much another run of the condensation would
        differ, it cannot know.
        """
        n = len(self.accuracies)
        if n == 1:
            return None
        from scipy.special import stdtrit

        half = float(stdtrit(n - 1, 0.975)) * self.accuracy_std / math.sqrt(n - 1)
        return max(self.accuracy_mean - half, 0.0), min(self.accuracy_mean + half, 100.0)


class Evaluator:
    """Trains and tests network after network; what they share is made once."""

    def __init__(
        self,
        data: ImageData,
        *,
        model: str,
        epochs: int,
        seed: int,
        strategy: str,
        precision: str,
        device: str | torch.device,
        protocol: str,
        learning_rate: float | None = None,
    ) -> None:
        """``learning_rate`` is in place of the protocol's; the rest is as of evaluate_set."""
        choose("--protocol", protocol, PROTOCOLS)
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device, model)
        self._protocol = PROTOCOLS[protocol]
        if learning_rate is not None:
            self._protocol = replace(self._protocol, learning_rate=learning_rate)
        self._epochs, self._seed = epochs, seed
        self._strategy = "_".join(parse_strategy(strategy))
        self._layout = memory_format(self.device)
        network = get_network(model, data.channels, data.classes, data.size, seed)
        self._network = network.to(self.device, memory_format=self._layout)  # type: ignore[call-overload]
        self._test_images = data.normalise(data.test_images).to(
            self.device, memory_format=self._layout
        )
        self._test_labels = data.test_labels.to(self.device)

    @property
    def learning_rate(self) -> float:
        """At the beginning of a training."""
        return self._protocol.learning_rate

    def __call__(
        self,
        images: Tensor | NormalisedImages,
        labels: Tensor,
        index: int,
        on_epoch: Callable[[], object] | None,
    ) -> float:
        """The test accuracy, in %, of network ``index`` trained on these images.

        Args:
            labels, on_epoch: see :func:`train`.
        """
        initialise_(
            self._network,
            self._seed,
            0,
            network_index=index,
            stream=Stream.EVALUATION_WEIGHTS,
        )
        epoch, best, every = 0, 0.0, self._protocol.test_every

        def after_epoch() -> None:
            nonlocal epoch, best
            if every and 0 < epoch < self._epochs and epoch % every == 0:
                best = max(best, self._test())
                self._network.train()
            epoch += 1
            if on_epoch:
                on_epoch()

        train(
            self._network,
            images.to(self.device, memory_format=self._layout),
            labels.to(self.device),
            epochs=self._epochs,
            seed=self._seed,
            index=index,
            strategy=self._strategy,
            precision=self.precision,
            protocol=self._protocol,
            on_epoch=after_epoch,
        )
        return max(best, self._test())

    @torch.no_grad()
    def _test(self) -> float:
        self._network.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in zip(
            torch.split(self._test_images, _TEST_BATCH),
            torch.split(self._test_labels, _TEST_BATCH),
            strict=True,
        ):
            with autocast(self.device, self.precision):
                logits = self._network(images)
            correct += (logits.argmax(1) == labels).sum()
        return 100 * correct.item() / len(self._test_labels)


def evaluate_set(
    images: Tensor | NormalisedImages,
    labels: Tensor,
    data: ImageData,
    *,
    model: str = "ConvNet",
    networks: int = 20,
    epochs: int = 1000,
    seed: int = 0,
    strategy: str = "",
    precision: str = "auto",
    device: str | torch.device = "auto",
    protocol: str = "published",
    on_epoch: Callable[[], object] | None = None,
) -> EvaluationResult:
    """Trains freshly drawn networks on ``images`` and tests each on the test images of ``data``.

    Args:
        images: [N, C, H, W] float32, normalised by the mean and std of ``data``.
        labels: see :func:`train`.
        strategy: words of the augmentation joined by underscores; "" for none.
        precision: ``float32``, ``bfloat16`` (the networks' passes), or ``auto``: bfloat16 on a GPU,
            and on a CPU that has instructions for it where the network goes by the fused blocks.
        device: as torch names it, or ``auto``: a GPU where there is one.
        on_epoch: called after each of the ``networks * (epochs + 1)`` epochs.

    Raises:
        InputError: the model, strategy, precision, device or protocol is unknown or cannot be used.
    """
    evaluator = Evaluator(
        data,
        model=model,
        epochs=epochs,
        seed=seed,
        strategy=strategy,
        precision=precision,
        device=device,
        protocol=protocol,
    )
    start = time.perf_counter()
    accuracies = [evaluator(images, labels, index, on_epoch) for index in range(networks)]
    return EvaluationResult(tuple(accuracies), time.perf_counter() - start)

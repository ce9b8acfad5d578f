# SPDX-License-Identifier: MIT
"""Freshly drawn networks, trained on a few images and tested on real ones.

A network's initial weights, batches and augmentation are pure functions of the seed and its number.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._own import OwnNetwork, are_sound
from ._stack import NetworkStack, can_stack
from .augment import parse_strategy
from .data import ImageData, NormalisedImages
from .devices import (
    autocast,
    free_memory,
    memory_format,
    resolve_device,
    resolve_precision,
)
from .errors import InputError, choose
from .graphs import first_said, recorder_of
from .networks import ConvNet, get_network, initialise_
from .ops import Stream
from .training import PROTOCOLS, train

TrainingSet = tuple[Tensor | NormalisedImages, Tensor]

_TEST_BATCH = 500
# Images of all networks in a step. On two cores four networks of 100 images are as fast as any
# number, and what is kept for the backward is 0.6 MB an image of 32x32; a GPU is to be filled.
_IMAGES_AT_ONCE = {"cpu": 512, "cuda": 8192}


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
    """Trains and tests networks, many at once where they can be stacked; what they share is kept.

    Networks can be stacked where they go by the fused blocks. Others are trained one by one.
    """

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
        networks_at_once: int | None = None,
        graph: str = "auto",
        note: Callable[[str], object] = lambda words: None,
    ) -> None:
        """The rest is as of :func:`evaluate_set`.

        Args:
            learning_rate: in place of the protocol's.
            note: told, in a sentence, where less memory or no CUDA graph is gone on with.
        """
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
        self._recorder, self._required = recorder_of(graph, self.device), graph == "required"
        self._most = networks_at_once
        self._stack: NetworkStack | None = None
        self._note = note

    @property
    def learning_rate(self) -> float:
        """At the beginning of a training."""
        return self._protocol.learning_rate

    def networks_at_once(self, images: int) -> int:
        """How many networks are best trained at once on so many images each."""
        if not can_stack(self._network, self.device):
            return 1
        if self._most is not None:
            return self._most
        pixels = math.prod(self._test_images.shape[-2:])
        at_once = _IMAGES_AT_ONCE[self.device.type] * 32 * 32 // pixels
        return max(1, at_once // min(images, self._protocol.batch))

    def __call__(
        self,
        sets: Sequence[TrainingSet],
        first: int,
        on_epoch: Callable[[int], object] = lambda networks: None,
    ) -> list[float]:
        """The test accuracies, in %, of networks ``first`` and on, one trained on each set at once.

        Args:
            sets: images and labels as :func:`dmfast.training.train` takes them, of one shape; as
                many as :meth:`networks_at_once` allows.
            on_epoch: called with the number of networks that have been through another epoch, or
                minus those that have to go through some again.

        Raises:
            InputError: memory does not suffice for one network, an epoch cannot be recorded in a
                CUDA graph but has to be, or a network of the user's has no finite logits any more.
        """
        counted = 0

        def count(networks: int) -> None:
            nonlocal counted
            counted += networks
            on_epoch(networks)

        while True:
            try:
                return self._evaluate(sets, first, count)
            except RuntimeError as error:
                reason, short = first_said(error)
                if not short and self._recorder is None:
                    raise
            # Not in the handler: the error holds on to what was allocated.
            on_epoch(-counted)
            counted = 0
            if short:
                networks = "1 network" if len(sets) == 1 else f"{len(sets)} networks"
                where = f"{self.device} has no memory for {networks} at once"
                where += free_memory(self.device)
                if len(sets) == 1:
                    raise InputError(f"{where}: choose --precision bfloat16 or a smaller --model")
                self._most = half = len(sets) // 2
                self._note(
                    f"{where}: going on with {half}, as --networks-at-once {half} does from the "
                    "start"
                )
                return [
                    *self(sets[:half], first, on_epoch),
                    *self(sets[half:], first + half, on_epoch),
                ]
            words = f"an epoch could not be captured in a CUDA graph ({reason})"
            if self._required:
                raise InputError(
                    f"--graph required: {words}; leave the option out to go on without"
                )
            self._note(f"no CUDA graph, as {words}: slower")
            self._recorder = None

    def _evaluate(
        self, sets: Sequence[TrainingSet], first: int, count: Callable[[int], object]
    ) -> list[float]:
        networks = len(sets)
        network: NetworkStack | None = None
        if not can_stack(self._network, self.device):
            initialise_(
                self._network,
                self._seed,
                0,
                network_index=first,
                stream=Stream.EVALUATION_WEIGHTS,
            )
        else:
            network = self._stack_of(networks)
            network.initialise_(self._seed, first, Stream.EVALUATION_WEIGHTS)
        epoch, every = 0, self._protocol.test_every
        best = [0.0] * networks

        def test() -> None:
            for number in range(networks):
                if network is not None:
                    network.copy_to(self._network, number)
                best[number] = max(best[number], self._test(first + number))
            self._network.train()

        def after_epoch() -> None:
            nonlocal epoch
            if every and 0 < epoch < self._epochs and epoch % every == 0:
                test()
            epoch += 1
            count(networks)

        images, labels = sets[0]
        own_images = any(other is not images for other, _ in sets)
        if own_images:
            of_networks = [images for images, _ in sets if isinstance(images, Tensor)]
            images, labels = torch.cat(of_networks), torch.cat([labels for _, labels in sets])
        train(
            network or self._network,
            images.to(self.device, memory_format=self._layout),
            labels.to(self.device),
            epochs=self._epochs,
            seed=self._seed,
            index=first,
            networks=networks,
            own_images=own_images,
            strategy=self._strategy,
            precision=self.precision,
            protocol=self._protocol,
            recorder=self._recorder,
            on_epoch=after_epoch,
        )
        test()
        return best

    def _stack_of(self, networks: int) -> NetworkStack:
        if self._stack is None or self._stack.networks != networks:
            self._stack = None  # its memory is given back first
            assert isinstance(self._network, ConvNet)
            self._stack = NetworkStack(self._network, networks).to(self.device)
        return self._stack

    @torch.no_grad()
    def _test(self, index: int) -> float:
        """The accuracy of the network, which is that of number ``index``."""
        self._network.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        sound = torch.ones((), dtype=torch.bool, device=self.device)
        own = self._network if isinstance(self._network, OwnNetwork) else None
        for images, labels in zip(
            torch.split(self._test_images, _TEST_BATCH),
            torch.split(self._test_labels, _TEST_BATCH),
            strict=True,
        ):
            with autocast(self.device, self.precision):
                logits = self._network(images)
            correct += (logits.argmax(1) == labels).sum()
            if own is not None:
                sound &= are_sound(logits.float())
        if own is not None and not sound:
            raise own.not_finite(
                f"the logits of network {index + 1}, trained at a learning rate of "
                f"{self.learning_rate:g}, are"
            )
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
    networks_at_once: int | None = None,
    graph: str = "auto",
    on_epoch: Callable[[int], object] = lambda networks: None,
) -> EvaluationResult:
    """Trains freshly drawn networks on ``images`` and tests each on the test images of ``data``.

    Args:
        images: [N, C, H, W] float32, normalised by the mean and std of ``data``.
        labels: see :func:`dmfast.training.train`.
        strategy: words of the augmentation joined by underscores; "" for none.
        precision: ``float32``, ``bfloat16`` (the networks' passes), or ``auto``: bfloat16 on a GPU,
            and on a CPU that has instructions for it where the network goes by the fused blocks.
        device: as torch names it, or ``auto``: a GPU where there is one.
        networks_at_once: how many are trained at once, where they go by the fused blocks; None: as
            many as are of use. The accuracies do not depend on it, beyond rounding on a GPU.
        graph: whether epochs on a GPU are captured in a CUDA graph: one of
            :data:`dmfast.graphs.GRAPHS`.
        on_epoch: called with how many networks have been through another epoch, of
            ``networks * (epochs + 1)`` in all; see :meth:`Evaluator.__call__`.

    Raises:
        InputError: the model, strategy, precision, device or protocol is unknown or cannot be used,
            a number of networks is less than 1, or there is not a label for each of the images.
    """
    for name, number in (("networks", networks), ("networks_at_once", networks_at_once)):
        if number is not None and number < 1:
            raise InputError(f"{name} must be 1 or more, got {number}")
    if not 0 < len(images) == len(labels):
        raise InputError(f"{len(images)} images with {len(labels)} labels cannot be trained on")
    evaluator = Evaluator(
        data,
        model=model,
        epochs=epochs,
        seed=seed,
        strategy=strategy,
        precision=precision,
        device=device,
        protocol=protocol,
        networks_at_once=networks_at_once,
        graph=graph,
    )
    start = time.perf_counter()
    accuracies: list[float] = []
    while (first := len(accuracies)) < networks:
        now = min(networks - first, evaluator.networks_at_once(len(images)))
        accuracies += evaluator([(images, labels)] * now, first, on_epoch)
    return EvaluationResult(tuple(accuracies), time.perf_counter() - start)

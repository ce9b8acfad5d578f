# SPDX-License-Identifier: MIT
"""Training networks on a few images: one, or many of a kind at once.

Batches and augmentation are pure functions of the seed and the network's number.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .data import NormalisedImages
from .devices import autocast
from .graphs import Recorder
from .ops import Stream
from .runs import interrupts_deferred


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
    networks: int = 1,
    own_images: bool = False,
    strategy: str = "",
    precision: str = "float32",
    protocol: Protocol = PROTOCOLS["published"],
    recorder: Recorder | None = None,
    on_batch: Callable[[Tensor, Tensor], object] | None = None,
    on_epoch: Callable[[], object] | None = None,
) -> None:
    """Trains ``network`` in place, for epochs 0 to ``epochs``.

    Args:
        images: [N, C, H, W] float32, normalised, on the network's device. Batches keep the
            memory format.
        labels: [N] int64, or [N, K] float32: a probability for each class.
        index: the network's number: batches and augmentation follow from it and the seed.
        networks: R: ``network`` is networks ``index`` to ``index + R - 1`` at once
            (:class:`dmfast._stack.NetworkStack`).
        own_images: network r has images and labels ``r * N / R`` to ``(r + 1) * N / R - 1`` for
            itself; otherwise all of them train on all images, each in an order of its own.
        strategy: words of the augmentation joined by underscores; "" for none.
        precision: ``float32``, or ``bfloat16`` for the network's passes (weights stay float32).
        recorder: records an epoch and replays it; ``on_batch`` cannot go with it.
        on_batch: called with the rows of each batch and the logits it was given, before the update.
        on_epoch: called after each epoch.

    Raises:
        RuntimeError: the epoch cannot be recorded, or memory runs out.
    """
    network.train()
    # What a recorded epoch depends on are tensors.
    rate = torch.tensor(protocol.learning_rate, dtype=torch.float32, device=images.device)
    number = torch.zeros(1, dtype=torch.int64, device=images.device)
    optimizer = torch.optim.SGD(
        network.parameters(),
        rate,
        protocol.momentum,
        weight_decay=protocol.weight_decay,
        fused=True,
    )
    momenta = {weight: torch.zeros_like(weight) for weight in network.parameters()}
    for weight, momentum in momenta.items():
        optimizer.state[weight]["momentum_buffer"] = momentum

    def make() -> None:
        train_epoch(
            network,
            optimizer,
            images,
            labels,
            seed=seed,
            epoch=number,
            index=index,
            networks=networks,
            own_images=own_images,
            batch=protocol.batch,
            strategy=strategy,
            precision=precision,
            on_batch=on_batch,
        )
        number.add_(1)

    with recorder.active() if recorder else nullcontext():
        for epoch in range(epochs + 1):
            if recorder and epoch == recorder.warm_up:
                with interrupts_deferred():
                    make = recorder.record(make)
            make()
            if epoch == epochs // 2 + 1:
                rate.fill_(protocol.learning_rate * protocol.decay)
                for momentum in momenta.values():
                    momentum.zero_()
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
    networks: int = 1,
    own_images: bool = False,
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
        batch: images a step and network; the last step has the rest.
        networks, own_images, on_batch: see :func:`train`.
    """
    device, (height, width) = images.device, images.shape[-2:]
    count = len(images) // networks if own_images else len(images)
    numbers = torch.arange(networks * count, device=device)
    offsets = torch.arange(networks + 1, device=device) * count
    order = ops.draw_batch(
        numbers if own_images else numbers % count,
        offsets,
        offsets,
        networks * count,
        seed,
        epoch,
        first_class=index,
        stream=streams[0],
    )
    batches = torch.split(order.view(networks, count), batch, dim=1)
    for number, of_networks in enumerate(batches):
        rows = of_networks.flatten()
        x = images[rows]
        if strategy:
            params = ops.draw_augmentation(
                strategy,
                networks,
                (height, width),
                seed,
                epoch * len(batches) + number,
                rows=of_networks.shape[1],
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
        # The mean of each network's images.
        loss = F.cross_entropy(logits.float(), labels[rows], reduction="sum")
        (loss / of_networks.shape[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

# SPDX-License-Identifier: MIT
"""Gradient matching: the rivals of distribution matching, DC and DSA, as their published code does.

An iteration has a network of its own, and ``outer`` rounds. In each the synthetic images of every
class move so that the gradient of the network's loss on them points where that on real images of
the class does; then, but for the last, the network is trained for ``inner`` epochs on the
synthetic set. DSA augments both sides of a class alike, and the images in training; DC does not.

As in :mod:`dmfast.matching` everything random is a pure function of (seed, iteration, class).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .data import ImageData
from .devices import autocast, memory_format, repeatable
from .errors import InputError
from .matching import RealImages, descend_, placed
from .networks import ConvNet, Network, has_batch_norm, initialise_
from .ops import Stream
from .training import train_epoch

# Of the networks in between: what the published code fixes.
_LEARNING_RATE, _BATCH = 0.01, 256
_NORM_BATCH = 16  # real images a class, from which a batch norm's statistics are taken
_TINY = 1e-6


class Loops(NamedTuple):
    """Rounds of an iteration, and epochs of training after each but the last."""

    outer: int
    inner: int


#: The published ones, by images a class.
LOOPS = {
    1: Loops(1, 1),
    10: Loops(10, 50),
    20: Loops(20, 25),
    30: Loops(30, 20),
    40: Loops(40, 15),
    50: Loops(50, 10),
}


def gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """How far gradients of a network's parameters point apart, a scalar, 0 or more.

    The sum over the layers and their outputs of 1 - cosine, with 1e-6 added to the product of the
    norms (DC, equation 10). Convolutions' weights count a row a filter; parameters of one
    dimension, biases and scales, do not count.

    Args:
        real, synthetic: the gradient of every parameter, in the same order.
    """
    distance = real[0].new_zeros(())
    for r, s in zip(real, synthetic, strict=True):
        if r.dim() > 1:
            r, s = r.flatten(1), s.flatten(1)
            cosine = (r * s).sum(1) / (r.norm(dim=1) * s.norm(dim=1) + _TINY)
            distance = distance + (1 - cosine).sum()
    return distance


class GradientMatcher:
    """Synthetic images, and all that an iteration on them needs besides its number.

    It can take the place of a :class:`dmfast.matching.Matcher` in a :class:`dmfast.loop.Loop`.

    Attributes:
        images: [K * ipc, C, H, W] float32, normalised, class by class: what is learned.
        momentum_buffer: the running sum of gradients, in the shape of ``images``.
        streams: False: the real images lie on the device.
        classes_per_step: 1: the gradients of one class at a time are held.
    """

    streams = False
    classes_per_step = 1

    def __init__(
        self,
        data: ImageData,
        network: Network,
        images: Tensor,
        *,
        batch_real: int,
        strategy: str,
        seed: int,
        lr: float,
        momentum: float,
        loops: Loops,
        precision: str = "float32",
        device: torch.device,
    ) -> None:
        """Starts from ``images`` (copied) at rest.

        Args:
            network: a network for ``data``; its weights are drawn anew in every iteration.
            batch_real: real images a class; a class that has fewer gives all of its own.
            strategy: words of the augmentation joined by underscores, for DSA; "" for DC.
            precision: ``float32``, or ``bfloat16`` for the passes of real images and of training;
                what is differentiated twice stays float32.
        """
        self.images = images.to(device, copy=True, memory_format=memory_format(device))
        self.momentum_buffer = torch.zeros_like(self.images)
        self._network = placed(network, device)
        self._parameters = list(self._network.parameters())
        self._real = RealImages.of(data, data.train_images.to(device))
        order, class_offsets = data.by_class()
        self._sets = order.to(device), class_offsets.to(device)
        offsets, self._rows = data.batch_offsets(batch_real)
        norm_offsets, self._norm_rows = data.batch_offsets(_NORM_BATCH)
        self._bounds = offsets.tolist()  # known to the host, which slices by them
        self._offsets, self._norm_offsets = offsets.to(device), norm_offsets.to(device)
        self._classes, self._size = data.classes, data.size
        self._ipc = len(images) // data.classes
        self._labels = torch.arange(data.classes, device=device).repeat_interleave(self._ipc)
        self._strategy, self._seed, self._precision = strategy, seed, precision
        self._lr, self._momentum, self._loops = lr, momentum, loops

    @property
    def real_images_per_step(self) -> int:
        """How many real images an iteration forwards."""
        return self._rows * self._loops.outer

    def halve(self) -> bool:
        """False: there is no smaller step."""
        return False

    def load(self, step: int) -> None:
        """Nothing: the real images are there."""

    def close(self) -> None:
        """Nothing: no thread gathers batches."""

    def gradient(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """Makes iteration ``step`` on a copy of the images.

        Args:
            step: from 0; an int, or an int64 tensor of one element on the device.

        Returns:
            The loss, a float32 scalar: the mean over the rounds of the sum over the classes of
            :func:`gradient_distance`; and what :meth:`update` takes: the images and the momentum
            after the iteration, [2, K * ipc, C, H, W].
        """
        with repeatable():
            initialise_(self._network, self._seed, step)
            self._network.train().requires_grad_()
            optimizer = torch.optim.SGD(self._parameters, _LEARNING_RATE)
            images, momentum_buffer = self.images.clone(), self.momentum_buffer.clone()
            losses = []
            for number in range(self._loops.outer):
                round_ = step * self._loops.outer + number
                loss, gradient = self._round(images, round_)
                descend_(images, momentum_buffer, gradient, self._lr, self._momentum)
                losses.append(loss)
                if number < self._loops.outer - 1:
                    self._train(optimizer, images, round_)
            return torch.stack(losses).mean(), torch.stack([images, momentum_buffer])

    def update(self, change: Tensor) -> None:
        """Installs what :meth:`gradient` came to."""
        self.images.copy_(change[0])
        self.momentum_buffer.copy_(change[1])

    def step(self, step: int | Tensor) -> Tensor:
        """Makes iteration ``step`` and gives its loss, a float32 scalar on the device."""
        loss, change = self.gradient(step)
        self.update(change)
        return loss

    def _round(self, images: Tensor, round_: int | Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the classes' distances, and its gradient with respect to the images."""
        params = ops.draw_augmentation(
            self._strategy,
            self._classes,
            self._size,
            self._seed,
            round_,
            stream=Stream.AUGMENTATION,
            device=images.device,
        )
        self._freeze_batch_norm(round_)
        real = self._gather(self._offsets, self._rows, Stream.REAL_BATCH, round_, params)
        gradient, loss = torch.empty_like(images), images.new_zeros(())
        for k, (start, end) in enumerate(itertools.pairwise(self._bounds)):
            with autocast(images.device, self._precision):
                of_real = self._gradients(real[start:end], k)
            rows = slice(k * self._ipc, (k + 1) * self._ipc)
            synthetic = images[rows].detach().requires_grad_()
            with _twice_differentiable(self._network):
                augmented = ops.siamese_augment(synthetic, params[k : k + 1])
                of_synthetic = self._gradients(augmented, k, create_graph=True)
                distance = gradient_distance(of_real, of_synthetic)
                (gradient[rows],) = torch.autograd.grad(distance, synthetic)
            loss += distance.detach()
        return loss, gradient

    def _gradients(self, images: Tensor, label: int, create_graph: bool = False) -> list[Tensor]:
        """Those of the cross entropy of images of one class, of every parameter."""
        logits = self._network(images).float()
        loss = F.cross_entropy(logits, self._labels.new_full((len(images),), label))
        return list(torch.autograd.grad(loss, self._parameters, create_graph=create_graph))

    def _gather(
        self,
        offsets: Tensor,
        rows: int,
        stream: Stream,
        round_: int | Tensor,
        params: Tensor,
    ) -> Tensor:
        index = ops.draw_batch(*self._sets, offsets, rows, self._seed, round_, stream=stream)
        real = self._real
        images = ops.gather_augment(
            real.images, index, params, real.mean, real.std, torch.float32, offsets
        )
        return images.clone(memory_format=memory_format(images.device))

    @torch.no_grad()
    def _freeze_batch_norm(self, round_: int | Tensor) -> None:
        """Has batch norms use their running statistics, after one more batch of real images."""
        if not has_batch_norm(self._network):
            return
        none = ops.draw_augmentation(
            "",
            self._classes,
            self._size,
            self._seed,
            round_,
            stream=Stream.AUGMENTATION,
            device=self.images.device,
        )
        batch = self._gather(self._norm_offsets, self._norm_rows, Stream.NORM_BATCH, round_, none)
        self._network.train()
        with autocast(batch.device, self._precision):
            self._network(batch)
        for module in self._network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def _train(
        self, optimizer: torch.optim.Optimizer, images: Tensor, round_: int | Tensor
    ) -> None:
        self._network.train()
        for epoch in range(self._loops.inner):
            train_epoch(
                self._network,
                optimizer,
                images,
                self._labels,
                seed=self._seed,
                epoch=round_ * self._loops.inner + epoch,
                batch=_BATCH,
                strategy=self._strategy,
                precision=self._precision,
                streams=(Stream.TRAINING_BATCH, Stream.TRAINING_AUGMENTATION),
            )


@contextmanager
def _twice_differentiable(network: nn.Module) -> Iterator[None]:
    """Within it the network goes by torch's own layers: the fused blocks have one derivative."""
    fused = [module for module in network.modules() if isinstance(module, ConvNet) and module.fused]
    for module in fused:
        module.fused = False
    try:
        yield
    finally:
        for module in fused:
            module.fused = True


def loops_of(ipc: int, outer: int | None, inner: int | None) -> Loops:
    """The published loops for ``ipc`` images a class, with those given in their place.

    Raises:
        InputError: a number that is not published for ``ipc`` is not given.
    """
    if outer is not None and inner is not None:
        return Loops(outer, inner)
    if ipc not in LOOPS:
        published = ", ".join(map(str, LOOPS))
        raise InputError(
            f"--ipc {ipc}: gradient matching has published loops for {published} images a class; "
            "give --outer-loops and --inner-loops"
        )
    published_outer, published_inner = LOOPS[ipc]
    return Loops(
        published_outer if outer is None else outer, published_inner if inner is None else inner
    )

# SPDX-License-Identifier: MIT
"""What gradient matching is timed against: the published way, and a tidied one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dmfast import _baselines as baselines
from dmfast._baselines import CPU
from dmfast.data import ImageData
from dmfast.devices import autocast
from dmfast.gradient_matching import GradientMatcher, Loops
from dmfast.networks import Network


def _distance(real: list[Tensor], synthetic: list[Tensor]) -> Tensor:
    """1 - cosine, summed over the rows of every layer; of one dimension, none."""
    distance = torch.tensor(0.0)
    for r, s in zip(real, synthetic, strict=True):
        if r.dim() == 1:
            continue
        if r.dim() == 4:
            r, s = r.reshape(r.shape[0], -1), s.reshape(s.shape[0], -1)
        product = torch.sum(r * s, dim=-1)
        norms = torch.norm(r, dim=-1) * torch.norm(s, dim=-1)
        distance = distance + torch.sum(1 - product / (norms + 1e-6))
    return distance


class PublishedGradientMatching:
    """Iterations of DSA, instance norm's branch, as published: class by class, in float32."""

    def __init__(
        self,
        data: ImageData,
        model: str,
        images: Tensor,
        *,
        batch_real: int,
        strategy: str,
        loops: Loops,
    ) -> None:
        """Starts from ``images`` [K * ipc, C, H, W] (copied), normalised, class by class."""
        self._data, self._model, self._batch, self._loops = data, model, batch_real, loops
        self._real = data.normalise(data.train_images)
        labels = data.train_labels.numpy()
        self._rows = [np.flatnonzero(labels == k) for k in range(data.classes)]
        self.images = images.clone().requires_grad_()
        self._ipc = len(images) // data.classes
        self._labels = torch.arange(data.classes).repeat_interleave(self._ipc)
        self._augment = baselines.PublishedAugment(strategy)
        self._optimizer = torch.optim.SGD([self.images], lr=0.1, momentum=0.5)

    def step(self) -> Tensor:
        """Draws a network, makes the rounds, and gives the mean loss of one."""
        network = baselines.torch_network(self._model, self._data).train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        total = 0.0
        for number in range(self._loops.outer):
            batches = [np.random.permutation(rows)[: self._batch] for rows in self._rows]
            seeds = [int(time.time() * 1000) % 100_000 for _ in batches]
            loss = self.loss(network, batches, seeds)
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()
            total += loss.item()
            if number < self._loops.outer - 1:
                self._train(network, optimizer)
        return torch.tensor(total / self._loops.outer)

    def loss(
        self, network: Network, batches: list[np.ndarray], seeds: list[int] | None = None
    ) -> Tensor:
        """The distance for these draws: of each class the rows of its real images, and a seed."""
        loss = torch.tensor(0.0)
        parameters = list(network.parameters())
        for k, rows in enumerate(batches):
            real = self._real[rows]
            synthetic = self.images[k * self._ipc : (k + 1) * self._ipc]
            if seeds:
                real = self._augment(real, seeds[k])
                synthetic = self._augment(synthetic, seeds[k])
            of_real = torch.autograd.grad(self._loss(network, real, k), parameters)
            of_synthetic = torch.autograd.grad(
                self._loss(network, synthetic, k), parameters, create_graph=True
            )
            kept = [gradient.detach().clone() for gradient in of_real]
            loss = loss + _distance(kept, list(of_synthetic))
        return loss

    @staticmethod
    def _loss(network: Network, images: Tensor, label: int) -> Tensor:
        return F.cross_entropy(network(images), torch.full((len(images),), label))

    def _train(self, network: Network, optimizer: torch.optim.Optimizer) -> None:
        loader = DataLoader(
            TensorDataset(self.images.detach().clone(), self._labels), 256, shuffle=True
        )
        for _ in range(self._loops.inner):
            for images, labels in loader:
                loss = F.cross_entropy(network(self._augment(images)), labels)
                loss.item()  # as published, read after each batch
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()


class TidiedGradientMatching(GradientMatcher):
    """Iterations in torch's layers, with the draws and the augmentation of dmfast.

    The real images' pass is compiled, in the fastest layout, under autocast; what is differentiated
    twice cannot be compiled.

    Attributes:
        form: how the real images' pass runs (:func:`dmfast._baselines.fastest`).
    """

    def __init__(
        self,
        data: ImageData,
        model: str,
        images: Tensor,
        *,
        precision: str,
        compiled: bool = True,
        **options: Any,
    ) -> None:
        """See :class:`dmfast.gradient_matching.GradientMatcher`."""
        network = baselines.torch_network(model, data, seed=0)
        super().__init__(data, network, images, precision=precision, device=CPU, **options)

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            with autocast(CPU, precision):
                logits = network(x)
            return F.cross_entropy(logits.float(), labels)

        rows = options["batch_real"]
        batch = data.normalise(data.train_images[:rows]), data.train_labels[:rows]
        network.requires_grad_()

        def use(form: Callable[..., Tensor]) -> None:
            torch.autograd.grad(form(*batch), list(network.parameters()))

        self.form, self._loss = baselines.fastest(loss, use, compiled)

    def _gradients(self, images: Tensor, label: int, create_graph: bool = False) -> list[Tensor]:
        if create_graph:
            return super()._gradients(images, label, create_graph)
        labels = self._labels.new_full((len(images),), label)
        return list(torch.autograd.grad(self._loss(images, labels), self._parameters))

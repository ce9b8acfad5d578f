# SPDX-License-Identifier: MIT
"""What is profiled: iterations and training steps of dmfast, and of the baselines beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from . import roofline
from ._baselines import PublishedIteration, PublishedTraining, TidiedIteration, TidiedTraining
from ._timing import EAGER, OURS, PUBLISHED, TIDIED, Run
from .data import ImageData
from .graphs import recorder_of
from .loop import Loop
from .matching import Matcher, initial_images
from .networks import ConvNet, get_network
from .training import train

_TRAINING_BATCH = 256


@dataclass(frozen=True)
class Job:
    """What is measured, and by what options.

    Attributes:
        strategy: words of the augmentation joined by underscores; "" for none.
        lr: the learning rate of the images.
        graph: whether dmfast's iteration is captured: one of :data:`dmfast.graphs.GRAPHS`.
        baselines: whether there are other contenders than dmfast.
        note: told, in a sentence, where no CUDA graph or less memory is gone on with.
    """

    data: ImageData
    device: torch.device
    precision: str
    model: str
    ipc: int
    batch_real: int
    strategy: str
    lr: float
    seed: int
    graph: str
    baselines: bool
    note: Callable[[str], object]

    def network(self) -> Any:
        data = self.data
        return get_network(self.model, data.channels, data.classes, data.size, self.seed)

    @cached_property
    def images(self) -> Tensor:
        return initial_images(self.data, self.ipc, "real", self.seed)

    @cached_property
    def training_set(self) -> tuple[Tensor, Tensor]:
        """The synthetic images and their labels, of these at most a batch, from every class."""
        labels = torch.arange(self.data.classes).repeat_interleave(self.ipc)
        chosen = torch.linspace(0, len(labels) - 1, min(len(labels), _TRAINING_BATCH)).long()
        return self.images[chosen], labels[chosen]

    def matcher(self) -> Matcher:
        return Matcher(
            self.data,
            self.network(),
            self.images,
            batch_real=self.batch_real,
            strategy=self.strategy,
            seed=self.seed,
            lr=self.lr,
            momentum=0.5,
            precision=self.precision,
            device=self.device,
        )

    def setting(self) -> roofline.Setting | None:
        """What the roofline counts by; None where it does not know the network."""
        network = self.network()
        if not isinstance(network, ConvNet) or not network.plain:
            return None
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        return roofline.Setting(
            self.data.channels,
            self.data.size,
            self.data.classes,
            self.ipc,
            self.batch_real,
            len(convolutions),
            convolutions[0].out_channels,
            self.data.batch_offsets(self.batch_real)[1],
        )

    def loop(self, graph: str) -> Loop:
        return Loop(
            self.matcher(),
            recorder=recorder_of(graph, self.device),
            required=graph == "required",
            note=self.note,
        )

    def condensing(
        self, stack: ExitStack, loops: list[Loop], forms: dict[str, Any]
    ) -> dict[str, Callable[[], Run]]:
        """What makes each contender.

        Args:
            stack: what the loops are entered into.
            loops: is given those that are made, that of dmfast first.
            forms: is told what the tidied one chose.
        """

        def advancing(graph: str) -> Run:
            loop = stack.enter_context(self.loop(graph))
            loops.append(loop)

            def run() -> Tensor | None:
                loop.advance()
                return torch.tensor(loop.read()().losses[0]) if loop.iteration == 1 else None

            return run

        options: dict[str, Any] = {"batch_real": self.batch_real, "strategy": self.strategy}

        def published() -> Run:
            return PublishedIteration(
                self.data, self.model, self.images, **options, device=self.device
            ).step

        def tidied() -> Run:
            iteration = TidiedIteration(
                *(self.data, self.model, self.images),
                **options,
                seed=self.seed,
                precision=self.precision,
                device=self.device,
            )
            forms.update(iteration.forms)
            steps = itertools.count()
            return lambda: iteration.step(next(steps))

        contenders = self._with_baselines(partial(advancing, self.graph), published, tidied)
        if self.baselines and self.device.type == "cuda" and self.graph != "off":
            contenders[EAGER] = partial(advancing, "off")
        return contenders

    def training(self, forms: dict[str, Any], steps: int) -> dict[str, Callable[[], Run]]:
        images, labels = (tensor.to(self.device) for tensor in self.training_set)

        def ours() -> Run:
            network = self.network().to(self.device)
            return partial(
                train,
                *(network, images, labels),
                epochs=steps - 1,
                seed=self.seed,
                strategy=self.strategy,
                precision=self.precision,
            )

        def repeated(epoch: Callable[[], None]) -> Run:
            def run() -> None:
                for _ in range(steps):
                    epoch()

            return run

        def published() -> Run:
            return repeated(
                PublishedTraining(self.data, self.model, images, labels, self.strategy).epoch
            )

        def tidied() -> Run:
            training = TidiedTraining(
                *(self.data, self.model, images, labels, self.strategy), precision=self.precision
            )
            forms["training"] = training.form
            return repeated(training.epoch)

        return self._with_baselines(ours, published, tidied)

    def _with_baselines(
        self, ours: Callable[[], Run], published: Callable[[], Run], tidied: Callable[[], Run]
    ) -> dict[str, Callable[[], Run]]:
        baselines = {PUBLISHED: published, TIDIED: tidied} if self.baselines else {}
        return {OURS: ours, **baselines}

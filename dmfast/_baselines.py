# SPDX-License-Identifier: MIT
"""What dmfast is compared with: its iteration and its training step in plain torch, twice.

*Published*: the algorithm as the paper's published code runs it, rewritten. One class after the
other in float32, one augmentation of the real batch and one, from the same seed, of the synthetic
images, sampling grids of whole batches from Python lists, index grids, a new network each time.

*Tidied*: the same mathematics by a careful engineer. All classes at once in passes of at most 256
images (4,096 on a GPU), each transform on what it changes, buffers made once, autocast for
bfloat16, cuDNN's fastest algorithms, and for each pass the fastest of torch's layouts with and
without ``torch.compile``, measured when it is made. What is drawn for the augmentation stays on the
host, so that nothing waits for a GPU to choose by it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from . import ops
from .augment import IDENTITY, STRENGTH, Column
from .data import ImageData
from .devices import autocast, synchronise
from .networks import ConvNet, Network, get_network, has_batch_norm, initialise_
from .ops import Stream
from .training import PROTOCOLS

CPU = torch.device("cpu")
Theta = list[list[list[Tensor | int]]]
_PROTOCOL = PROTOCOLS["published"]
_IMAGES_PER_PASS = {"cpu": 256, "cuda": 4096}


def torch_network(model: str, data: ImageData, seed: int | None = None) -> Network:
    """The network of that name in torch's own layers."""
    network = get_network(model, data.channels, data.classes, data.size, seed)
    for module in network.modules():
        if isinstance(module, ConvNet):
            module.fused = False
    return network


# ---- published ---------------------------------------------------------------------------------


class PublishedAugment:
    """Differentiable Siamese augmentation, mode S: one of the strategy's transforms a call."""

    def __init__(self, strategy: str) -> None:
        transforms = {
            "color": (self._brightness, self._saturation, self._contrast),
            "crop": (self._crop,),
            "cutout": (self._cutout,),
            "flip": (self._flip,),
            "scale": (self._scale,),
            "rotate": (self._rotate,),
        }
        self._transforms = [transforms[word] for word in strategy.split("_") if word]
        self._seed = -1

    def __call__(self, x: Tensor, seed: int = -1) -> Tensor:
        """Augments [N, C, H, W]: parameters for each image, or, given a seed, for the batch."""
        self._seed = seed
        if not self._transforms:
            return x
        self._reseed()
        choice = int(torch.randint(0, len(self._transforms), size=(1,)).item())
        for transform in self._transforms[choice]:
            x = transform(x)
        return x.contiguous()

    def _reseed(self) -> None:
        if self._seed != -1:
            torch.random.manual_seed(self._seed)
            self._seed += 1

    def _drawn(self, draw: Callable[[], Tensor]) -> Tensor:
        """A draw for each image, of which all take the first's where they share a seed."""
        shared = self._seed != -1
        self._reseed()
        values = draw()
        if shared:
            values[:] = values[0].clone()
        return values

    def _uniform(self, x: Tensor) -> Tensor:
        return self._drawn(lambda: torch.rand(len(x), 1, 1, 1, device=x.device))

    def _integers(self, x: Tensor, low: int, end: int) -> Tensor:
        return self._drawn(lambda: torch.randint(low, end, size=[len(x), 1, 1], device=x.device))

    def _brightness(self, x: Tensor) -> Tensor:
        u = self._uniform(x)
        return x + (u - 0.5) * STRENGTH["brightness"]

    def _saturation(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=1, keepdim=True)
        u = self._uniform(x)
        return (x - mean) * (u * STRENGTH["saturation"]) + mean

    def _contrast(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=[1, 2, 3], keepdim=True)
        u = self._uniform(x)
        return (x - mean) * (u + STRENGTH["contrast"]) + mean

    def _crop(self, x: Tensor) -> Tensor:
        images, _, height, width = x.shape
        reach_y, reach_x = (int(s * STRENGTH["ratio_crop_pad"] + 0.5) for s in (height, width))
        dy = self._integers(x, -reach_y, reach_y + 1)
        dx = self._integers(x, -reach_x, reach_x + 1)
        image, row, column = _grids(x, images, height, width)
        row = torch.clamp(row + dy + 1, 0, height + 1)
        column = torch.clamp(column + dx + 1, 0, width + 1)
        padded = F.pad(x, [1, 1, 1, 1, 0, 0, 0, 0]).permute(0, 2, 3, 1).contiguous()
        return padded[image, row, column].permute(0, 3, 1, 2)

    def _cutout(self, x: Tensor) -> Tensor:
        images, _, height, width = x.shape
        tall, wide = (int(side * STRENGTH["ratio_cutout"] + 0.5) for side in (height, width))
        y = self._integers(x, 0, height + (1 - tall % 2))
        left = self._integers(x, 0, width + (1 - wide % 2))
        image, row, column = _grids(x, images, tall, wide)
        row = torch.clamp(row + y - tall // 2, min=0, max=height - 1)
        column = torch.clamp(column + left - wide // 2, min=0, max=width - 1)
        mask = torch.ones(images, height, width, dtype=x.dtype, device=x.device)
        mask[image, row, column] = 0
        return x * mask.unsqueeze(1)

    def _flip(self, x: Tensor) -> Tensor:
        u = self._uniform(x)
        return torch.where(u < STRENGTH["prob_flip"], x.flip(3), x)

    def _scale(self, x: Tensor) -> Tensor:
        ratio = STRENGTH["ratio_scale"]
        low = 1.0 / ratio
        sx = self._drawn(lambda: torch.rand(len(x)) * (ratio - low) + low)
        sy = self._drawn(lambda: torch.rand(len(x)) * (ratio - low) + low)
        rows: Theta = [[[sx[i], 0, 0], [0, sy[i], 0]] for i in range(len(x))]
        return self._sample(x, rows)

    def _rotate(self, x: Tensor) -> Tensor:
        ratio = STRENGTH["ratio_rotate"]
        angle = self._drawn(lambda: (torch.rand(len(x)) - 0.5) * 2 * ratio / 180 * math.pi)
        rows: Theta = [
            [[torch.cos(a), torch.sin(-a), 0], [torch.sin(a), torch.cos(a), 0]] for a in angle
        ]
        return self._sample(x, rows)

    @staticmethod
    def _sample(x: Tensor, theta: Theta) -> Tensor:
        matrices = torch.tensor(theta, dtype=torch.float)
        grid = F.affine_grid(matrices, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid.to(x.device), align_corners=False)


def _grids(x: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(torch.arange(n, device=x.device) for n in sizes), indexing="ij")


class PublishedIteration:
    """Iterations of distribution matching as published: class by class, or with batch norm all."""

    def __init__(
        self,
        data: ImageData,
        model: str,
        images: Tensor,
        *,
        batch_real: int,
        strategy: str,
        device: torch.device = CPU,
    ) -> None:
        """Starts from ``images`` [K * ipc, C, H, W] (copied), normalised, class by class."""
        self._data, self._model, self._batch = data, model, batch_real
        self._device = device
        self._real = data.normalise(data.train_images).to(device)
        labels = data.train_labels.numpy()
        self._rows = [np.flatnonzero(labels == k) for k in range(data.classes)]
        self.images = images.to(device, copy=True).requires_grad_()
        self._ipc = len(images) // data.classes
        self._augment = PublishedAugment(strategy)
        self._optimizer = torch.optim.SGD([self.images], lr=1.0, momentum=0.5)

    def step(self) -> Tensor:
        """Draws a network and batches, makes an update, and gives the loss."""
        data = self._data
        network = torch_network(self._model, data).to(self._device)
        network.train().requires_grad_(False)
        batches = [np.random.permutation(rows)[: self._batch] for rows in self._rows]
        seeds = [int(time.time() * 1000) % 100_000 for _ in batches]
        loss = self.loss(network, batches, seeds)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        return torch.tensor(loss.item())  # as published, read in every iteration

    def loss(
        self, network: Network, batches: list[np.ndarray], seeds: list[int] | None = None
    ) -> Tensor:
        """The loss for these draws: of each class the rows of its real images, and a seed."""
        loss = torch.tensor(0.0).to(self._device)
        shape = (self._ipc, *self.images.shape[1:])
        whole = has_batch_norm(network)
        all_real, all_synthetic = [], []
        for k, rows in enumerate(batches):
            real = self._real[rows]
            synthetic = self.images[k * self._ipc : (k + 1) * self._ipc].reshape(shape)
            if seeds:
                real = self._augment(real, seeds[k])
                synthetic = self._augment(synthetic, seeds[k])
            if whole:
                all_real.append(real)
                all_synthetic.append(synthetic)
                continue
            of_real = network.embed(real).detach()
            of_synthetic = network.embed(synthetic)
            loss = loss + torch.sum((of_real.mean(dim=0) - of_synthetic.mean(dim=0)) ** 2)
        if whole:
            real = network.embed(torch.cat(all_real)).detach()
            synthetic = network.embed(torch.cat(all_synthetic))
            real, synthetic = (
                rows.reshape(len(batches), -1, rows.shape[1]) for rows in (real, synthetic)
            )
            loss = loss + torch.sum((real.mean(dim=1) - synthetic.mean(dim=1)) ** 2)
        return loss


class PublishedTraining:
    """Steps of training a network on a few images, as published."""

    def __init__(
        self, data: ImageData, model: str, images: Tensor, labels: Tensor, strategy: str
    ) -> None:
        """Trains on ``images`` [N, C, H, W], on their device."""
        self._loader = DataLoader(
            TensorDataset(images, labels), _PROTOCOL.batch, shuffle=True, num_workers=0
        )
        self._network = torch_network(model, data).to(images.device).train()
        self._augment = PublishedAugment(strategy)
        self._optimizer = torch.optim.SGD(
            self._network.parameters(),
            _PROTOCOL.learning_rate,
            _PROTOCOL.momentum,
            weight_decay=_PROTOCOL.weight_decay,
        )

    def epoch(self) -> None:
        """A step for each batch; loss and accuracy are read after each, as published."""
        total = correct = 0.0
        for images, labels in self._loader:
            logits = self._network(self._augment(images))
            loss = F.cross_entropy(logits, labels)
            total += loss.item() * len(labels)
            predicted = np.argmax(logits.cpu().data.numpy(), axis=-1)
            correct += np.sum(np.equal(predicted, labels.cpu().data.numpy()))
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()


# ---- tidied ------------------------------------------------------------------------------------


def tidied_augment(x: Tensor, params: Tensor, there: Tensor) -> Tensor:
    """Applies one row [1, 13] to all images, or a row to each [N, 13]: :func:`siamese_augment`.

    Only transforms that some row selects are applied; a shared affine grid is expanded, not copied.

    Args:
        params: on the CPU.
        there: the same on the device of ``x``.
    """
    images, _, height, width = x.shape
    selected = (params != torch.tensor(IDENTITY)).any(0).tolist()

    def column(index: Column) -> Tensor:
        return there[:, index].view(-1, 1, 1, 1)

    if selected[Column.BRIGHTNESS]:
        x = x + column(Column.BRIGHTNESS)
    if selected[Column.SATURATION]:
        x = torch.lerp(x.mean(1, keepdim=True), x, column(Column.SATURATION))
    if selected[Column.CONTRAST]:
        x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, column(Column.CONTRAST))
    if selected[Column.CROP_Y] or selected[Column.CROP_X]:
        reach = int(params[:, Column.CROP_Y : Column.CROP_X + 1].abs().max())
        windows = F.pad(x, (reach,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        shifts = Column.CROP_Y, Column.CROP_X
        if len(params) == 1:
            dy, dx = (int(params[0, i]) + reach for i in shifts)
            x = windows[:, :, dy, dx]
        else:
            rows, columns = (there[:, i].long() + reach for i in shifts)
            x = windows[torch.arange(images, device=x.device), :, rows, columns]
    if selected[Column.CUT_HEIGHT]:
        y, across = (torch.arange(side, device=x.device) for side in (height, width))
        y = y.view(-1, 1)
        top, left = column(Column.CUT_TOP), column(Column.CUT_LEFT)
        inside = (y >= top) & (y < top + column(Column.CUT_HEIGHT))
        inside = inside & (across >= left) & (across < left + column(Column.CUT_WIDTH))
        x = x.masked_fill(inside, 0)
    if selected[Column.FLIP]:
        mirrored = x.flip(3)
        x = mirrored if len(params) == 1 else torch.where(column(Column.FLIP) != 0, mirrored, x)
    if selected[Column.SCALE_X] or selected[Column.SCALE_Y]:
        zero = torch.zeros_like(there[:, 0])
        sx, sy = there[:, Column.SCALE_X], there[:, Column.SCALE_Y]
        x = _tidied_sample(x, torch.stack([sx, zero, zero, zero, sy, zero], 1))
    if selected[Column.ANGLE]:
        zero = torch.zeros_like(there[:, 0])
        cos, sin = there[:, Column.ANGLE].cos(), there[:, Column.ANGLE].sin()
        x = _tidied_sample(x, torch.stack([cos, -sin, zero, sin, cos, zero], 1))
    return x


def _tidied_sample(x: Tensor, theta: Tensor) -> Tensor:
    groups = len(theta)
    grid = F.affine_grid(theta.view(-1, 2, 3), [groups, *x.shape[1:]], align_corners=False)
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=False)


@contextmanager
def _tuned() -> Iterator[None]:
    """Within it cuDNN takes the algorithms that it has measured to be the fastest."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


@_tuned()
def fastest(
    function: Callable[..., Tensor],
    use: Callable[[Callable[..., Tensor]], object],
    compiled: bool,
    device: torch.device = CPU,
) -> tuple[str, Callable[..., Tensor]]:
    """The name of the fastest form of ``function``, whose first argument is a batch, and the form.

    A form that ``torch.compile`` cannot make here, for want of a compiler perhaps, is left out, and
    the name says why.

    Args:
        use: what is timed: the best of three of each form, by turns, after one for warming up and
            compiling.
        compiled: False leaves ``torch.compile`` out.
    """
    forms: dict[str, Callable[..., Tensor]] = {}
    for name, layout in (("first", torch.contiguous_format), ("last", torch.channels_last)):

        def form(x: Tensor, *rest: Tensor, layout: torch.memory_format = layout) -> Tensor:
            return function(x.contiguous(memory_format=layout), *rest)

        forms[f"eager, channels {name}"] = form
        if compiled:
            forms[f"compiled, channels {name}"] = torch.compile(form, dynamic=False)

    failure = ""
    for name, form in list(forms.items()):
        try:
            use(form)
        except Exception as error:
            if not name.startswith("compiled"):
                raise
            del forms[name]
            words = str(error).strip().partition("\n")[0]
            failure = f" (torch.compile failed: {type(error).__name__}: {words})"
    best = dict.fromkeys(forms, math.inf)
    for _ in range(3):
        for name, form in forms.items():
            synchronise(device)
            start = time.perf_counter()
            use(form)
            synchronise(device)
            best[name] = min(best[name], time.perf_counter() - start)
    name = min(best, key=best.__getitem__)
    return name + failure, forms[name]


class TidiedIteration:
    """Iterations of distribution matching with the draws of :class:`dmfast.matching.Matcher`.

    So that the losses can be compared; the draws take microseconds.

    Attributes:
        forms: how the passes of the real and of the synthetic images run (:func:`fastest`).
    """

    def __init__(
        self,
        data: ImageData,
        model: str,
        images: Tensor,
        *,
        batch_real: int,
        strategy: str,
        seed: int,
        precision: str = "float32",
        compiled: bool = True,
        device: torch.device = CPU,
    ) -> None:
        """Starts from ``images`` [K * ipc, C, H, W] (copied), normalised, class by class.

        Each class must have ``batch_real`` real images.
        """
        self._device = device
        self._network = torch_network(model, data, seed).to(device)
        self._network.train().requires_grad_(False)
        self._real = data.normalise(data.train_images).to(device)
        offsets, _ = data.batch_offsets(batch_real)
        self._order, self._class_offsets, self._offsets = (
            tensor.to(device) for tensor in (*data.by_class(), offsets)
        )
        self._classes, self._size = data.classes, data.size
        self._batch, self._ipc = batch_real, len(images) // data.classes
        self._strategy, self._seed = strategy, seed
        images = images.to(device)
        self.images = images.clone().requires_grad_()
        self._gradient = self.images.grad = torch.empty_like(images)
        self._optimizer = torch.optim.SGD([self.images], lr=1.0, momentum=0.5)

        # Kept from iteration to iteration: the real images of a pass, and all class means.
        self._pass = images.new_empty(
            next(self._passes(batch_real)).stop * batch_real, *images[0].shape
        )
        self._means = images.new_empty(data.classes, self._network.embedding_size)

        def embed(x: Tensor) -> Tensor:
            with autocast(device, precision):
                return self._network.embed(x).float()

        def without_gradient(form: Callable[..., Tensor]) -> Tensor:
            with torch.no_grad():
                return form(self._real[: len(self._pass)])

        first = images[: next(self._passes(self._ipc)).stop * self._ipc].clone().requires_grad_()

        def with_gradient(form: Callable[..., Tensor]) -> object:
            return torch.autograd.grad(form(first).sum(), first)

        real, self._embed_real = fastest(embed, without_gradient, compiled, device)
        synthetic, self._embed_synthetic = fastest(embed, with_gradient, compiled, device)
        self.forms = {"real": real, "synthetic": synthetic}

    def _passes(self, images: int) -> Iterator[slice]:
        """The classes in groups of at most so many images a pass; with batch norm all at once."""
        if has_batch_norm(self._network):
            yield slice(0, self._classes)
            return
        step = max(1, _IMAGES_PER_PASS[self._device.type] // images)
        for first in range(0, self._classes, step):
            yield slice(first, min(first + step, self._classes))

    @_tuned()
    def step(self, step: int) -> Tensor:
        """Makes iteration ``step`` and gives its loss."""
        initialise_(self._network, self._seed, step)
        index = ops.draw_batch(
            self._order,
            self._class_offsets,
            self._offsets,
            self._classes * self._batch,
            self._seed,
            step,
            stream=Stream.REAL_BATCH,
        )
        params = ops.draw_augmentation(
            self._strategy,
            self._classes,
            self._size,
            self._seed,
            step,
            stream=Stream.AUGMENTATION,
        )
        there = params.to(self._device, non_blocking=True)
        with torch.no_grad():
            for classes in self._passes(self._batch):
                rows = index[classes.start * self._batch : classes.stop * self._batch]
                real = torch.index_select(self._real, 0, rows, out=self._pass[: len(rows)])
                embedded = self._embed_real(self._augmented(real, params[classes], there[classes]))
                torch.mean(self._by_class(embedded, self._batch), 1, out=self._means[classes])
        loss = self.images.new_zeros(())
        for classes in self._passes(self._ipc):
            of_classes = slice(classes.start * self._ipc, classes.stop * self._ipc)
            images = self.images[of_classes].detach().requires_grad_()
            embedded = self._embed_synthetic(
                self._augmented(images, params[classes], there[classes])
            )
            means = self._by_class(embedded, self._ipc).mean(1)
            term = (self._means[classes] - means).square().sum()
            self._gradient[of_classes] = torch.autograd.grad(term, images)[0]
            loss += term.detach()
        self._optimizer.step()
        return loss

    @staticmethod
    def _by_class(rows: Tensor, images: int) -> Tensor:
        return rows.view(-1, images, rows.shape[1])

    @staticmethod
    def _augmented(x: Tensor, params: Tensor, there: Tensor) -> Tensor:
        rows = torch.split(params, 1), torch.split(there, 1)
        groups = zip(x.chunk(len(params)), *rows, strict=True)
        return torch.cat([tidied_augment(*group) for group in groups])


class TidiedTraining:
    """Steps of training a network on a few images.

    Attributes:
        form: how the network's pass runs (:func:`fastest`).
    """

    def __init__(
        self,
        data: ImageData,
        model: str,
        images: Tensor,
        labels: Tensor,
        strategy: str,
        *,
        precision: str = "float32",
        compiled: bool = True,
    ) -> None:
        """Trains on ``images`` [N, C, H, W], on their device."""
        self._images, self._labels, self._strategy = images, labels, strategy
        self._network = torch_network(model, data, seed=0).to(images.device).train()
        self._optimizer = torch.optim.SGD(
            self._network.parameters(),
            _PROTOCOL.learning_rate,
            _PROTOCOL.momentum,
            weight_decay=_PROTOCOL.weight_decay,
            fused=True,
        )
        self._batch = 0

        def loss(x: Tensor, labels: Tensor) -> Tensor:
            with autocast(images.device, precision):
                logits = self._network(x)
            return F.cross_entropy(logits.float(), labels)

        def use(form: Callable[..., Tensor]) -> None:
            torch.autograd.backward(form(images[: _PROTOCOL.batch], labels[: _PROTOCOL.batch]))

        self.form, self._loss = fastest(loss, use, compiled, images.device)

    @_tuned()
    def epoch(self) -> None:
        """A step for each batch."""
        device, (height, width) = self._images.device, self._images.shape[2:]
        order = torch.randperm(len(self._images), device=device)
        for rows in torch.split(order, _PROTOCOL.batch):
            params = ops.draw_augmentation(
                self._strategy,
                1,
                (height, width),
                0,
                self._batch,
                rows=len(rows),
                stream=Stream.EVALUATION_AUGMENTATION,
            )
            self._batch += 1
            self._optimizer.zero_grad()
            there = params.to(device, non_blocking=True)
            x = tidied_augment(self._images[rows], params, there)
            torch.autograd.backward(self._loss(x, self._labels[rows]))
            self._optimizer.step()

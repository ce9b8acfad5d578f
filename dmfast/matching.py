# SPDX-License-Identifier: MIT
"""One iteration of distribution matching (Algorithm 1 of the paper), all classes at once.

Everything random in an iteration is a pure function of (seed, iteration, class), and nothing in it
waits for the device: the loss stays a tensor, and the iteration may be one too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from . import ops
from ._in_parts import can_be_in_parts, embed_in_parts, embed_with_gradient
from ._own import OwnNetwork
from ._ranges import stage
from .data import ImageData
from .devices import autocast, memory_format, repeatable
from .errors import InputError
from .networks import ConvNet, Network, drawn_weights, has_batch_norm, initialise_
from .ops import Stream
from .pool import NetworkPool
from .prefetch import Prefetcher

# How many images a forward pass takes, in pixels, by device type. On a CPU, of 32 to 512 images of
# 32x32, passes of 256 were the fastest. A GPU wants many, and has the memory for them.
_PIXELS_PER_PASS = {"cpu": 256 * 32 * 32, "cuda": 4096 * 32 * 32}
# The embeddings of a chunk's real images are kept until its loss is taken: 8 KB each for ConvNet.
_PASSES_PER_CHUNK = 16
# Under batch norm all real images go through a layer before any goes through the next. Where a
# value of 128 channels for each of their pixels takes more than this, some go at a time, and what
# is kept between two layers takes no more.
_BATCH_NORM_BYTES = 4 * 2**30
# As much of the synthetic images is forwarded at once, with its gradient, which takes a little more
# memory than that. More goes in parts, for a few times the work.
_BATCH_NORM_GRADIENT_BYTES = 8 * 2**30


#: What synthetic images can start from.
INITS = ("real", "noise")


def initial_images(data: ImageData, ipc: int, init: str, seed: int) -> Tensor:
    """What the synthetic images start from: [K * ipc, C, H, W] float32, normalised, class by class.

    Args:
        init: ``real``: images of the class, no two the same; ``noise``: standard normal.

    Raises:
        InputError: a class has fewer real images than ``ipc``.
    """
    rows = data.classes * ipc
    if init == "noise":
        words = torch.empty(2, dtype=torch.float32)
        ops.draw_weights_([words], [1.0], seed, 0, stream=Stream.INITIAL_IMAGES)
        high, low = ((words + 1) * 2**23).long().tolist()  # 24 random bits each
        generator = torch.Generator().manual_seed(high << 24 | low)
        shape = (rows, data.channels, *data.size)
        return torch.randn(shape, generator=generator, dtype=torch.float32)
    order, class_offsets = data.by_class()
    sizes = class_offsets.diff()
    if ipc > sizes.min():
        raise InputError(
            f"--ipc {ipc}: class {data.class_names[int(sizes.argmin())]!r} of {data.name} has "
            f"{int(sizes.min())} images to start from; ask for at most that many, or start from "
            "--init noise"
        )
    offsets = torch.arange(0, rows + 1, ipc)
    index = ops.draw_batch(
        order, class_offsets, offsets, rows, seed, 0, stream=Stream.INITIAL_IMAGES
    )
    return data.normalise(data.train_images[index])


@dataclass(frozen=True)
class RealImages:
    """Images to draw from: [M, H, W, C] uint8 or float32 in [0, 1], and mean and std [C]."""

    images: Tensor
    mean: Tensor
    std: Tensor

    @staticmethod
    def of(data: ImageData, images: Tensor) -> RealImages:
        """``images`` of the set ``data``, where they are."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=images.device)
            for values in (data.mean, data.std)
        )
        return RealImages(images, mean, std)


@dataclass(frozen=True)
class Pass:
    """Rows of the real batch that are forwarded at once, divided by its chunk's classes."""

    rows: slice
    offsets: Tensor


@dataclass(frozen=True)
class Chunk:
    """Consecutive classes whose loss is taken at once.

    ``rows`` are theirs in the real batch, ``offsets`` [classes + 1] (int64, on the device, from 0)
    divide these by class, and ``synthetic`` are their rows in the synthetic set.
    """

    classes: slice
    rows: slice
    offsets: Tensor
    synthetic: slice
    passes: tuple[Pass, ...]


def plan(
    offsets: Sequence[int],
    ipc: int,
    size: tuple[int, int],
    device: torch.device,
    *,
    classes_per_step: int | None = None,
    whole: bool = False,
    in_one_pass: bool = False,
) -> tuple[Chunk, ...]:
    """Divides an iteration so that its memory is bounded; the sums differ by rounding only.

    The division depends on the arguments alone, not on the memory that happens to be free, so that
    a run gives the same bits each time, but where memory runs out (:meth:`Matcher.halve`).

    Args:
        offsets: rows ``offsets[k]`` to ``offsets[k + 1] - 1`` of the real batch are class k's.
        ipc: synthetic images a class.
        size: (H, W) of the images.
        classes_per_step: classes a chunk; None: as many as fit the device's usual pass.
        whole: everything in one chunk, as batch norm needs it; and in one pass, unless it is so
            much that it is rather embedded in parts, and ``in_one_pass`` does not forbid that.
    """
    classes = len(offsets) - 1
    per_pass = max(1, _PIXELS_PER_PASS[device.type] // (size[0] * size[1]))
    if whole:
        classes_per_step = classes
        of_layer = offsets[-1] * size[0] * size[1] * 128 * 4
        if in_one_pass or of_layer <= _BATCH_NORM_BYTES:
            per_pass = offsets[-1]
    elif classes_per_step is None:
        largest = max(end - start for start, end in itertools.pairwise(offsets))
        classes_per_step = max(1, min(per_pass // ipc, _PASSES_PER_CHUNK * per_pass // largest))
    chunks = []
    for first in range(0, classes, classes_per_step):
        last = min(first + classes_per_step, classes)
        start, end = offsets[first], offsets[last]
        bounds = torch.tensor(offsets[first : last + 1], device=device)
        count = -(-(end - start) // per_pass)
        edges = [start + (end - start) * i // count for i in range(count + 1)]
        passes = tuple(
            Pass(slice(a, b), bounds.clamp(a, b) - a) for a, b in itertools.pairwise(edges)
        )
        chunks.append(
            Chunk(
                slice(first, last),
                slice(start, end),
                bounds - start,
                slice(first * ipc, last * ipc),
                passes,
            )
        )
    return tuple(chunks)


def matching_gradient(
    network: Network,
    synthetic: Tensor,
    real: RealImages,
    index: Tensor,
    params: Tensor,
    chunks: Sequence[Chunk],
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """The loss of equation 6 for one network and one draw, and its gradient.

    Args:
        network: in the mode in which it is to be used; its parameters need no gradient.
        synthetic: [K * ipc, C, H, W] float32, normalised, class by class.
        index: the real batch, [rows] int64 into ``real``, class by class.
        params: the augmentation of each class, [K, 13] float32, for both sides.
        chunks: the division of the classes (:func:`plan`).
        precision: ``float32``, or ``bfloat16`` for the network's passes; the means, the loss and
            the gradient are float32 in either case.

    Returns:
        The loss, a float32 scalar: the sum over the classes and features of the squared differences
        of the means; and its gradient with respect to ``synthetic``, in its shape and layout.
    """
    gradient = torch.empty_like(synthetic)
    loss = synthetic.new_zeros(())
    for chunk in chunks:
        transforms = params[chunk.classes]
        with stage("real pass"):
            embeddings, offsets = _embed_real(network, real, index, transforms, chunk, precision)
        images = synthetic[chunk.synthetic].detach().requires_grad_()
        with stage("synthetic forward"), autocast(images.device, precision):
            embedded = _embed_synthetic(network, ops.siamese_augment(images, transforms))
        with stage("discrepancy"):
            term = ops.class_mean_discrepancy(embeddings, embedded, len(transforms), offsets)
        with stage("backward"):
            (gradient[chunk.synthetic],) = torch.autograd.grad(term, images)
        loss += term.detach()
    return loss, gradient


def _embed_synthetic(network: Network, images: Tensor) -> Tensor:
    """The embeddings [N, D] of augmented images, with a gradient in these."""
    pixels = images.shape[2] * images.shape[3]
    of_layer = len(images) * pixels * 128 * 4
    if of_layer <= _BATCH_NORM_GRADIENT_BYTES or not can_be_in_parts(network):
        return network.embed(images)
    rows = max(1, _PIXELS_PER_PASS[images.device.type] // pixels)
    return embed_with_gradient(network, images, rows=rows, kept_bytes=_BATCH_NORM_BYTES)


def descend_(
    images: Tensor, momentum_buffer: Tensor, gradient: Tensor, lr: float, momentum: float
) -> None:
    """One step along ``gradient`` in place, to the bit that of :class:`torch.optim.SGD`.

    ``momentum_buffer`` is zero before the first step. Nothing is allocated: once memory runs out,
    it has done so before the images change.
    """
    momentum_buffer.mul_(momentum).add_(gradient)
    images.add_(momentum_buffer, alpha=-lr)


@torch.no_grad()
def _embed_real(
    network: Network,
    real: RealImages,
    index: Tensor,
    params: Tensor,
    chunk: Chunk,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    """The embeddings of the chunk's real images, or the mean of each class, and their offsets."""
    device = index.device
    if isinstance(network, ConvNet) and (blocks := network.fused_blocks(device)):
        means = ops.convnet_class_mean(
            real.images,
            index[chunk.rows],
            chunk.offsets,
            params,
            real.mean,
            real.std,
            [weight for block in blocks for weight in block.weights],
            padding=blocks[0].padding,
            eps=blocks[0].eps,
            precision=precision,
        )
        return means, None
    passes = [
        partial(_gather_pass, real, index[part.rows], params, part.offsets, precision)
        for part in chunk.passes
    ]
    with autocast(device, precision):
        if len(passes) > 1 and has_batch_norm(network):
            embeddings = embed_in_parts(network, passes, kept_bytes=_BATCH_NORM_BYTES)
        else:
            embeddings = [network.embed(gather()) for gather in passes]
    return torch.cat(embeddings), chunk.offsets


def _gather_pass(
    real: RealImages, index: Tensor, params: Tensor, offsets: Tensor, precision: str
) -> Tensor:
    # On a CPU bfloat16 is of the products alone.
    narrow = precision == "bfloat16" and index.device.type != "cpu"
    dtype = torch.bfloat16 if narrow else torch.float32
    images = ops.gather_augment(real.images, index, params, real.mean, real.std, dtype, offsets)
    if memory_format(index.device) is torch.contiguous_format:
        # Not contiguous(): one channel is so in either layout, and would keep the strides by which
        # convolutions take it for channels_last.
        images = images.clone(memory_format=torch.contiguous_format)
    return images


class Matching(Protocol):
    """Synthetic images, and a method that improves them iteration by iteration.

    Attributes:
        images: [K * ipc, C, H, W] float32, normalised, class by class: what is learned.
        momentum_buffer: the running sum of gradients, in the shape of ``images``.
    """

    images: Tensor
    momentum_buffer: Tensor

    @property
    def real_images_per_step(self) -> int:
        """How many real images an iteration forwards."""

    @property
    def classes_per_step(self) -> int:
        """How many classes are forwarded at once, at most."""

    @property
    def streams(self) -> bool:
        """Whether the real images stay on the host."""

    def halve(self) -> bool:
        """From now on forwards half as many classes at once; False where that cannot be."""

    def load(self, step: int) -> None:
        """Has the real batch of iteration ``step`` where :meth:`gradient` reads it."""

    def close(self) -> None:
        """Ends the thread that gathers batches, if there is one."""

    def gradient(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """The loss of iteration ``step``, and what :meth:`update` takes. Changes nothing."""

    def update(self, gradient: Tensor) -> None:
        """Ends the iteration, by operations that allocate nothing."""


class Matcher:
    """Distribution matching on synthetic images: all that an iteration needs besides its number.

    The real images lie on the device. Where they are too many for that they stay on the host, and
    the batches are sent, two ahead of the iterations (:class:`dmfast.prefetch.Prefetcher`).

    Attributes:
        images: [K * ipc, C, H, W] float32, normalised, class by class: what is learned.
        momentum_buffer: the running sum of gradients, in the shape of ``images``.
    """

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
        precision: str = "float32",
        classes_per_step: int | None = None,
        memory_budget: int | None = None,
        pool: NetworkPool | None = None,
        device: torch.device,
    ) -> None:
        """Starts from ``images`` (copied) at rest.

        Args:
            network: a network for ``data``; its weights are drawn anew in every iteration.
            batch_real: real images a class; a class that has fewer gives all of its own.
            strategy: words of the augmentation joined by underscores; "" for none.
            lr: of the gradient of the summed loss.
            precision: ``float32`` or ``bfloat16``, for the network's passes.
            classes_per_step: see :func:`plan`; without effect under batch norm.
            memory_budget: bytes of the device that the real images may take; None: any number.
                The results do not depend on it.
            pool: one of ``network``, from which its weights are drawn; None: at random.
        """
        self.images = images.to(device, copy=True, memory_format=memory_format(device))
        self.momentum_buffer = torch.zeros_like(self.images)
        self._network = placed(network, device).train().requires_grad_(False)
        # After that the norms stay the identity: they are not trained, and go by their own batch.
        initialise_(self._network, seed, 0)
        self._draw_weights: Callable[[int | Tensor], None]
        if pool is not None:
            self._draw_weights = partial(pool.load_, seed)
        elif isinstance(self._network, OwnNetwork):
            self._draw_weights = partial(initialise_, self._network, seed)
        else:
            weights, bounds = drawn_weights(self._network)
            self._draw_weights = partial(
                ops.draw_weights_, weights, bounds, seed, stream=Stream.WEIGHTS
            )
        order, class_offsets = data.by_class()
        offsets, self._rows = data.batch_offsets(batch_real)
        draw = partial(ops.draw_batch, rows=self._rows, seed=seed, stream=Stream.REAL_BATCH)
        streams = memory_budget is not None and data.train_images.nbytes > memory_budget
        self._batches: Prefetcher | None = None
        self._draw: Callable[..., Tensor]
        if streams:
            draw = partial(draw, order, class_offsets, offsets)
            self._batches = Prefetcher(data.train_images, draw, self._rows, device)
            whole_batch = torch.arange(self._rows, device=device)
            self._draw = lambda step: whole_batch
        else:
            self._draw = partial(draw, *(t.to(device) for t in (order, class_offsets, offsets)))
        self._real = RealImages.of(
            data, data.train_images.to(device) if self._batches is None else self._batches.batch
        )
        self._whole = has_batch_norm(network)
        self._plan = partial(
            plan,
            offsets.tolist(),
            len(images) // data.classes,
            data.size,
            device,
            whole=self._whole,
            in_one_pass=self._whole and not can_be_in_parts(network),
        )
        self._chunks = self._plan(classes_per_step=classes_per_step)
        self._classes, self._size = data.classes, data.size
        self._strategy, self._seed, self._precision = strategy, seed, precision
        self._lr, self._momentum = lr, momentum

    @property
    def real_images_per_step(self) -> int:
        """How many real images an iteration forwards."""
        return self._rows

    @property
    def streams(self) -> bool:
        """Whether the real images stay on the host."""
        return self._batches is not None

    @property
    def classes_per_step(self) -> int:
        """How many classes are forwarded at once, at most."""
        first = self._chunks[0].classes
        return int(first.stop)

    def halve(self) -> bool:
        """From now on forwards half as many classes at once; False where that cannot be."""
        classes = self.classes_per_step
        if self._whole or classes == 1:
            return False
        self._chunks = self._plan(classes_per_step=(classes + 1) // 2)
        return True

    def load(self, step: int) -> None:
        """Has the real batch of iteration ``step`` where :meth:`gradient` reads it.

        Needed before a gradient whose step is a tensor, where the real images stay on the host.

        Raises:
            InputError: the batch could not be gathered.
        """
        if self._batches is not None:
            self._batches.load(step)

    def close(self) -> None:
        """Ends the thread that gathers batches, if there is one."""
        if self._batches is not None:
            self._batches.close()

    def gradient(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """The loss of iteration ``step`` at the present images, and its gradient.

        Args:
            step: from 0; an int, or an int64 tensor of one element on the device.
        """
        if not isinstance(step, Tensor):
            self.load(step)
        with repeatable():
            with stage("weights"):
                self._draw_weights(step)
            with stage("draw"):
                index = self._draw(step=step)
                params = ops.draw_augmentation(
                    self._strategy,
                    self._classes,
                    self._size,
                    self._seed,
                    step,
                    stream=Stream.AUGMENTATION,
                    device=self.images.device,
                )
            return matching_gradient(
                self._network, self.images, self._real, index, params, self._chunks, self._precision
            )

    def update(self, gradient: Tensor) -> None:
        """Moves ``images`` along ``gradient``: see :func:`descend_`."""
        with stage("update"):
            descend_(self.images, self.momentum_buffer, gradient, self._lr, self._momentum)

    def step(self, step: int | Tensor) -> Tensor:
        """Makes iteration ``step`` and gives its loss, a float32 scalar on the device."""
        loss, gradient = self.gradient(step)
        self.update(gradient)
        return loss


def placed(network: Network, device: torch.device) -> Network:
    """The network on a device, its weights in the layout of what is to use them."""
    network = network.to(device)
    if isinstance(network, ConvNet) and network.fused_blocks(device):
        return network
    placed: Network = network.to(memory_format=memory_format(device))  # type: ignore[call-overload]
    return placed

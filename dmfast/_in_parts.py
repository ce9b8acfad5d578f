# SPDX-License-Identifier: MIT
"""Embeddings of many images under batch norm, some images at a time.

Batch norm needs all images of a layer before any of the next. Layer by layer the statistics of all
are gathered from parts, which are embedded again from the beginning, by the statistics that are
known already; what is small enough is kept on the way. The gradient is taken in the same way, with
the statistics as variables of their own: from the last to the first, the gradient in each is
gathered from all parts, and joins what flows into the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import ops
from ._batch_norm import statistics_of
from .networks import ConvNet, FusedBlock, Network

#: A batch norm, and the layers between it and the one before.
_Layer = tuple[nn.Sequential, nn.BatchNorm2d]


@dataclass(frozen=True)
class _Stage:
    """What ends with a batch norm.

    Attributes:
        statistics: mean and variance, [2, K], of what the norm is given for some images at the
            stage, and their number.
        through: the stage's output by the statistics of all.
    """

    statistics: Callable[[Tensor], tuple[Tensor, int]]
    through: Callable[[Tensor, Tensor], Tensor]


def can_be_in_parts(network: nn.Module) -> bool:
    """Whether the layers of a network follow one another, batch norms among them."""
    features = getattr(network, "features", None)
    if not isinstance(network, Network) or type(features) is not nn.Sequential:
        return False
    if type(network).embed not in (Network.embed, ConvNet.embed):
        return False
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    layers = list(features)
    return bool(norms) and all(type(n) is nn.BatchNorm2d and n in layers for n in norms)


@torch.no_grad()
def embed_in_parts(
    network: Network, images: Sequence[Callable[[], Tensor]], *, kept_bytes: int
) -> list[Tensor]:
    """The embeddings [N, D] of each part of a batch, as of ``network.embed`` on all of it.

    Args:
        network: one that :func:`can_be_in_parts` allows, in train mode. Running statistics are
            left as they are.
        images: what makes each part [N, C, H, W]; called several times. Under the caller's
            autocast.
        kept_bytes: as much may be kept of all parts between one layer and the next.
    """
    return _embed(network, images, kept_bytes)[0]


def embed_with_gradient(network: Network, images: Tensor, *, rows: int, kept_bytes: int) -> Tensor:
    """The embeddings [N, D] of images [N, C, H, W], as ``network.embed`` gives them.

    They have a gradient in the images alone, once; it is taken in parts, too, in as many passes as
    there are norms, and one more.

    Args:
        network: see :func:`embed_in_parts`.
        rows: images of a part.
        kept_bytes: see :func:`embed_in_parts`.
    """
    embedded: Tensor = _Embedding.apply(images, network, rows, kept_bytes)  # type: ignore[no-untyped-call]
    return embedded


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, network: Network, rows: int, kept_bytes: int) -> Tensor:
        parts = [partial(torch.clone, part) for part in torch.split(images, rows)]
        embeddings, known = _embed(network, parts, kept_bytes)
        if _blocks_of(network, images) is not None:  # which leave out what cancels in the norm
            layers, _ = _layers(network)
            known = [
                _with_bias(before[-1], s) for (before, _), s in zip(layers, known, strict=True)
            ]
        ctx.save_for_backward(images, *known)
        ctx.network, ctx.rows, ctx.kept_bytes = network, rows, kept_bytes
        kind = images.device.type
        ctx.autocast = partial(
            torch.autocast,
            kind,
            torch.get_autocast_dtype(kind),
            enabled=torch.is_autocast_enabled(kind),
        )
        return torch.cat(embeddings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        images, *known = ctx.saved_tensors
        with ctx.autocast():
            found = _gradient(ctx.network, images, known, gradient, ctx.rows, ctx.kept_bytes)
        return found, None, None, None


def _gradient(
    network: Network,
    images: Tensor,
    known: Sequence[Tensor],
    gradient: Tensor,
    rows: int,
    kept_bytes: int,
) -> Tensor:
    """The gradient in the images, from that in their embeddings and the norms' statistics."""
    layers, rest = _layers(network)
    sources, gradients = torch.split(images, rows), torch.split(gradient, rows)
    #: The gradient in the statistics of each norm, where it is known.
    of_statistics: dict[int, Tensor] = {}

    def along(
        x: Tensor, begin: int, variables: Sequence[Tensor], later: range
    ) -> tuple[Tensor, list[Tensor]]:
        """The embeddings, and what the part adds to the statistics of the ``later`` norms."""
        shares = []
        x = x.clone()  # layers that work in place are not to change what is kept
        for number in range(begin, len(layers)):
            (before, norm), statistics = layers[number], variables[number]
            z = before(x)
            wide = z.to(statistics.dtype)
            if number in later:
                values = len(images) * z[0, 0].numel()
                # The mean square distance does not change with the mean that it is from.
                squares = (wide - statistics[0].detach()[:, None, None]).square()
                shares.append(torch.stack([wide.sum((0, 2, 3)), squares.sum((0, 2, 3))]) / values)
            x = _normalised(wide, norm, statistics).to(z.dtype)
        return rest(x).flatten(1), shares

    def gather(
        variable: int, begin: int, inputs: Sequence[Tensor], into: Callable[[int, Tensor], object]
    ) -> None:
        """The gradient of each part in the statistics of that number, or, of -1, in the images."""
        later = range(variable + 1, len(layers))
        for part, (x, of_part) in enumerate(zip(inputs, gradients, strict=True)):
            x = x.detach().requires_grad_(variable < 0)
            variables = [s.detach().requires_grad_(i == variable) for i, s in enumerate(known)]
            with torch.enable_grad():
                embedded, shares = along(x, begin, variables, later)
            of_outputs = [of_part.to(embedded.dtype), *(of_statistics[n] for n in later)]
            target = x if variable < 0 else variables[variable]
            into(part, torch.autograd.grad([embedded, *shares], target, of_outputs)[0])

    begin, inputs = _kept(layers, sources, known, kept_bytes)
    for number in reversed(range(len(layers))):
        if number < begin:
            begin, inputs = 0, sources
        total = torch.zeros_like(known[number])
        gather(number, begin, inputs, partial(_add, total))
        of_statistics[number] = total
    of_images = torch.empty_like(images)
    pieces = torch.split(of_images, rows)
    gather(-1, 0, sources, lambda part, found: pieces[part].copy_(found))
    return of_images


def _add(total: Tensor, part: int, found: Tensor) -> None:
    total.add_(found)


def _kept(
    layers: Sequence[_Layer],
    sources: Sequence[Tensor],
    known: Sequence[Tensor],
    kept_bytes: int,
) -> tuple[int, Sequence[Tensor]]:
    """The first number of layers whose outputs are small enough to be kept, and these."""

    def at(part: int, end: int) -> Tensor:
        x = sources[part].clone()
        for (before, norm), statistics in zip(layers[:end], known, strict=False):
            x = _through(before, norm, x, statistics)
        return x

    for end in range(1, len(layers)):
        first = at(0, end)
        if first.nbytes * len(sources) <= kept_bytes:
            counts = [len(source) for source in sources]
            return end, _collected(partial(at, end=end), first, counts)
    return 0, sources


def _with_bias(layer: nn.Module, statistics: Tensor) -> Tensor:
    """The statistics of what a convolution gives, from those without its bias."""
    assert isinstance(layer, nn.Conv2d)
    if layer.bias is None:
        return statistics
    return torch.stack([statistics[0] + layer.bias, statistics[1]])


def _normalised(z: Tensor, norm: nn.BatchNorm2d, statistics: Tensor) -> Tensor:
    mean, variance = statistics[:, :, None, None]
    y: Tensor = (z - mean) * (variance + norm.eps).rsqrt()
    if norm.affine:
        y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    return y


def _embed(
    network: Network, images: Sequence[Callable[[], Tensor]], kept_bytes: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The embeddings of each part, and the statistics of each norm."""
    # What outlives a part lies in one piece, made before: between the large tensors of the parts it
    # would keep the allocator from using their memory again.
    stages, tail = _stages(network, images[0]())
    known: list[Tensor] = []
    counts: list[int] = []
    inputs: list[Callable[[], Tensor]] = list(images)  # of the stage with number `begin`
    begin, parts = 0, range(len(images))

    def at(part: int, stage: int) -> Tensor:
        """The part as the stage takes it."""
        x = inputs[part]()
        for number in range(begin, stage):
            x = stages[number].through(x, known[number])
        return x

    for stage in range(len(stages)):
        if stage > begin:
            first = at(0, stage)
            if first.nbytes * len(images) <= kept_bytes:
                kept = _collected(partial(at, stage=stage), first, counts)
                # Layers that work in place are not to change what is kept.
                inputs, begin = [partial(torch.clone, x) for x in kept], stage
            del first
        statistics: Tensor | None = None
        for part in parts:
            found, count = stages[stage].statistics(at(part, stage))
            if statistics is None:
                statistics = found.new_empty((len(images), *found.shape))
            statistics[part] = found
            if stage == 0:
                counts.append(count)
        assert statistics is not None
        known.append(_merged(statistics, counts))
    last = len(stages)
    return _collected(lambda part: tail(at(part, last)), tail(at(0, last)), counts), known


def _collected(at: Callable[[int], Tensor], first: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """``first`` and what ``at`` gives of the other parts, of so many rows each, in one tensor."""
    shape, layout = (sum(counts), *first.shape[1:]), torch.contiguous_format
    if first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    one_piece = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    pieces = list(torch.split(one_piece, list(counts)))
    pieces[0].copy_(first)
    for part in range(1, len(counts)):
        pieces[part].copy_(at(part))
    return pieces


def _merged(statistics: Tensor, counts: Sequence[int]) -> Tensor:
    """Statistics [2, K] of all from those of parts, [parts, 2, K], and their numbers of values."""
    # Shares are numbers: a tensor of them would be sent to the device, which a graph cannot.
    total = sum(counts)
    shares = [count / total for count in counts]
    wide = statistics.double()
    mean = torch.stack([share * s[0] for s, share in zip(wide, shares, strict=True)]).sum(0)
    of_each = [
        share * (s[1] + (s[0] - mean).square()) for s, share in zip(wide, shares, strict=True)
    ]
    return torch.stack([mean, torch.stack(of_each).sum(0)]).to(statistics.dtype)


def _stages(network: Network, x: Tensor) -> tuple[list[_Stage], Callable[[Tensor], Tensor]]:
    """The stages for images like ``x``, and what makes the last one's output an embedding."""
    blocks = _blocks_of(network, x)
    if blocks is not None:
        bfloat16 = torch.is_autocast_enabled("cpu")
        precision = "bfloat16" if bfloat16 else None
        stages = [
            _Stage(
                partial(_statistics_of_block, block, precision),
                partial(_through_block, block, precision),
            )
            for block in blocks
        ]
        return stages, lambda out: out.flatten(1).to(x.dtype)
    layers, rest = _layers(network)
    stages = [
        _Stage(partial(_statistics_of, before), partial(_through, before, norm))
        for before, norm in layers
    ]
    return stages, lambda out: rest(out).flatten(1)


def _blocks_of(network: Network, x: Tensor) -> list[FusedBlock] | None:
    if not isinstance(network, ConvNet):
        return None
    return network.batch_norm_blocks(x.device, x.dtype)


def _layers(network: Network) -> tuple[list[_Layer], nn.Module]:
    """The batch norms of a network, each with the layers before it; and what follows the last."""
    found: list[_Layer] = []
    before = nn.Sequential()
    for layer in network.features:
        if isinstance(layer, nn.BatchNorm2d):
            found.append((before, layer))
            before = nn.Sequential()
        else:
            before.append(layer)
    return found, before


def _statistics_of_block(block: FusedBlock, precision: str | None, x: Tensor) -> tuple[Tensor, int]:
    found = ops.conv_batch_statistics(x, block.weights[0], block.padding, precision)
    return found, x.shape[0]


def _through_block(
    block: FusedBlock, precision: str | None, x: Tensor, statistics: Tensor
) -> Tensor:
    out, _ = ops.conv_batch_norm_relu_pool(
        x, *block.weights, block.eps, block.padding, precision, statistics
    )
    return out


def _statistics_of(before: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return statistics_of(before(x)), x.shape[0]


def _through(before: nn.Module, norm: nn.BatchNorm2d, x: Tensor, statistics: Tensor) -> Tensor:
    mean, variance = statistics
    return F.batch_norm(before(x), mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)

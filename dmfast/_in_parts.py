# SPDX-License-Identifier: MIT
"""Embeddings of many images under batch norm, some images at a time.

Batch norm needs all images of a layer before any of the next. Layer by layer the statistics of all
are gathered from parts, which are embedded again from the beginning, by the statistics that are
known already; what is small enough is kept on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .networks import ConvNet, FusedBlock, Network


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
    stages, tail = _stages(network, images[0]())
    known: list[Tensor] = []
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
                kept = [first, *(at(part, stage) for part in range(1, len(images)))]
                # Layers that work in place are not to change what is kept.
                inputs, begin = [partial(torch.clone, x) for x in kept], stage
        known.append(_merged([stages[stage].statistics(at(part, stage)) for part in parts]))
    return [tail(at(part, len(stages))) for part in parts]


def _merged(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Statistics [2, K] of all from those of parts and their numbers of values."""
    # Shares are numbers: a tensor of them would be sent to the device, which a graph cannot.
    total = sum(count for _, count in parts)
    wide = [(statistics.double(), count / total) for statistics, count in parts]
    mean = torch.stack([share * s[0] for s, share in wide]).sum(0)
    of_each = [share * (s[1] + (s[0] - mean).square()) for s, share in wide]
    return torch.stack([mean, torch.stack(of_each).sum(0)]).to(parts[0][0].dtype)


def _stages(network: Network, x: Tensor) -> tuple[list[_Stage], Callable[[Tensor], Tensor]]:
    """The stages for images like ``x``, and what makes the last one's output an embedding."""
    blocks = None
    if isinstance(network, ConvNet):
        blocks = network.batch_norm_blocks(x.device, x.dtype)
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
    stages, before = [], nn.Sequential()
    for layer in network.features:
        if isinstance(layer, nn.BatchNorm2d):
            stages.append(_Stage(partial(_statistics_of, before), partial(_through, before, layer)))
            before = nn.Sequential()
        else:
            before.append(layer)
    rest = before
    return stages, lambda out: rest(out).flatten(1)


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
    z = before(x)
    variance, mean = torch.var_mean(z.float(), (0, 2, 3), correction=0)
    return torch.stack([mean, variance]), x.shape[0]


def _through(before: nn.Module, norm: nn.BatchNorm2d, x: Tensor, statistics: Tensor) -> Tensor:
    mean, variance = statistics
    return F.batch_norm(before(x), mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)

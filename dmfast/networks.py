# SPDX-License-Identifier: MIT
"""The networks whose embeddings are matched and which are trained on a condensed set.

State dicts are named as in the published code, so its checkpoints load.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from . import ops
from .errors import InputError
from .ops import Stream

_GRAMMAR = "ConvNet[D<depth>][W<width>][AS|AR|AL|ASwish][NN|BN|LN|IN|GN][NP|MP|AP]"
_CONVNET = re.compile(
    r"ConvNet(?:D([1-9]\d*))?(?:W([1-9]\d*))?(?:A(Swish|S|R|L))?([NBLIG]N)?([NMA]P)?"
)

_MAX_DEPTH, _MAX_WIDTH = 64, 8192  # beyond anything in use, within any memory


class Network(nn.Module):
    """A classifier of images [N, C, H, W]: a linear layer on an embedding."""

    features: nn.Module
    classifier: nn.Linear

    def embed(self, x: Tensor) -> Tensor:
        """What distribution matching compares: the last block, flattened (C, H, W) to [N, D]."""
        features: Tensor = self.features(x)
        return features.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits [N, classes]."""
        logits: Tensor = self.classifier(self.embed(x))
        return logits


class ConvNet(Network):
    """Blocks of 3x3 convolution, normalisation, activation and 2x2 pooling.

    The arguments after ``size`` are the parts of a name, spelled as there (see
    :func:`get_network`). Images of one channel are padded by 3 in the first convolution, so that
    28x28 becomes 32x32; odd sides lose a row or column in pooling.

    Raises:
        InputError: where pooling leaves nothing of the images, depth or width is beyond reason, or
            a width does not split into the 4 groups of ``GN``.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: tuple[int, int],
        *,
        depth: int = 3,
        width: int = 128,
        activation: str = "R",
        norm: str = "IN",
        pool: str = "AP",
    ) -> None:
        super().__init__()
        if depth > _MAX_DEPTH or width > _MAX_WIDTH:
            raise InputError(
                f"a ConvNet has a depth of at most {_MAX_DEPTH} and a width of at most "
                f"{_MAX_WIDTH}, got D{depth} and W{width}"
            )
        if norm == "GN" and width % 4:
            raise InputError(f"GN needs a width that is a multiple of 4, got W{width}")
        layers: list[nn.Module] = []
        rows, columns = size
        for block in range(depth):
            padding = 3 if channels == 1 and block == 0 else 1
            layers.append(nn.Conv2d(width if block else channels, width, 3, padding=padding))
            rows, columns = rows + 2 * padding - 2, columns + 2 * padding - 2
            layers += _norm(norm, width, rows, columns)
            layers.append(_activation(activation))
            if pool != "NP":
                layers.append(nn.MaxPool2d(2) if pool == "MP" else nn.AvgPool2d(2))
                rows, columns = rows // 2, columns // 2
            if not (rows and columns):
                remedy = f"depth {block} (D{block})" if block else "no pooling (NP)"
                raise InputError(
                    f"images of {size[0]}x{size[1]} are too small for depth {depth}: pooling "
                    f"leaves nothing of them after block {block + 1}; use {remedy} or larger images"
                )
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * rows * columns, classes)


def get_network(
    name: str, channels: int, classes: int, size: tuple[int, int], seed: int | None = None
) -> Network:
    """The network of that name for images [N, channels, *size], on the CPU, in float32.

    Names are ``ConvNet[D<depth>][W<width>][A<activation>][norm][pool]``, as ``ConvNetD4BN``. What
    is left out is depth 3, width 128, activation R (ReLU), norm IN and pool AP.

    ========== ========================================================================
    activation S sigmoid, R ReLU, L leaky ReLU (0.01), Swish x * sigmoid(x)
    norm       NN none, BN batch, LN layer (over C, H and W), IN instance (GroupNorm of a
               channel each), GN GroupNorm of 4 groups
    pool       NP none, MP maximum, AP average
    ========== ========================================================================

    Args:
        seed: None: torch's own initialisation, from the global generator. Otherwise the weights
            are those of ``initialise_(network, seed, 0)`` and no generator is touched.

    Raises:
        InputError: on an unknown name, or images too small for the depth.
    """
    parts = _CONVNET.fullmatch(name)
    if parts is None:
        raise InputError(f"unknown model {name!r}; a model is {_GRAMMAR}, as ConvNetD4BN")
    depth, width, activation, norm, pool = parts.groups()
    with torch.device("cpu" if seed is None else "meta"):
        network = ConvNet(
            channels,
            classes,
            size,
            depth=int(depth or 3),
            width=int(width or 128),
            activation=activation or "R",
            norm=norm or "IN",
            pool=pool or "AP",
        ).float()
    if seed is not None:
        network.to_empty(device="cpu")
        initialise_(network, seed, 0)
    return network


def initialise_(
    network: nn.Module,
    seed: int,
    step: int | Tensor,
    *,
    network_index: int = 0,
    stream: Stream = Stream.WEIGHTS,
) -> None:
    """Redraws a network in place, as a pure function of (seed, step, stream, network_index).

    The distribution is that of torch's default initialisation: weights and biases of convolutions
    and linear layers uniform within 1/sqrt(fan in), norms the identity, running statistics empty.

    Args:
        step: an int, or an int64 tensor of one element on the network's device.
    """
    tensors: list[Tensor] = []
    bounds: list[float] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                tensors.append(parameter)
                bounds.append(bound)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            module.reset_parameters()
    ops.draw_weights_(tensors, bounds, seed, step, first_network=network_index, stream=stream)


def has_batch_norm(network: nn.Module) -> bool:
    """Whether the embedding of an image depends on the others of its batch."""
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def _norm(norm: str, channels: int, rows: int, columns: int) -> list[nn.Module]:
    if norm == "BN":
        return [nn.BatchNorm2d(channels)]
    if norm == "LN":
        return [nn.LayerNorm([channels, rows, columns])]
    if norm == "IN":
        return [nn.GroupNorm(channels, channels)]
    if norm == "GN":
        return [nn.GroupNorm(4, channels)]
    return []


def _activation(activation: str) -> nn.Module:
    if activation == "S":
        return nn.Sigmoid()
    if activation == "L":
        return nn.LeakyReLU(0.01, inplace=True)
    if activation == "Swish":
        return nn.SiLU()
    return nn.ReLU(inplace=True)

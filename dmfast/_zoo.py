# SPDX-License-Identifier: MIT
"""The published networks beside the ConvNets, layer by layer, and what all networks have.

Images of one channel are padded by 2 more in the first convolution of all but the ResNets, so that
28x28 becomes 32x32 (in LeNet 28x28 stays so). Classifiers are as large as the last feature map.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import InputError

#: A name, but for the ConvNets'. ``BN`` is batch norm; without it AlexNet has no norm, VGG11 and
#: ResNet18 have instance norm. ``_AP`` is average pooling in the place of strides.
GRAMMAR = "MLP|LeNet|AlexNet[BN]|VGG11[BN]|ResNet18[BN][_AP]"
_NAME = re.compile(r"(MLP|LeNet)|(AlexNet|VGG11)(BN)?|(ResNet18)(BN)?(_AP)?")
_POOLED_AWAY = "pooling leaves nothing of them"


class Network(nn.Module):
    """A classifier of images [N, C, H, W]: a linear layer on an embedding.

    Attributes:
        last: the name of that layer.
    """

    features: nn.Sequential
    last: str = "classifier"

    @property
    def embedding_size(self) -> int:
        """D of :meth:`embed`."""
        layer: nn.Linear = getattr(self, self.last)
        return layer.in_features

    def embed(self, x: Tensor) -> Tensor:
        """What distribution matching compares: the last block, flattened (C, H, W) to [N, D]."""
        features: Tensor = self.features(x)
        return features.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits [N, classes]."""
        logits: Tensor = getattr(self, self.last)(self.embed(x))
        return logits


class MLP(Network):
    """Two hidden layers of 128; the second is the embedding."""

    last = "fc_3"

    def __init__(self, channels: int, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(channels * size[0] * size[1], 128)
        self.fc_2 = nn.Linear(128, 128)
        self.fc_3 = nn.Linear(128, classes)

    def embed(self, x: Tensor) -> Tensor:
        """See :class:`Network`."""
        return F.relu(self.fc_2(F.relu(self.fc_1(x.flatten(1)))))


class LeNet(Network):
    """Two convolutions and two hidden layers, of which the second, of 84, is the embedding."""

    last = "fc_3"

    def __init__(self, channels: int, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.features = _features(channels, [_Conv(6, 5, 0, True), _Conv(16, 5, 0, True)], "NN")
        self.fc_1 = nn.Linear(16 * _area(self.features, size), 120)
        self.fc_2 = nn.Linear(120, 84)
        self.fc_3 = nn.Linear(84, classes)

    def embed(self, x: Tensor) -> Tensor:
        """See :class:`Network`."""
        return F.relu(self.fc_2(F.relu(self.fc_1(super().embed(x)))))


class AlexNet(Network):
    """Five convolutions, three of them pooled, and no dropout."""

    last = "fc"

    def __init__(
        self, channels: int, classes: int, size: tuple[int, int], *, norm: str = "NN"
    ) -> None:
        super().__init__()
        plan = [
            _Conv(128, 5, 2, True),
            _Conv(192, 5, 2, True),
            _Conv(256, 3, 1, False),
            _Conv(192, 3, 1, False),
            _Conv(192, 3, 1, True),
        ]
        self.features = _features(channels, plan, norm)
        self.fc = nn.Linear(192 * _area(self.features, size), classes)


class VGG11(Network):
    """Eight convolutions, five of them pooled."""

    def __init__(
        self, channels: int, classes: int, size: tuple[int, int], *, norm: str = "IN"
    ) -> None:
        super().__init__()
        plan = [
            _Conv(filters, 3, 1, pooled)
            for filters, pooled in (
                *((64, True), (128, True), (256, False), (256, True)),
                *((512, False), (512, True), (512, False), (512, True)),
            )
        ]
        self.features = _features(channels, plan, norm)
        self.classifier = nn.Linear(512 * _area(self.features, size), classes)


class ResNet18(Network):
    """A convolution and four layers of two residual blocks, the last three at half the size.

    With ``average`` sizes are halved by average pooling, odd ones downwards, and the embedding is
    the last map itself; without, by strides, odd ones upwards, and 4x4 of the last are pooled.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: tuple[int, int],
        *,
        norm: str = "IN",
        average: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        (self.bn1,) = norm_layers(norm, 64)
        widths = [64, 64, 128, 256, 512]
        layers = [
            nn.Sequential(
                _Residual(before, width, 1 if number == 0 else 2, norm, average),
                _Residual(width, width, 1, norm, average),
            )
            for number, (before, width) in enumerate(itertools.pairwise(widths))
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.pool = nn.Identity() if average else nn.AvgPool2d(4)
        rows, columns = size
        for _ in range(3):
            rows, columns = (
                (rows // 2, columns // 2) if average else (-(-rows // 2), -(-columns // 2))
            )
        if norm == "IN" and rows * columns == 1:
            raise _Nothing("an instance norm has a single pixel left of them")
        if not average:
            rows, columns = rows // 4, columns // 4
        if not (rows and columns):
            raise _Nothing(_POOLED_AWAY)
        self.classifier = nn.Linear(512 * rows * columns, classes)

    def embed(self, x: Tensor) -> Tensor:
        """See :class:`Network`."""
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4, self.pool):
            x = layer(x)
        return x.flatten(1)


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, of 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str, average: bool) -> None:
        super().__init__()
        step, halves = (1, stride == 2) if average else (stride, False)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, step, 1, bias=False)
        (self.bn1,) = norm_layers(norm, outputs)
        self.pool = nn.AvgPool2d(2) if halves else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        (self.bn2,) = norm_layers(norm, outputs)
        shortcut: list[nn.Module] = []
        if stride != 1 or inputs != outputs:
            shortcut.append(nn.Conv2d(inputs, outputs, 1, step, bias=False))
            if halves:
                shortcut.append(nn.AvgPool2d(2))
            shortcut += norm_layers(norm, outputs)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def published_network(
    name: str, channels: int, classes: int, size: tuple[int, int]
) -> Network | None:
    """The network of that name (:data:`GRAMMAR`); None where the name is another.

    Raises:
        InputError: pooling leaves nothing of the images.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        return None
    plain, convolutional, batch_norm, residual, residual_batch_norm, average = parts.groups()

    def make(size: tuple[int, int]) -> Network:
        if plain:
            return (MLP if plain == "MLP" else LeNet)(channels, classes, size)
        if residual:
            norm = "BN" if residual_batch_norm else "IN"
            return ResNet18(channels, classes, size, norm=norm, average=bool(average))
        norm = "BN" if batch_norm else "IN" if convolutional == "VGG11" else "NN"
        return (AlexNet if convolutional == "AlexNet" else VGG11)(
            channels, classes, size, norm=norm
        )

    try:
        return make(size)
    except _Nothing as error:
        smallest = _smallest(make)
        raise InputError(
            f"images of {size[0]}x{size[1]} are too small for {name}: {error}; use images of "
            f"{smallest}x{smallest} or larger, or a network that pools less"
        ) from None


def _smallest(make: Callable[[tuple[int, int]], Network]) -> int:
    """The side of the smallest square images that there is a network for."""
    with torch.device("meta"):
        for side in itertools.count(1):
            with suppress(_Nothing):
                make((side, side))
                break
    return side


class _Nothing(Exception):
    """Nothing is left of images of that size."""


class _Conv(NamedTuple):
    """A convolution, and whether 2x2 maxima are taken after it."""

    filters: int
    kernel: int
    padding: int
    pooled: bool


def _features(channels: int, plan: Iterable[_Conv], norm: str) -> nn.Sequential:
    """Convolutions, each with its norm, ReLU and pooling."""
    layers: list[nn.Module] = []
    inputs = channels
    for number, (filters, kernel, padding, pooled) in enumerate(plan):
        padding += 2 if channels == 1 and number == 0 else 0
        layers.append(nn.Conv2d(inputs, filters, kernel, padding=padding))
        layers += norm_layers(norm, filters)
        layers.append(nn.ReLU(inplace=True))
        if pooled:
            layers.append(nn.MaxPool2d(2))
        inputs = filters
    return nn.Sequential(*layers)


def _area(features: nn.Sequential, size: tuple[int, int]) -> int:
    """How many pixels the layers leave of images of that size.

    Raises:
        _Nothing: none.
    """
    rows, columns = size
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            grown = 2 * int(layer.padding[0]) - layer.kernel_size[0] + 1
            rows, columns = rows + grown, columns + grown
        elif isinstance(layer, nn.MaxPool2d):
            rows, columns = rows // 2, columns // 2
        if rows < 1 or columns < 1:
            raise _Nothing(_POOLED_AWAY)
    return rows * columns


def norm_layers(norm: str, channels: int, rows: int = 0, columns: int = 0) -> list[nn.Module]:
    """The norm of that name, or none; LN is of maps of rows x columns."""
    if norm == "BN":
        return [nn.BatchNorm2d(channels)]
    if norm == "LN":
        return [nn.LayerNorm([channels, rows, columns])]
    if norm == "IN":
        return [nn.GroupNorm(channels, channels)]
    if norm == "GN":
        return [nn.GroupNorm(4, channels)]
    return []

# SPDX-License-Identifier: MIT
"""Networks as users may have them, for ``--model``: good ones first, then unusable ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

Size = tuple[int, int]


def plain(channels: int, classes: int, size: Size) -> nn.Module:
    """What is matched is what the last layer is given."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * size[0] * size[1], classes),
    )


class Embedding(nn.Module):
    """Has an ``embed`` of its own, of three dimensions, and views images as it pleases."""

    def __init__(self, channels: int, classes: int, size: Size) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels * size[0] * size[1], 6)
        self.last = nn.Linear(6, classes)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(x.view(len(x), -1)).tanh().view(-1, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.embed(x).flatten(1)).log_softmax(1)


def dropout(channels: int, classes: int, size: Size) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size[0] * size[1], 8),
        nn.Dropout(),
        nn.Linear(8, 8),
        nn.Dropout(),
        nn.Linear(8, classes),
    )


class Scale(nn.Module):
    """A layer that torch does not have, with numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Average(nn.Module):
    """Takes off a running mean, which is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean += 0.1 * (x.detach().mean() - self.mean)
        return x - self.mean


def own_layers(channels: int, classes: int, size: Size) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        Average(),
        nn.Linear(channels * size[0] * size[1], 8),
        Scale(),
        nn.Tanh(),
        nn.Linear(8, classes),
    )


class Whole(nn.Sequential):
    """Draws all of itself in its own way."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=3.0)


def whole(channels: int, classes: int, size: Size) -> nn.Module:
    return Whole(nn.Flatten(), Scale(), nn.Linear(channels * size[0] * size[1], classes))


class Attention(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.tokens = nn.Conv2d(channels, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(x).flatten(2).transpose(1, 2)
        x, _ = self.attention(x, x, x)
        return self.last(x.mean(1))


def attention(channels: int, classes: int, size: Size) -> nn.Module:
    return Attention(channels, classes)


def lazy(channels: int, classes: int, size: Size) -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(classes)
    )


class Mixing(nn.Module):
    """A norm over the batch that is none of torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


def mixing(channels: int, classes: int, size: Size) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), Mixing(), nn.Linear(channels * size[0] * size[1], 8), nn.Linear(8, classes)
    )


def tied(channels: int, classes: int, size: Size) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Linear(8, 8), nn.Linear(8, 8))
    network.append(nn.Linear(8, classes))
    network[3].weight = network[2].weight
    return network


# ---- unusable ----------------------------------------------------------------------------------

number = 3


def no_module(channels: int, classes: int, size: Size) -> object:
    return 3


def raising(channels: int, classes: int, size: Size) -> nn.Module:
    raise ValueError(f"no network for\n{classes} classes")


def leaving(channels: int, classes: int, size: Size) -> nn.Module:
    raise SystemExit("bye")


def raising_in_a_pass(channels: int, classes: int, size: Size) -> nn.Module:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ x.new_zeros(3, 5, 7)  # the shapes do not fit

    return Wrong()


def other_classes(channels: int, classes: int, size: Size) -> nn.Module:
    return plain(channels, classes + 1, size)


class _Two(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, super().forward(x.flatten(1))


def two_results(channels: int, classes: int, size: Size) -> nn.Module:
    return _Two(channels * size[0] * size[1], classes)


def ends_otherwise(channels: int, classes: int, size: Size) -> nn.Module:
    return nn.Sequential(*plain(channels, classes, size), nn.LogSoftmax(1))


class _Frozen(Scale):
    reset_parameters = None


def undrawn(channels: int, classes: int, size: Size) -> nn.Module:
    network = plain(channels, classes, size)
    network.insert(1, _Frozen())
    return network


class _Half(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.zeros(1))


def half_drawn(channels: int, classes: int, size: Size) -> nn.Module:
    network = plain(channels, classes, size)
    network.insert(1, _Half())
    return network


def parametrised(channels: int, classes: int, size: Size) -> nn.Module:
    network = plain(channels, classes, size)
    parametrizations.weight_norm(network[0])
    return network


def pruned(channels: int, classes: int, size: Size) -> nn.Module:
    network = plain(channels, classes, size)
    prune.l1_unstructured(network[0], "weight", amount=0.5)
    return network


class Detached(Embedding):
    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return super().embed(x).detach()


class NoTensor(Embedding):
    def embed(self, x: torch.Tensor) -> list[float]:
        return [1.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(super().embed(x).flatten(1))


class Logarithm(Embedding):
    """Of numbers below 0."""

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return super().embed(x).log()


class Divided(Embedding):
    """By 0; what is matched is as it should be."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.embed(x).flatten(1)) / 0


class Masked(Embedding):
    """A class that no image is of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().forward(x)[:, :-1], x.new_full((len(x), 1), -torch.inf)], 1)


class Exploding(Embedding):
    """Its numbers are finite at first, but too large to be trained."""

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return (self.hidden(x.reshape(len(x), -1)) * 1e4) ** 3


_ONE = plain(3, 2, (8, 8))


def always_the_same(channels: int, classes: int, size: Size) -> nn.Module:
    return _ONE


def twice(channels: int, classes: int, size: Size) -> nn.Module:
    activation = nn.Tanh()
    features = channels * size[0] * size[1]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(features, 8), activation, activation, nn.Linear(8, classes)
    )

# SPDX-License-Identifier: MIT
"""Greedy choices among the images of one class, by their features.

A step reads the features once: one product of the matrix with a vector, in float32, of which the
rows that rounding leaves in doubt are compared again in float64. So the choice is that of float64
arithmetic, however the work is divided, and of what is equal there it is the first. The time is the
memory's: ``count`` times the bytes of the features over its bandwidth. (All distances at once would
take n * n * d multiplications, and n * n numbers of memory.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 1024  # in float64 at once


def herding(features: Tensor, count: int) -> Tensor:
    """Rows whose running mean keeps closest to the mean of all (Welling 2009).

    The k-th is, of those left, the row f that minimises ``|k * mean - (sum of those chosen) - f|``.

    Args:
        features: [n, d] float32, finite.
        count: 1 to n. The choice of fewer is the beginning of the choice of more.

    Returns:
        The rows in the order of their choice, [count] int64, on the device of ``features``.
    """
    search = _Search(features, count)
    mean = search.mean()
    target = mean.clone()

    def exact(rows: Tensor) -> Tensor:
        return (rows - target).square().sum(1)

    for _ in range(count):
        row = search.take_smallest(search.distances(target), exact)
        target += mean - features[row]
    return search.taken()


def k_center(features: Tensor, count: int) -> Tensor:
    """Rows such that every other is near one of them, greedily (Sener and Savarese 2018).

    The first is the row nearest the mean of all, as the paper's authors have it; each further one
    is the row whose nearest chosen row is farthest away.

    Args and result are as of :func:`herding`.
    """
    search = _Search(features, count)
    centres = [search.mean()]

    def exact(rows: Tensor) -> Tensor:
        return torch.stack([(rows - centre).square().sum(1) for centre in centres]).amin(0)

    nearest = search.distances(centres[0])
    row = search.take_smallest(nearest, exact)
    nearest.fill_(torch.inf)
    centres.clear()  # the mean is none
    for _ in range(count - 1):
        centres.append(features[row].double())
        torch.minimum(nearest, search.distances(centres[-1]), out=nearest)
        row = search.take_smallest(-nearest, lambda rows: -exact(rows))
    return search.taken()


class _Search:
    """The rows that are left, and which of them is best."""

    def __init__(self, features: Tensor, count: int) -> None:
        if not 1 <= count <= len(features):
            raise ValueError(f"count must be from 1 to {len(features)}, got {count}")
        self._features = features
        self._left = torch.ones(len(features), dtype=torch.bool, device=features.device)
        self._taken: list[int] = []
        self._squares = torch.cat([part.square().sum(1) for part in torch.split(features, _ROWS)])
        # The most that a sum of d products in float32 is off by, over the norms of the factors.
        self._rounding = (features.shape[1] + 4) * torch.finfo(torch.float32).eps / 2
        self._doubt = torch.zeros_like(self._squares)

    def mean(self) -> Tensor:
        """Of all rows: [d] float64."""
        total = self._features.new_zeros(self._features.shape[1], dtype=torch.float64)
        for part in torch.split(self._features, _ROWS):
            total += part.sum(0, dtype=torch.float64)
        return total / len(self._features)

    def distances(self, point: Tensor) -> Tensor:
        """The squared distances of all rows from a point [d] float64, as float32 has them: [n]."""
        square = point.square().sum().float()
        doubt = (self._squares.sqrt() + square.sqrt()).square() * self._rounding
        torch.maximum(self._doubt, doubt, out=self._doubt)
        return self._squares + square - 2 * (self._features @ point.float())

    def take_smallest(self, scores: Tensor, exact: Callable[[Tensor], Tensor]) -> int:
        """Takes the row of the smallest score.

        Args:
            scores: [n], off by no more than the squared distances so far.
            exact: gives the scores of rows [m, d] float64.
        """
        highest = (scores + self._doubt)[self._left].min()
        candidates = (self._left & (scores - self._doubt <= highest)).nonzero().flatten()
        values = [exact(self._features[part].double()) for part in torch.split(candidates, _ROWS)]
        row = int(candidates[torch.cat(values).argmin()])
        self._left[row] = False
        self._taken.append(row)
        return row

    def taken(self) -> Tensor:
        return torch.tensor(self._taken, device=self._features.device)

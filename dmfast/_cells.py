# SPDX-License-Identifier: MIT
"""Cells of a table: what they are made of, which a user asks for, and how much work they are.

A network is named by a format: ``{}`` for the one that the table is about, as ``ConvNet``, ``{}BN``
for that with batch norm, or ``ResNet18BN``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ._sources import short_name
from .data import canonical_name
from .errors import InputError
from .gradient_matching import LOOPS, loops_of
from .paper import Reported

ALL = "all"  # in place of a number of images a class
_WILD = frozenset("*?[")
#: Operations of an image of 3x32x32 pixels on its way through a ConvNet, which is the unit of work.
CONVNET_FLOP = 101_490_688
#: What a pass backward costs beside one forward, and what a gradient of gradients does.
_BACKWARD, _TWICE = 2, 6


@dataclass(frozen=True)
class Source:
    """What makes the sets of a cell.

    Attributes:
        kind: the command that does, ``condense`` or ``coreset``; or ``random`` or ``whole``, real
            images that the evaluation takes by itself.
        options: of the command, beyond those that all share.
        network: with which the command works.
        band: accuracies, in %, of the trained networks that condensing draws from, None: networks
            are random.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    network: str = "{}"
    band: str | None = None


@dataclass(frozen=True)
class Method:
    """What a figure of a table is of, beside a data set and a number of images a class.

    Attributes:
        words: what it is, for people.
        source: a name of :attr:`Table.sources`; methods of the same source share its sets.
        column: of the paper's figures, None where it has none.
        evaluate: options of the evaluation, by data set and images a class.
        network: that is evaluated, None for the source's.
        heading: of its column, as the paper has it.
        row: what its rows say beside set and number, as the paper has it.
    """

    words: str
    source: str
    column: str | None
    evaluate: Callable[[str, int], dict[str, Any]]
    network: str | None = None
    heading: str = ""
    row: str = ""


@dataclass(frozen=True)
class Table:
    """Cells, and the paper's figures of them.

    Attributes:
        datasets, ipcs: those of the paper; others are cells too where they are named.
        figures: by data set, images a class (None: all) and column.
        corner: what :attr:`Method.row` is, where it is anything.
    """

    title: str
    datasets: tuple[str, ...]
    ipcs: tuple[int, ...]
    sources: Mapping[str, Source]
    methods: Mapping[str, Method]
    figures: Mapping[tuple[str, int | None, str], Reported]
    corner: str = ""

    @property
    def has_coresets(self) -> bool:
        return any(source.kind == "coreset" for source in self.sources.values())

    @property
    def has_bands(self) -> bool:
        return any(source.band is not None for source in self.sources.values())

    def networks_of(self, method: str) -> tuple[str, ...]:
        """Those of a method, that its sets are made with and that it evaluates."""
        source = self.sources[self.methods[method].source].network
        return source, self.methods[method].network or source

    def place(self, cell: Cell) -> tuple[int, str, float, int]:
        """Where a cell is in the table: the paper's sets in its order, then others by name."""
        known = cell.dataset in self.datasets
        return (
            self.datasets.index(cell.dataset) if known else len(self.datasets),
            cell.dataset,
            math.inf if cell.ipc is None else cell.ipc,
            list(self.methods).index(cell.method),
        )


@dataclass(frozen=True)
class Cell:
    """One figure of a table; ``ipc`` None: of all real images."""

    dataset: str
    ipc: int | None
    method: str

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.ipc or ALL}/{self.method}"

    def folder(self, method: str | None = None) -> Path:
        """Of its files, or of those of another method's, under that of the table."""
        return Path(short_name(self.dataset), str(self.ipc or ALL), method or self.method)


@dataclass(frozen=True)
class Facts:
    """Of a real set, all that the cost of a cell depends on.

    Attributes:
        smallest_class: its training images.
        costs: of an image's way through each network, in :data:`CONVNET_FLOP`.
    """

    classes: int
    train_images: int
    test_images: int
    smallest_class: int
    costs: Mapping[str, float]


def select(table: Table, patterns: Sequence[str]) -> list[Cell]:
    """The cells that ``patterns`` name: ``SET/IPC/METHOD``, its beginning, or with wildcards.

    Wildcards stand for what the paper has. What is spelled out may be any set, known by name or a
    path, and any number of images a class.

    Raises:
        InputError: a pattern names no cell.
    """
    cells: dict[Cell, None] = {}
    for pattern in patterns or ["*"]:
        found = dict.fromkeys(_matching(table, pattern))
        if not found:
            raise InputError(
                f"--only {pattern}: no such cell; it is SET/IPC/METHOD, or the beginning of that, "
                f"with IPC as {table.ipcs[0]}, for whole {ALL}, and METHOD of "
                f"{', '.join(table.methods)}"
            )
        cells |= found
    return list(cells)


def _matching(table: Table, pattern: str) -> Iterator[Cell]:
    parts = pattern.split("/")
    parts += ["*"] * (3 - len(parts))
    *path, ipc_part, method_part = parts
    dataset_part = "/".join(path)
    if _WILD.isdisjoint(dataset_part) or Path(dataset_part).exists():
        try:
            datasets = [canonical_name(dataset_part)]
        except InputError as error:
            raise InputError(f"--only {pattern}: {error}") from error
    else:
        datasets = [name for name in table.datasets if fnmatchcase(name, dataset_part)]
    if _WILD.isdisjoint(ipc_part):
        ipcs = [ipc_part]
    else:
        ipcs = [ipc for ipc in (*map(str, table.ipcs), ALL) if fnmatchcase(ipc, ipc_part)]
    methods = [name for name in table.methods if fnmatchcase(name, method_part)]
    for dataset in datasets:
        for ipc in ipcs:
            number = int(ipc) if ipc.isdecimal() else None
            if number == 0 or (number is None and ipc != ALL):
                continue
            for method in methods:
                if _exists(table, number, method):
                    yield Cell(dataset, number, method)


def _exists(table: Table, ipc: int | None, method: str) -> bool:
    source = table.sources[table.methods[method].source]
    if (ipc is None) != (source.kind == "whole"):
        return False
    # Gradient matching has no published loops for other numbers.
    return source.options.get("method", "dm") not in ("dc", "dsa") or ipc in LOOPS


def cost_of(flop: int) -> float:
    """What so many operations of an image are, in :data:`CONVNET_FLOP`."""
    return flop / CONVNET_FLOP


def condensing_work(method: str, facts: Facts, ipc: int, batch_real: int, cost: float) -> float:
    """What an iteration forwards, in images of a cost; a pass backward counts as two."""
    batch = min(batch_real, facts.train_images // facts.classes)
    if method == "dm":
        images = facts.classes * (batch + (1 + _BACKWARD) * ipc)
    else:
        loops = loops_of(ipc, None, None)
        each = (1 + _BACKWARD) * batch + (1 + _BACKWARD + _TWICE) * ipc
        inner = (loops.outer - 1) * loops.inner * (1 + _BACKWARD) * ipc
        images = facts.classes * (loops.outer * each + inner)
    return images * cost


def training_work(images: int, epochs: int, cost: float) -> float:
    """The same of a network that is trained for epochs 0 to ``epochs``."""
    return (1 + _BACKWARD) * images * (epochs + 1) * cost


def testing_work(facts: Facts, cost: float) -> float:
    """The same of a network that is tested."""
    return facts.test_images * cost


def rank(is_dm: bool, work: float) -> tuple[int, bool, float]:
    """Where a cell comes, the smallest first: the cheap ones tell most for their time.

    Among cells of a like cost, to a factor of ten, those of distribution matching come first: they
    are what the table is about, and each further rival only says what they are better than.
    """
    return math.floor(math.log10(max(work, 1))), not is_dm, work

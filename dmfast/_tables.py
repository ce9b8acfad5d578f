# SPDX-License-Identifier: MIT
"""The tables that are reproduced, as data: what makes a cell's sets, and how they are evaluated.

A further table is an entry of :data:`TABLES`: sources (with another ``model`` among their options,
say), methods that evaluate these, and the paper's figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import paper
from ._sources import short_name
from .data import canonical_name
from .errors import InputError
from .gradient_matching import LOOPS, loops_of
from .paper import Reported
from .presets import preset

ALL = "all"  # in place of a number of images a class
_WILD = frozenset("*?[")
#: What a pass backward costs beside one forward, and what a gradient of gradients does.
_BACKWARD, _TWICE = 2, 6


@dataclass(frozen=True)
class Source:
    """What makes the sets of a cell.

    Attributes:
        kind: the command that does, ``condense`` or ``coreset``; or ``random`` or ``whole``, real
            images that the evaluation takes by itself.
        options: of the command, beyond those that all share.
        suffix: what is added to the name of the network, as ``BN``; the sets are evaluated with
            that network, too.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ""


@dataclass(frozen=True)
class Method:
    """One column of a table.

    Attributes:
        words: what it is, for people.
        source: a name of :attr:`Table.sources`; methods of the same source share its sets.
        column: of the paper's figures, None where it has none.
        evaluate: options of the evaluation, by data set and images a class.
    """

    words: str
    source: str
    column: str | None
    evaluate: Callable[[str, int], dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Cells, and the paper's figures of them.

    Attributes:
        datasets, ipcs: those of the paper; others are cells too where they are named.
        figures: by data set, images a class (None: all) and column.
    """

    title: str
    datasets: tuple[str, ...]
    ipcs: tuple[int, ...]
    sources: Mapping[str, Source]
    methods: Mapping[str, Method]
    figures: Mapping[tuple[str, int | None, str], Reported]

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
        pixels: of an image.
        smallest_class: its training images.
    """

    classes: int
    train_images: int
    test_images: int
    pixels: int
    smallest_class: int


def _siamese(dataset: str, ipc: int) -> dict[str, Any]:
    return {"dsa_strategy": preset(dataset, ipc).dsa_strategy}


def _plain(dataset: str, ipc: int) -> dict[str, Any]:
    return {"dsa_strategy": "none"}


def _as_dc(dataset: str, ipc: int) -> dict[str, Any]:
    """As its published script evaluates DC: three transforms for MNIST, else none and less long."""
    if dataset == "mnist":
        return {"dsa_strategy": "crop_scale_rotate"}
    return {"dsa_strategy": "none", "epochs": 300}


def _whole(dataset: str, ipc: int) -> dict[str, Any]:
    # An epoch of all is hundreds of updates, of a condensed set 1 to 20.
    return _siamese(dataset, ipc) | {"epochs": 50}


#: What selects real images by a network, and the paper's column of it.
SELECTED = {"herding": "herding", "k-center": None, "forgetting": "forgetting"}


def _real_images() -> dict[str, Method]:
    """Each with and without augmentation; the paper's rows seem to be without."""
    named: dict[str, tuple[str, str | None]] = {
        "random": ("random real images, others for each network", "random"),
        **{name: (f"real images, selected by {name}", SELECTED[name]) for name in SELECTED},
    }
    methods = {}
    for name, (words, column) in named.items():
        methods[name] = Method(words, name, column, _siamese)
        methods[f"{name}-no-augmentation"] = Method(
            f"{words}; networks trained without augmentation", name, column, _plain
        )
    return methods


#: What each adds to the name of a network.
_NORMS = {"instance-norm": "", "batch-norm": "BN"}

TABLES = {
    "table1": Table(
        title="Table 1: test accuracy, %",
        datasets=("mnist", "cifar10", "cifar100", "tiny-imagenet"),
        ipcs=(1, 10, 50),
        sources={
            "dm": Source("condense", {"method": "dm"}),
            "dc": Source("condense", {"method": "dc"}),
            "dsa": Source("condense", {"method": "dsa"}),
            "random": Source("random"),
            **{name: Source("coreset", {"method": name}) for name in SELECTED},
            "whole": Source("whole"),
        },
        methods={
            "dm": Method("distribution matching", "dm", "dm", _siamese),
            **_real_images(),
            "dc": Method(
                "gradient matching, evaluated as its own script does: MNIST with crop, scale and "
                "rotate, other sets without augmentation for 300 epochs",
                "dc",
                "dc",
                _as_dc,
            ),
            # The paper's figure of DC is of the other evaluation.
            "dc-dsa-augmentation": Method(
                "the same sets, evaluated as those of DSA are", "dc", None, _siamese
            ),
            "dsa": Method("gradient matching with Siamese augmentation", "dsa", "dsa", _siamese),
            "whole": Method("all real images, 50 epochs of them", "whole", "whole", _whole),
        },
        figures=paper.TABLE1,
    ),
    "table2": Table(
        title="Table 2: instance and batch norm, test accuracy, %",
        datasets=("cifar10", "cifar100", "tiny-imagenet"),
        ipcs=(50,),
        sources={
            f"{method}-{norm}": Source("condense", {"method": method}, suffix)
            for norm, suffix in _NORMS.items()
            for method in ("dsa", "dm")
        },
        methods={
            f"{method}-{norm}": Method(
                f"{words}, {norm.replace('-', ' ')} in condensing and in evaluation",
                f"{method}-{norm}",
                f"{method}-{norm}",
                _siamese,
            )
            for norm in _NORMS
            for method, words in (
                ("dsa", "gradient matching with Siamese augmentation"),
                ("dm", "distribution matching"),
            )
        },
        figures=paper.TABLE2,
    ),
}


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
    if _WILD.isdisjoint(dataset_part):
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


def condensing_work(method: str, facts: Facts, ipc: int, batch_real: int) -> float:
    """What an iteration forwards, in images of 32x32 pixels; a pass backward counts as two."""
    batch = min(batch_real, facts.train_images // facts.classes)
    if method == "dm":
        images = facts.classes * (batch + (1 + _BACKWARD) * ipc)
    else:
        loops = loops_of(ipc, None, None)
        each = (1 + _BACKWARD) * batch + (1 + _BACKWARD + _TWICE) * ipc
        inner = (loops.outer - 1) * loops.inner * (1 + _BACKWARD) * ipc
        images = facts.classes * (loops.outer * each + inner)
    return images * _area(facts)


def training_work(images: int, epochs: int, facts: Facts) -> float:
    """The same of a network that is trained for epochs 0 to ``epochs``."""
    return (1 + _BACKWARD) * images * (epochs + 1) * _area(facts)


def testing_work(facts: Facts) -> float:
    """The same of a network that is tested."""
    return facts.test_images * _area(facts)


def _area(facts: Facts) -> float:
    return facts.pixels / 32**2


def rank(is_dm: bool, work: float) -> tuple[int, bool, float]:
    """Where a cell comes, the smallest first: the cheap ones tell most for their time.

    Among cells of a like cost, to a factor of ten, those of distribution matching come first: they
    are what the table is about, and each further rival only says what they are better than.
    """
    return math.floor(math.log10(max(work, 1))), not is_dm, work

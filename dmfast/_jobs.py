# SPDX-License-Identifier: MIT
"""A cell of a table at work: what of it is done, what is left, doing it, and what came of it.

All of it is in folders of the commands that do it, so whatever was done is found again: the sets
where :mod:`dmfast._making` has them, and

======================================= ==========================================================
SET/IPC/METHOD/seedN                    the evaluation; of a condensation in N-iterations below
======================================= ==========================================================
"""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import evaluate, networks, paper
from ._budget import Key, Size, Work
from ._cells import ALL, Cell, Facts, Table, cost_of, testing_work, training_work
from ._making import (
    PROTOCOL,
    Made,
    Pool,
    command_of,
    count,
    maker_of,
    model_option,
    read_json,
    shared_options,
    span,
    training_key,
    usual_network,
)
from ._sets import KNOWN
from .data import load as load_data
from .errors import InputError
from .evaluate import EvaluateConfig
from .paper import Reported

if TYPE_CHECKING:
    from .reproduce import TableConfig

#: Networks from which the rate of training is taken: several at once are faster, each, than one.
_PROBED_NETWORKS = 5


def facts_of(dataset: str, config: TableConfig, specs: Collection[str] = ("{}",)) -> Facts:
    """What is to be known of a set.

    Args:
        specs: of the networks of its cells, as :mod:`dmfast._cells` has them.

    Raises:
        InputError: the set cannot be used, or not with one of the networks.
    """
    try:
        data = load_data(dataset, config.data_root, cache=config.cache, download=config.download)
    except InputError as error:
        if config.only:
            raise
        raise InputError(f"{error} (or --only names cells of other sets)") from error
    usual = usual_network(dataset, config.model)
    costs = {}
    for name in dict.fromkeys(spec.format(usual) for spec in specs):
        (row,) = networks.table([name], data.channels, data.classes, data.size)
        costs[name] = cost_of(row["flop"])
    return Facts(
        classes=data.classes,
        train_images=len(data.train_labels),
        test_images=len(data.test_labels),
        smallest_class=int(data.by_class()[1].diff().min()),
        costs=costs,
    )


@dataclass(frozen=True)
class _Done:
    """How far the set of one seed is.

    Attributes:
        networks: evaluated, by the iterations that the set had.
    """

    made: Made
    networks: dict[int, int]


class CellJobs:
    """One cell, with the options of the table that it is in."""

    def __init__(
        self, table: Table, cell: Cell, config: TableConfig, out: Path, facts: Facts
    ) -> None:
        self.cell, self._config, self._out, self._facts = cell, config, out, facts
        self._table = table
        #: In words, why it was not run, or not run further.
        self.reason: str | None = None
        self._method = table.methods[cell.method]
        source = table.sources[self._method.source]
        self._whole = source.kind == "whole"
        self._maker = maker_of(self._method.source, source, cell, config, out, facts)
        spec = self._method.network or source.network
        self._model = spec.format(usual_network(cell.dataset, config.model))
        self._model_option = model_option(spec, cell.dataset, config)
        self._options = dict(self._method.evaluate(cell.dataset, cell.ipc or 1))
        usual_epochs = self._options.get("epochs", PROTOCOL.epochs)
        if config.epochs is not None:
            self._options["epochs"] = config.epochs
        self._epochs: int = self._options.get("epochs", PROTOCOL.epochs)
        #: The form that the options ask for, and the paper's.
        self.asked = self._size(config.sets, config.networks, self._maker.iterations)
        full = self._size(paper.SETS, paper.NETWORKS, self._maker.paper_iterations)
        in_paper = usual_network(cell.dataset, None)
        self._full = {
            "sets": full.sets,
            "networks": full.networks,
            "iterations": full.iterations,
            "epochs": usual_epochs,
            "model": spec.format(in_paper),
            "condensed_on": source.network.format(in_paper) if full.iterations else None,
        }

    def _size(self, sets: int, networks: int, iterations: int) -> Size:
        # There is only one set of all images.
        return Size(1 if self._whole else sets, networks, iterations)

    @property
    def is_dm(self) -> bool:
        return self._maker.is_dm

    @property
    def pool(self) -> Pool | None:
        """Of whose networks its sets are made."""
        return self._maker.pool

    def hindrance(self) -> str | None:
        """Why its sets cannot be made, in words for the table."""
        return self._maker.hindrance()

    @property
    def _condenses(self) -> bool:
        return self._maker.iterations > 0

    @property
    def _training_images(self) -> int:
        if self.cell.ipc is None:
            return self._facts.train_images
        return self._facts.classes * self.cell.ipc

    # What is there and what is left.

    def _evaluation_folder(self, number: int, iterations: int) -> Path:
        folder = self._out / self.cell.folder() / f"seed{self._maker.seed(number)}"
        return folder / f"{iterations}-iterations" if self._condenses else folder

    def _done(self, number: int) -> _Done:
        networks = {at: len(found["accuracies"]) for at, found in self._evaluations(number).items()}
        return _Done(self._maker.made(number), networks)

    def _evaluations(self, number: int) -> dict[int, dict[str, Any]]:
        """What was evaluated of a set, by the iterations that it had, the most first."""
        folder = self._out / self.cell.folder() / f"seed{self._maker.seed(number)}"
        if self._condenses:
            return evaluations_by_iterations(folder)
        found = _read_evaluation(folder)
        return {0: found} if found else {}

    def works(self) -> Callable[[Size], list[Work]]:
        """A function that says what is left to do for a size, from what is done at present."""
        if self.hindrance() is not None:
            return lambda size: []
        done = [self._done(number) for number in range(self.asked.sets)]
        return lambda size: [
            work for one in done[: size.sets] for work in self._works_of(one, size)
        ]

    def works_of_set(self, number: int, size: Size) -> list[Work]:
        """What is left to do for one set, which can be made."""
        return list(self._works_of(self._done(number), size))

    @property
    def whole_work(self) -> float:
        """What the cell is by itself, before any of it is done."""
        nothing = _Done(Made(), {})
        return self.asked.sets * sum(work for _, work in self._works_of(nothing, self.asked))

    @property
    def is_left(self) -> bool:
        """Whether there is anything to do."""
        return any(work for _, work in self.works()(self.asked))

    def _works_of(self, done: _Done, size: Size) -> Iterator[Work]:
        iterations = max(size.iterations, done.made.iterations)
        yield from self._maker.works(done.made, iterations)
        networks = max(size.networks - done.networks.get(iterations, 0), 0)
        key = training_key(self.cell.dataset, self._training_images, self._model)
        yield key, networks * self._network_work(self._training_images, self._epochs, self._model)

    def _network_work(self, images: int, epochs: int, model: str) -> float:
        cost = self._facts.costs[model]
        return training_work(images, epochs, cost) + testing_work(self._facts, cost)

    # Measuring rates.

    def probes(self) -> Iterator[tuple[Key, Callable[[], float]]]:
        """For each kind of work that is left: what does a little of it and says how much.

        Of a condensation these are its first iterations, which count; networks are trained for
        some epochs and thrown away.
        """
        if (probe := self._maker.probe()) is not None:
            key, iterations, work = probe

            def made() -> float:
                self._maker.make(0, iterations)
                return work

            yield key, made
        yield self._training_probe(self._training_images, self._model, self._model_option)
        if self._maker.trains_on:
            yield self.probe_of_training(self._maker.trains_on)

    def probe_of_training(self, images: int) -> tuple[Key, Callable[[], float]]:
        """The same of networks of the kind that the sets are made with, on real images."""
        return self._training_probe(images, self._maker.model, self._maker.model_option)

    def _training_probe(
        self, images: int, model: str, option: str | None
    ) -> tuple[Key, Callable[[], float]]:
        key = training_key(self.cell.dataset, images, model)
        return key, partial(self._train_a_little, images, model, option)

    def _train_a_little(self, images: int, model: str, option: str | None) -> float:
        facts = self._facts
        ipc = min(math.ceil(min(images, PROTOCOL.batch) / facts.classes), facts.smallest_class)
        images = ipc * facts.classes
        # As long as the test takes, so that both count.
        epochs = min(self._epochs, max(facts.test_images // (3 * images), 1))
        networks = min(self.asked.networks, _PROBED_NETWORKS)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            evaluate.run(
                EvaluateConfig(
                    baseline="random",
                    dataset=self.cell.dataset,
                    ipc=ipc,
                    model=option,
                    networks=networks,
                    epochs=epochs,
                    dsa_strategy=self._options["dsa_strategy"],
                    out=folder,
                    **shared_options(self._config),
                )
            )
        return networks * self._network_work(images, epochs, model)

    # Doing it.

    def make(self, number: int, iterations: int) -> None:
        """Makes a set, as far as it is not there."""
        self._maker.make(number, iterations)

    def evaluate(self, number: int, networks: int) -> None:
        """Evaluates a set that is made, as far as that was not done."""
        done = self._done(number)
        # What there is more of is not thrown away.
        networks = max(networks, done.networks.get(done.made.iterations, 0))
        config = self._evaluate_config(number, networks, done.made.iterations)
        evaluate.run(config, command=command_of("dmfast.evaluate", config, "set"))

    def _evaluate_config(self, number: int, networks: int, iterations: int) -> EvaluateConfig:
        options = {
            **self._options,
            "dataset": self.cell.dataset,
            "model": self._model_option,
            "networks": networks,
            "seed": self._maker.seed(number),
            "out": str(self._evaluation_folder(number, iterations)),
        }
        options |= self._maker.to_evaluate(number) | shared_options(self._config)
        return EvaluateConfig(**options)

    # What came of it.

    def row(self) -> dict[str, Any]:
        """The cell as the table's file has it, from what is on the disk."""
        sets = self._results()
        figure = self._figure()
        row: dict[str, Any] = {
            "cell": self.cell.name,
            "dataset": self.cell.dataset,
            "images_per_class": self.cell.ipc or ALL,
            "method": self.cell.method,
            "words": self._method.words,
            "paper": None if figure is None else vars(figure),
            "full": self._full,
            "reason": self.reason,
            "sets": sets,
            **self._maker.facts(),
        }
        if not sets:
            return row
        of_all = [accuracy for found in sets for accuracy in found["accuracies"]]
        means = [statistics.fmean(found["accuracies"]) for found in sets]
        return row | {
            "accuracy_mean": statistics.fmean(of_all),
            "accuracy_std": statistics.pstdev(of_all),  # as published
            "std_between_sets": statistics.pstdev(means) if len(sets) > 1 else None,
            "shortened": self._shortened(sets),
            "commands": self._commands(sets[0]),
        }

    def _results(self) -> list[dict[str, Any]]:
        """What is known of each set, also of more than are asked for.

        All of the same iterations, the most that any was evaluated after: what differs in them is
        not to be in the spread.
        """
        evaluations = [self._evaluations(number) for number in range(self.asked.sets)]
        while more := self._evaluations(len(evaluations)):
            evaluations.append(more)
        most = max((at for found in evaluations for at in found), default=0)
        return [
            self._result(number, most, found[most])
            for number, found in enumerate(evaluations)
            if most in found
        ]

    def _result(self, number: int, iterations: int, found: dict[str, Any]) -> dict[str, Any]:
        kept = ("accuracies", "networks", "epochs", "augmentation", "model", "precision")
        return {
            "seed": self._maker.seed(number),
            "iterations": iterations if self._condenses else None,
            **{key: found[key] for key in kept},
            "seconds_making": self._maker.seconds(number, iterations),
            "seconds_evaluating": found["seconds"],
            "machine": found["machine"],
            "versions": found["versions"],
        }

    def _shortened(self, sets: list[dict[str, Any]]) -> list[str]:
        """In what the cell is less than the paper's, in words."""
        full, words = self._full, []
        if len(sets) < full["sets"]:
            words.append(count(len(sets), "set"))
        for what in ("networks", "iterations", "epochs"):
            there = [found[what] or 0 for found in sets]
            if min(there) < full[what]:
                words.append(f"{span(there)} {what[:-1] if max(there) == 1 else what}")
        networks = {(found["model"], full["model"]) for found in sets}
        if full["condensed_on"] is not None:
            networks.add((self._maker.model, full["condensed_on"]))
        words += [
            f"{ours} in place of {paper}" for ours, paper in sorted(networks) if ours != paper
        ]
        return words + self._maker.shortened()

    def _figure(self) -> Reported | None:
        """The paper's, if it is of the same images."""
        known = KNOWN.get(self.cell.dataset)
        # The first classes of TinyImageNet go by its name, too.
        if known is None or known.classes != self._facts.classes:
            return None
        key = (self.cell.dataset, self.cell.ipc, self._method.column or "")
        return self._table.figures.get(key)

    def _commands(self, found: dict[str, Any]) -> list[str]:
        """Those that make the same set and evaluate it, by themselves."""
        number, iterations = found["seed"] - self._config.seed, found["iterations"] or 0
        evaluation = self._evaluate_config(number, found["networks"], iterations)
        made_by = self._maker.commands(number, iterations)
        return [*made_by, command_of("dmfast.evaluate", evaluation, "set")]


def evaluations_by_iterations(folder: Path) -> dict[int, dict[str, Any]]:
    """What is in folders named as ``300-iterations``, the most iterations first."""
    numbers = (path.name.partition("-")[0] for path in folder.glob("*-iterations"))
    found = {
        number: _read_evaluation(folder / f"{number}-iterations")
        for number in sorted(map(int, filter(str.isdecimal, numbers)), reverse=True)
    }
    return {number: evaluation for number, evaluation in found.items() if evaluation}


def _read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The evaluation of most networks in a folder, if there is one of any."""
    names = ("evaluation.json", "evaluation.partial.json")
    found = [content for name in names if (content := read_json(folder / name))]
    found = [c for c in found if isinstance(c.get("accuracies"), list) and c["accuracies"]]
    return max(found, key=lambda content: len(content["accuracies"]), default=None)

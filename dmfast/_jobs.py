# SPDX-License-Identifier: MIT
"""A cell of a table at work: what of it is done, what is left, doing it, and what came of it.

All of it is in folders of the commands that do it, so whatever was done is found again:

======================================= ==========================================================
SET/IPC/SOURCE/seedN                    a condensation or a coreset; coresets of a set and a seed
                                        take the network of that of :func:`trainer_of`
SET/IPC/METHOD/seedN                    the evaluation; of a condensation in N-iterations below
======================================= ==========================================================
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shlex
import statistics
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import condense, coreset, evaluate, paper
from ._budget import Key, Size, Work
from ._sets import KNOWN
from ._tables import (
    ALL,
    Cell,
    Facts,
    Table,
    condensing_work,
    testing_work,
    training_work,
)
from .condense import CondenseConfig
from .coreset import CoresetConfig
from .data import load as load_data
from .errors import InputError
from .evaluate import EvaluateConfig
from .networks import get_network
from .paper import Reported
from .presets import Preset, preset
from .runs import RunFolder
from .training import PROTOCOLS

if TYPE_CHECKING:
    from .reproduce import TableConfig

_PROTOCOL = PROTOCOLS["published"]
_CORESET_EPOCHS = 200  # as dmfast.coreset's
#: Iterations of a condensation from which its rate is taken.
_PROBED = {"dm": 20, "dc": 2, "dsa": 2}
#: Networks from which that of training is: several at once are faster, each, than one.
_PROBED_NETWORKS = 5


def facts_of(dataset: str, config: TableConfig, suffixes: Collection[str] = ("",)) -> Facts:
    """What is to be known of a set.

    Args:
        suffixes: of the networks that its cells are made with.

    Raises:
        InputError: the set cannot be used, or not with the model that is asked for.
    """
    try:
        data = load_data(dataset, config.data_root, cache=config.cache, download=config.download)
    except InputError as error:
        if config.only:
            raise
        raise InputError(f"{error} (or --only names cells of other sets)") from error
    if config.model is not None:
        for suffix in suffixes:
            get_network(config.model + suffix, data.channels, data.classes, data.size, 0)
    height, width = data.size
    return Facts(
        classes=data.classes,
        train_images=len(data.train_labels),
        test_images=len(data.test_labels),
        pixels=height * width,
        smallest_class=int(data.by_class()[1].diff().min()),
    )


def trainer_of(dataset: str) -> Cell:
    """The coreset that trains the network for all of a set and a seed.

    Without augmentation, as forgetting is counted; the others compare its embeddings.
    """
    return Cell(dataset, 1, "forgetting")


@dataclass(frozen=True)
class _Done:
    """How far the set of one seed is.

    Attributes:
        iterations: of its condensation.
        made: whether there is nothing more to choose, of a coreset.
        networks: evaluated, by the iterations that the set had.
    """

    iterations: int
    made: bool
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
        self._source = table.sources[self._method.source]
        ipc = cell.ipc or 1
        self._matched = self._source.options.get("method", "dm") if self._condenses else "dm"
        self._options = dict(self._method.evaluate(cell.dataset, ipc))
        usual_epochs = self._options.get("epochs", _PROTOCOL.epochs)
        if config.epochs is not None:
            self._options["epochs"] = config.epochs
        self._epochs: int = self._options.get("epochs", _PROTOCOL.epochs)
        #: The form that the options ask for, and the paper's.
        self.asked = self._size(config.sets, config.networks, self._preset.iterations)
        if config.iterations is not None and self.asked.iterations:
            self.asked = replace(self.asked, iterations=config.iterations)
        in_paper = preset(cell.dataset, ipc, method=self._matched)
        full = self._size(paper.SETS, paper.NETWORKS, in_paper.iterations)
        self._full = {
            "sets": full.sets,
            "networks": full.networks,
            "iterations": full.iterations,
            "epochs": usual_epochs,
            "model": in_paper.model + self._source.suffix,
        }

    def _size(self, sets: int, networks: int, iterations: int) -> Size:
        # There is only one set of all images.
        sets = 1 if self._source.kind == "whole" else sets
        return Size(sets, networks, iterations if self._condenses else 0)

    @property
    def _condenses(self) -> bool:
        return self._source.kind == "condense"

    @property
    def _preset_name(self) -> str:
        """Presets other than the paper's are of distribution matching."""
        return self._config.preset if self.is_dm else "paper"

    @property
    def _preset(self) -> Preset:
        ipc = self.cell.ipc or 1
        return preset(self.cell.dataset, ipc, self._preset_name, self._matched, self._model)

    @property
    def _model(self) -> str | None:
        """The network of the cell, None for the usual one of its set."""
        suffix, model = self._source.suffix, self._config.model
        if model is None and suffix:
            model = preset(self.cell.dataset, 1).model
        return None if model is None else model + suffix

    @property
    def _training_images(self) -> int:
        if self.cell.ipc is None:
            return self._facts.train_images
        return self._facts.classes * self.cell.ipc

    # What is there and what is left.

    def _seed(self, number: int) -> int:
        return self._config.seed + number

    def _set_folder(self, number: int) -> Path:
        folder = self._out / self.cell.folder(self._method.source)
        return folder / f"seed{self._seed(number)}"

    def _trainer_folder(self, number: int) -> Path:
        trainer = trainer_of(self.cell.dataset)
        return self._out / trainer.folder() / f"seed{self._seed(number)}"

    def _evaluation_folder(self, number: int, iterations: int) -> Path:
        folder = self._out / self.cell.folder() / f"seed{self._seed(number)}"
        return folder / f"{iterations}-iterations" if self._condenses else folder

    def _done(self, number: int) -> _Done:
        iterations, made, folder = 0, True, self._set_folder(number)
        if self._condenses:
            iterations, _ = RunFolder(folder).read_progress()
        elif self._source.kind == "coreset":
            made = (_read_json(folder / "coreset.json") or {}).get("indices") is not None
        networks = {at: len(found["accuracies"]) for at, found in self._evaluations(number).items()}
        return _Done(iterations, made, networks)

    def _evaluations(self, number: int) -> dict[int, dict[str, Any]]:
        """What was evaluated of a set, by the iterations that it had, the most first."""
        folder = self._out / self.cell.folder() / f"seed{self._seed(number)}"
        if self._condenses:
            return evaluations_by_iterations(folder)
        found = _read_evaluation(folder)
        return {0: found} if found else {}

    def works(self) -> Callable[[Size], list[Work]]:
        """A function that says what is left to do for a size, from what is done at present."""
        done = [self._done(number) for number in range(self.asked.sets)]
        trained = [
            (self._trainer_folder(number) / "features.safetensors").exists()
            for number in range(self.asked.sets)
        ]

        def of(size: Size) -> list[Work]:
            works: list[Work] = []
            for number in range(size.sets):
                works += self._works_of(done[number], trained[number], size)
            return works

        return of

    def works_of_set(self, number: int, size: Size) -> list[Work]:
        """What is left to do for one set."""
        trained = (self._trainer_folder(number) / "features.safetensors").exists()
        return list(self._works_of(self._done(number), trained, size))

    @property
    def whole_work(self) -> float:
        """What the cell is by itself, before any of it is done."""
        nothing = _Done(0, self._source.kind != "coreset", {})
        works = self._works_of(nothing, False, self.asked)
        return self.asked.sets * sum(work for _, work in works)

    @property
    def is_left(self) -> bool:
        """Whether there is anything to do."""
        return any(work for _, work in self.works()(self.asked))

    @property
    def is_dm(self) -> bool:
        return self._condenses and self._matched == "dm"

    def _works_of(self, done: _Done, trained: bool, size: Size) -> Iterator[Work]:
        iterations = max(size.iterations, done.iterations)
        yield self._making_key, (iterations - done.iterations) * self._iteration_work
        if not done.made and not trained:
            yield self._training_key(self._facts.train_images), self._trainer_work
        networks = max(size.networks - done.networks.get(iterations, 0), 0)
        yield self._training_key(self._training_images), networks * self._network_work

    @property
    def _making_key(self) -> Key:
        kind = f"condensing by {self._matched}"
        return (kind, self.cell.dataset, str(self.cell.ipc), self._model or "")

    def _training_key(self, images: int) -> Key:
        # Batches are what the rate depends on, and no batch is larger than all images.
        batch = str(min(images, _PROTOCOL.batch))
        return ("training", self.cell.dataset, batch, self._model or "")

    @property
    def _iteration_work(self) -> float:
        if not self._condenses:
            return 0.0
        batch = self._preset.batch_real
        return condensing_work(self._matched, self._facts, self.cell.ipc or 1, batch)

    @property
    def _network_work(self) -> float:
        return training_work(self._training_images, self._epochs, self._facts) + testing_work(
            self._facts
        )

    @property
    def _trainer_work(self) -> float:
        epochs = self._config.coreset_epochs
        return training_work(
            self._facts.train_images, _CORESET_EPOCHS if epochs is None else epochs, self._facts
        )

    # Measuring rates.

    def probes(self) -> Iterator[tuple[Key, Callable[[], float]]]:
        """For each kind of work that is left: what does a little of it and says how much.

        Of a condensation these are its first iterations, which count; networks are trained for
        some epochs and thrown away.
        """
        done = self._done(0)
        probed = min(_PROBED[self._matched], self.asked.iterations - done.iterations)
        if probed > 0:

            def condensed() -> float:
                self._condense(0, done.iterations + probed)
                return probed * self._iteration_work

            yield self._making_key, condensed
        sizes = [self._training_images]
        if self._source.kind == "coreset":
            sizes.append(self._facts.train_images)
        for images in sizes:
            yield self._training_key(images), partial(self._train_a_little, images)

    def _train_a_little(self, images: int) -> float:
        facts = self._facts
        ipc = min(math.ceil(min(images, _PROTOCOL.batch) / facts.classes), facts.smallest_class)
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
                    networks=networks,
                    epochs=epochs,
                    dsa_strategy=self._options["dsa_strategy"],
                    out=folder,
                    **self._shared,
                )
            )
        return networks * (training_work(images, epochs, facts) + testing_work(facts))

    # Doing it.

    @property
    def _shared(self) -> dict[str, Any]:
        config = self._config
        names = ("data_root", "precision", "device", "cache", "download")
        shared = {name: getattr(config, name) for name in names}
        return shared | ({} if self._model is None else {"model": self._model})

    def make(self, number: int, iterations: int) -> None:
        """Makes a set, as far as it is not there."""
        if self._condenses:
            self._condense(number, max(iterations, self._done(number).iterations))
        elif self._source.kind == "coreset":
            for config in self._coreset_configs(number):
                coreset.run(config, command=command_of("dmfast.coreset", config, "method"))

    def evaluate(self, number: int, networks: int) -> None:
        """Evaluates a set that is made, as far as that was not done."""
        done = self._done(number)
        # What there is more of is not thrown away.
        networks = max(networks, done.networks.get(done.iterations, 0))
        config = self._evaluate_config(number, networks, done.iterations)
        evaluate.run(config, command=command_of("dmfast.evaluate", config, "set"))

    def _condense(self, number: int, iterations: int) -> None:
        condense.run(self._condense_config(number, iterations))

    def _condense_config(self, number: int, iterations: int) -> CondenseConfig:
        folder = self._set_folder(number)
        options = {
            "dataset": self.cell.dataset,
            "ipc": self.cell.ipc,
            "iterations": iterations,
            "preset": self._preset_name,
            "seed": self._seed(number),
            "out": str(folder),
            "resume": RunFolder(folder).holds_run(),
        }
        return CondenseConfig(**options | self._shared | dict(self._source.options))

    def _coreset_configs(self, number: int) -> list[CoresetConfig]:
        """The coreset, and before it the one that trains its network, where it has none."""
        shared = self._shared | {"dataset": self.cell.dataset, "seed": self._seed(number)}
        of_network = {"epochs": self._config.coreset_epochs, "model": shared.pop("model", None)}
        folder, trainer = self._set_folder(number), self._trainer_folder(number)
        trains = trainer_of(self.cell.dataset)
        first = CoresetConfig(
            trains.method, ipc=trains.ipc or 1, out=str(trainer), **of_network, **shared
        )
        if folder == trainer:
            return [first]
        # The network is read from the folder: its options are not to be given again.
        assert self.cell.ipc is not None
        own = CoresetConfig(
            **self._source.options,
            ipc=self.cell.ipc,
            out=str(folder),
            trained=str(trainer),
            **shared,
        )
        return [first, own]

    def _evaluate_config(self, number: int, networks: int, iterations: int) -> EvaluateConfig:
        options = {
            **self._options,
            "dataset": self.cell.dataset,
            "networks": networks,
            "seed": self._seed(number),
            "out": str(self._evaluation_folder(number, iterations)),
        }
        if self._source.kind == "random":
            options |= {"baseline": "random", "ipc": self.cell.ipc}
        elif self._source.kind == "whole":
            options["whole"] = True
        else:
            options["set"] = str(self._set_folder(number))
        return EvaluateConfig(**options | self._shared)

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
            "seed": self._seed(number),
            "iterations": iterations if self._condenses else None,
            **{key: found[key] for key in kept},
            "seconds_making": self._making_seconds(number, iterations),
            "seconds_evaluating": found["seconds"],
            "machine": found["machine"],
            "versions": found["versions"],
        }

    def _making_seconds(self, number: int, iterations: int) -> float | None:
        """Of a coreset without the training of a network that it shares."""
        folder = self._set_folder(number)
        if self._condenses:
            records = RunFolder(folder).read_metrics()
            times = [r["seconds"] for r in records if r["iteration"] == iterations and "loss" in r]
            return times[-1] if times else None
        if self._source.kind == "coreset":
            return (_read_json(folder / "coreset.json") or {}).get("seconds")
        return None

    def _shortened(self, sets: list[dict[str, Any]]) -> list[str]:
        """In what the cell is less than the paper's, in words."""
        full, words = self._full, []
        if len(sets) < full["sets"]:
            words.append(count(len(sets), "set"))
        for what in ("networks", "iterations", "epochs"):
            there = [found[what] or 0 for found in sets]
            if min(there) < full[what]:
                words.append(f"{span(there)} {what[:-1] if max(there) == 1 else what}")
        if self._preset_name != "paper":
            words.append(f"preset {self._preset_name}")
        models = {found["model"] for found in sets} - {full["model"]}
        words += [f"{model} in place of {full['model']}" for model in sorted(models)]
        epochs = self._config.coreset_epochs
        if self._source.kind == "coreset" and epochs is not None and epochs < _CORESET_EPOCHS:
            words.append(f"selected by a network of {count(epochs, 'epoch')}")
        return words

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
        commands = [command_of("dmfast.evaluate", evaluation, "set")]
        if self._condenses:
            config = replace(self._condense_config(number, iterations), resume=False)
            commands.insert(0, command_of("dmfast.condense", config))
        elif self._source.kind == "coreset":
            configs = self._coreset_configs(number)
            commands[:0] = [command_of("dmfast.coreset", each, "method") for each in configs]
        return commands


def span(numbers: list[int]) -> str:
    """``20``, or ``7 to 20`` where they differ."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def count(number: int, what: str) -> str:
    """As ``1 set`` or ``1,000 iterations``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def command_of(module: str, config: Any, positional: str = "") -> str:
    """The command line of a job with these options; what is as by default is left out."""
    words = ["python", "-m", module]
    for option in fields(config):
        value, flag = getattr(config, option.name), f"--{option.name.replace('_', '-')}"
        if option.default is not MISSING and value == option.default:
            continue
        if option.name == positional:
            words.insert(3, str(value))
        elif option.name == "cache":
            words.append("--no-cache")
        elif value is True:
            words.append(flag)
        else:
            words += [flag, str(value) or "none"]
    return shlex.join(words)


def evaluations_by_iterations(folder: Path) -> dict[int, dict[str, Any]]:
    """What is in folders named as ``300-iterations``, the most iterations first."""
    numbers = (path.name.partition("-")[0] for path in folder.glob("*-iterations"))
    found = {
        number: _read_evaluation(folder / f"{number}-iterations")
        for number in sorted(map(int, filter(str.isdecimal, numbers)), reverse=True)
    }
    return {number: evaluation for number, evaluation in found.items() if evaluation}


def _read_json(path: Path) -> dict[str, Any] | None:
    """What the file holds; None where it is not there or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The evaluation of most networks in a folder, if there is one of any."""
    names = ("evaluation.json", "evaluation.partial.json")
    found = [content for name in names if (content := _read_json(folder / name))]
    found = [c for c in found if isinstance(c.get("accuracies"), list) and c["accuracies"]]
    return max(found, key=lambda content: len(content["accuracies"]), default=None)

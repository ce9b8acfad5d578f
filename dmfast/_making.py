# SPDX-License-Identifier: MIT
"""What makes the sets of a cell: each kind of source at work, in folders of its command.

======================= ==========================================================================
SET/IPC/SOURCE/seedN    a condensation or a coreset; coresets of a set and a seed take the network
                        of that of :func:`trainer_of`
SET/pool                trained networks, from which the cells of a band draw theirs
======================= ==========================================================================
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import condense, coreset, pool, pretrain
from ._budget import Key, Work
from ._cells import Cell, Facts, Source, condensing_work, training_work
from ._sources import short_name
from ._tables import band_words
from .condense import CondenseConfig
from .coreset import CoresetConfig
from .errors import InputError
from .presets import Preset, preset
from .pretrain import PretrainConfig
from .runs import RunFolder
from .training import PROTOCOLS

if TYPE_CHECKING:
    from .reproduce import TableConfig

PROTOCOL = PROTOCOLS["published"]
_CORESET_EPOCHS = 200  # as dmfast.coreset's
_VALIDATION = 1000  # as dmfast.pretrain's
#: Iterations of a condensation from which its rate is taken.
_PROBED = {"dm": 20, "dc": 2, "dsa": 2}


def trainer_of(dataset: str) -> Cell:
    """The coreset that trains the network for all of a set and a seed.

    Without augmentation, as forgetting is counted; the others compare its embeddings.
    """
    return Cell(dataset, 1, "forgetting")


def usual_network(dataset: str, model: str | None) -> str:
    """The network that a table is about: ``model``, else the preset's."""
    return model or preset(dataset, 1).model


def shared_options(config: TableConfig) -> dict[str, Any]:
    """Those that every command of a table takes as they are."""
    names = ("data_root", "precision", "device", "cache", "download")
    return {name: getattr(config, name) for name in names}


def model_option(network: str, dataset: str, config: TableConfig) -> str | None:
    """The ``--model`` of a command whose network is given as in :mod:`dmfast._cells`."""
    if network == "{}":
        return config.model  # where there is none, each command knows the set's
    return network.format(usual_network(dataset, config.model))


def training_key(dataset: str, images: int, model: str) -> Key:
    """The kind of work that training a network on so many images is."""
    # Batches are what the rate depends on, and no batch is larger than all images.
    return ("training", dataset, str(min(images, PROTOCOL.batch)), model)


@dataclass(frozen=True)
class Made:
    """How far a set is.

    Attributes:
        iterations: of its condensation.
        complete: whether there is nothing more to choose, of a coreset.
        trained: whether there is the network that chooses.
    """

    iterations: int = 0
    complete: bool = False
    trained: bool = False


class Maker:
    """Makes the sets of a cell; as it is, of real images, which the evaluation takes by itself.

    Attributes:
        iterations: as many as are asked for, 0 where nothing iterates.
        paper_iterations: those of the paper.
        model, model_option: the network that sets are made with, and the ``--model`` that names it
            where it is not the set's.
        trains_on: how many images it trains networks on, 0 where it trains none.
        pool: from which its networks are drawn, None: they are random.
        is_dm: whether it matches distributions.
    """

    iterations = paper_iterations = 0
    trains_on = 0
    pool: Pool | None = None
    is_dm = False

    def __init__(
        self, name: str, source: Source, cell: Cell, config: TableConfig, out: Path, facts: Facts
    ) -> None:
        self.cell, self._source, self._config, self._out = cell, source, config, out
        self._facts = facts
        self._folder = out / cell.folder(name)
        self.model_option = model_option(source.network, cell.dataset, config)
        self.model = source.network.format(usual_network(cell.dataset, config.model))

    def seed(self, number: int) -> int:
        return self._config.seed + number

    def folder(self, number: int) -> Path:
        return self._folder / f"seed{self.seed(number)}"

    def made(self, number: int) -> Made:
        """How far a set is, from what is on the disk."""
        return Made()

    def works(self, made: Made, iterations: int) -> Iterator[Work]:
        """What is left to do for a set that is so far."""
        return iter(())

    def probe(self) -> tuple[Key, int, float] | None:
        """A kind of work that is to be measured: the iterations to go to and how much that is."""
        return None

    def hindrance(self) -> str | None:
        """Why no set can be made, in words for the table."""
        return None

    def make(self, number: int, iterations: int) -> None:
        """Makes a set, as far as it is not there."""

    def to_evaluate(self, number: int) -> dict[str, Any]:
        """The options by which :mod:`dmfast.evaluate` is given the set."""
        if self._source.kind == "whole":
            return {"whole": True}
        return {"baseline": "random", "ipc": self.cell.ipc}

    def commands(self, number: int, iterations: int) -> list[str]:
        """Those that make the same set, by themselves."""
        return []

    def seconds(self, number: int, iterations: int) -> float | None:
        """What a set took, without what it shares with others."""
        return None

    def shortened(self) -> list[str]:
        """In what its sets are less than the paper's, but for their number and iterations."""
        return []

    def facts(self) -> dict[str, Any]:
        """What a row of the table says beyond what all do."""
        return {}


class _Coreset(Maker):
    """Selects real images by a network that the coresets of a set and a seed share."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.trains_on = self._facts.train_images
        epochs = self._config.coreset_epochs
        self._epochs = _CORESET_EPOCHS if epochs is None else epochs
        self._trainer = trainer_of(self.cell.dataset)

    def _trainer_folder(self, number: int) -> Path:
        return self._out / self._trainer.folder() / f"seed{self.seed(number)}"

    def made(self, number: int) -> Made:
        chosen = read_json(self.folder(number) / "coreset.json") or {}
        trained = (self._trainer_folder(number) / "features.safetensors").exists()
        return Made(complete=chosen.get("indices") is not None, trained=trained)

    def works(self, made: Made, iterations: int) -> Iterator[Work]:
        if not (made.complete or made.trained):
            key = training_key(self.cell.dataset, self.trains_on, self.model)
            cost = self._facts.costs[self.model]
            yield key, training_work(self.trains_on, self._epochs, cost)

    def make(self, number: int, iterations: int) -> None:
        for config in self._configs(number):
            coreset.run(config, command=command_of("dmfast.coreset", config, "method"))

    def _configs(self, number: int) -> list[CoresetConfig]:
        """The coreset, and before it the one that trains its network, where it has none."""
        shared = shared_options(self._config)
        shared |= {"dataset": self.cell.dataset, "seed": self.seed(number)}
        folder, trainer = self.folder(number), self._trainer_folder(number)
        first = CoresetConfig(
            self._trainer.method,
            ipc=self._trainer.ipc or 1,
            out=str(trainer),
            epochs=self._config.coreset_epochs,
            model=self.model_option,
            **shared,
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

    def to_evaluate(self, number: int) -> dict[str, Any]:
        return {"set": str(self.folder(number))}

    def commands(self, number: int, iterations: int) -> list[str]:
        return [command_of("dmfast.coreset", each, "method") for each in self._configs(number)]

    def seconds(self, number: int, iterations: int) -> float | None:
        return (read_json(self.folder(number) / "coreset.json") or {}).get("seconds")

    def shortened(self) -> list[str]:
        if self._epochs >= _CORESET_EPOCHS:
            return []
        return [f"selected by a network of {count(self._epochs, 'epoch')}"]


class _Condensation(Maker):
    """Condenses, with random networks or with those of a pool."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._method: str = self._source.options.get("method", "dm")
        self.is_dm = self._method == "dm"
        #: Presets other than the paper's are of distribution matching.
        self._preset_name = self._config.preset if self.is_dm else "paper"
        self._ipc = self.cell.ipc or 1
        dataset, method = self.cell.dataset, self._method
        self._preset: Preset = preset(dataset, self._ipc, self._preset_name, method, self.model)
        self.iterations = self._config.iterations or self._preset.iterations
        self.paper_iterations = preset(dataset, self._ipc, method=method).iterations
        if self._source.band is not None:
            self.pool = Pool(self)

    @property
    def _key(self) -> Key:
        kind = f"condensing by {self._method}"
        return (kind, self.cell.dataset, str(self.cell.ipc), self.model)

    @property
    def _work(self) -> float:
        """Of an iteration."""
        batch, cost = self._preset.batch_real, self._facts.costs[self.model]
        return condensing_work(self._method, self._facts, self._ipc, batch, cost)

    def made(self, number: int) -> Made:
        iterations, _ = RunFolder(self.folder(number)).read_progress()
        return Made(iterations)

    def works(self, made: Made, iterations: int) -> Iterator[Work]:
        yield self._key, max(iterations - made.iterations, 0) * self._work

    def probe(self) -> tuple[Key, int, float] | None:
        done = self.made(0).iterations
        more = min(_PROBED[self._method], self.iterations - done)
        return (self._key, done + more, more * self._work) if more > 0 else None

    def hindrance(self) -> str | None:
        return None if self.pool is None else self.pool.hindrance()

    def make(self, number: int, iterations: int) -> None:
        iterations = max(iterations, self.made(number).iterations)
        condense.run(self._condense_config(number, iterations))

    def _condense_config(self, number: int, iterations: int) -> CondenseConfig:
        folder = self.folder(number)
        options = {
            "dataset": self.cell.dataset,
            "ipc": self.cell.ipc,
            "iterations": iterations,
            "preset": self._preset_name,
            "model": self.model_option,
            "seed": self.seed(number),
            "out": str(folder),
            "resume": RunFolder(folder).holds_run(),
        }
        if self.pool is not None:
            options |= {"networks_from": str(self.pool.folder), "band": self._source.band}
        return CondenseConfig(**options | shared_options(self._config) | dict(self._source.options))

    def to_evaluate(self, number: int) -> dict[str, Any]:
        return {"set": str(self.folder(number))}

    def commands(self, number: int, iterations: int) -> list[str]:
        config = replace(self._condense_config(number, iterations), resume=False)
        before = [] if self.pool is None else self.pool.commands()
        return [*before, command_of("dmfast.condense", config)]

    def seconds(self, number: int, iterations: int) -> float | None:
        records = RunFolder(self.folder(number)).read_metrics()
        times = [r["seconds"] for r in records if r["iteration"] == iterations and "loss" in r]
        return times[-1] if times else None

    def shortened(self) -> list[str]:
        return [] if self._preset_name == "paper" else [f"preset {self._preset_name}"]

    def facts(self) -> dict[str, Any]:
        return {} if self.pool is None else {"pool": self.pool.facts()}


class Pool:
    """The networks of a band, of those that are trained for all bands of a set, or given."""

    def __init__(self, maker: _Condensation) -> None:
        config, facts = maker._config, maker._facts
        dataset, band = maker.cell.dataset, maker._source.band
        assert band is not None
        self._band, self._out = band, maker._out / short_name(dataset)
        self._given, self._replaces = config.pool is not None, config.overwrite
        self.folder = self._out / "pool" if config.pool is None else Path(config.pool)
        self._pretrain = PretrainConfig(
            dataset=dataset,
            model=maker.model_option,
            networks=config.pool_networks,
            epochs=config.pool_epochs,
            # Of a small set, as many are kept apart as leave most to train on.
            validation=max(min(_VALIDATION, facts.train_images // 5), 1),
            seed=config.seed,
            out=str(self.folder),
            overwrite=config.overwrite,
            **shared_options(config),
        )
        #: How many images its networks are trained on.
        self.images = facts.train_images - self._pretrain.validation
        self._key = training_key(dataset, self.images, maker.model)
        cost, epochs = facts.costs[maker.model], self._pretrain.epochs
        tests = pretrain.count_tests(self.images, epochs) * self._pretrain.validation
        self._network_work = training_work(self.images, epochs, cost) + tests * cost

    @cached_property
    def _wanted(self) -> dict[str, Any]:
        return pretrain.describe(self._pretrain)

    def _read(self) -> tuple[dict[str, Any], list[pool.State]]:
        """What is there, which is nothing before the first network is trained."""
        if not (self._given or (self.folder / pool.DESCRIPTION).exists()):
            return {}, []
        try:
            return pool.read(self.folder)
        except InputError as error:
            if self._given:
                raise
            if self._replaces:
                return {}, []
            raise InputError(
                f"{self.folder} holds no pool of this program: --overwrite trains it anew, or "
                "choose another --out"
            ) from error

    def check(self) -> None:
        """Whether the table can draw from what is there.

        Raises:
            InputError: it cannot, and why.
        """
        there, states = self._read()
        if self._given:
            of = ("real_images", "model")
            wanted = {key: self._wanted[key] for key in of}
            if pretrain.differences({key: there.get(key) for key in of}, wanted):
                raise InputError(
                    f"--pool {self.folder}: its networks are {there.get('model')} trained on "
                    f"{there.get('dataset')}, not {wanted['model']} on {self._wanted['dataset']} "
                    "as it is here; name another"
                )
            for state in states:
                if not (self.folder / state.file).is_file():
                    raise InputError(f"--pool {self.folder}: {state.file} is missing; name another")
            return
        if not there:
            return
        others = pretrain.differences(there, self._wanted)
        if others and not self._replaces:
            raise InputError(
                f"{self.folder} holds another pool ({'; '.join(others)}): --overwrite begins anew; "
                "or choose another --out"
            )
        trained, asked = pool.count_networks(states), self._pretrain.networks
        fixed = trained > asked or (trained < asked and not self._replaces and self._is_used())
        if fixed and not others:
            raise InputError(
                f"{self.folder} has {count(trained, 'network')}, from which cells draw: give "
                f"--pool-networks {trained}, or choose another --out"
            )

    def _is_used(self) -> bool:
        """Whether there are sets condensed by its networks."""
        configs = map(read_json, self._out.glob("*/*/seed*/config.json"))
        options = [found.get("options", {}) for found in configs if found is not None]
        return any(found.get("networks_from") == str(self.folder) for found in options)

    @property
    def _missing(self) -> int:
        """How many networks are still to be trained."""
        if self._given:
            return 0
        there, states = self._read()
        if pretrain.differences(there, self._wanted):
            return self._pretrain.networks
        return max(self._pretrain.networks - pool.count_networks(states), 0)

    @property
    def work(self) -> Work:
        """What is left to do before a cell can draw from it."""
        return self._key, self._missing * self._network_work

    def make(self) -> None:
        """Trains what is missing."""
        pretrain.run(self._pretrain, command=command_of("dmfast.pretrain", self._pretrain))

    def _of_band(self, states: list[pool.State]) -> int:
        band = pool.parse_band(self._band)
        return sum(state.accuracy in band for state in states)

    def hindrance(self) -> str | None:
        """Why no cell can draw from it, as soon as all of it is there."""
        if self._missing or self._of_band(self._read()[1]):
            return None
        return f"not run: the pool has no network of {band_words(self._band)}"

    def facts(self) -> dict[str, Any]:
        """How many networks, their epochs, and states in the band; none of what is not there."""
        facts, states = self._read()
        return {
            "networks": pool.count_networks(states),
            "epochs": facts.get("epochs"),
            "states": self._of_band(states),
        }

    def commands(self) -> list[str]:
        """The one that trains it."""
        if self._given:
            return []
        config = replace(self._pretrain, overwrite=False)
        return [command_of("dmfast.pretrain", config)]


_KINDS = {"condense": _Condensation, "coreset": _Coreset, "random": Maker, "whole": Maker}


def maker_of(
    name: str, source: Source, cell: Cell, config: TableConfig, out: Path, facts: Facts
) -> Maker:
    """The one of a source, for a cell."""
    return _KINDS[source.kind](name, source, cell, config, out, facts)


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


def read_json(path: Path) -> dict[str, Any] | None:
    """What the file holds; None where it is not there or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None

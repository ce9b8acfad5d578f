# SPDX-License-Identifier: MIT
"""The paper's tables and figures on this machine, ours beside the paper's.

``python -m dmfast.reproduce table1``, ``python -m dmfast.reproduce figure4``; :func:`run` and
:func:`run_figure` for the same from Python. Every cell is made by the other commands in folders of
its own, so what was done is never done twice: killed at any moment, ``--resume`` goes on from
there, also to more sets, networks, iterations or cells.

In the folder of a table are ``table1.json`` and ``table1.md``, written anew after each cell, and
the folders of the cells (:mod:`dmfast._jobs`).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.reproduce")

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import cli, paper
from ._budget import Key, Rates, Size, allotment, parse_duration, shortened
from ._cells import Table, rank, select
from ._figure4 import DEFAULT_BUDGET, FIGURE_NAME, FigureConfig, parse_iterations, run_figure
from ._jobs import CellJobs, facts_of
from ._table_files import TableFiles, duration, size_words
from ._tables import TABLES
from .devices import PRECISIONS, machine, resolve_device
from .errors import InputError, check_out, choose
from .memory import keep_freed_pages
from .presets import PRESETS
from .runs import locked

__all__ = ["FigureConfig", "TableConfig", "run", "run_figure"]

_MAX_SEED = 2**63


@dataclass(frozen=True)
class TableConfig:
    """The options of a table, named as on the command line.

    ``only`` are patterns of cells as :func:`dmfast._cells.select` takes them, all cells where
    there are none. ``budget`` is a time such as ``40m``, None for as long as it takes. ``sets`` is
    how many are made for a cell, of the seeds from ``seed`` on. ``iterations``, ``epochs`` (of
    evaluated networks) and ``coreset_epochs`` (of the network by which real images are selected)
    are the paper's or the usual ones where None; ``preset`` is of distribution matching alone.
    ``pool`` is a folder of :mod:`dmfast.pretrain` for Table 4, which where None trains one of
    ``pool_networks`` for epochs 0 to ``pool_epochs``.

    Raises:
        InputError: on values out of range, or options that exclude each other.
    """

    table: str = "table1"
    only: tuple[str, ...] = ()
    budget: str | None = None
    sets: int = paper.SETS
    networks: int = paper.NETWORKS
    iterations: int | None = None
    epochs: int | None = None
    coreset_epochs: int | None = None
    pool: str | None = None
    pool_networks: int = 20
    pool_epochs: int = 10
    preset: str = "paper"
    model: str | None = None
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0
    data_root: str | None = None
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    cache: bool = True
    download: bool = False

    def __post_init__(self) -> None:
        choose("TABLE", self.table, TABLES)
        choose("--preset", self.preset, PRESETS)
        choose("--precision", self.precision, PRECISIONS)
        if self.budget is not None:
            parse_duration("--budget", self.budget)
        for name, low in (
            ("sets", 1),
            ("networks", 1),
            ("iterations", 1),
            ("epochs", 0),
            ("coreset_epochs", 0),
            ("pool_networks", 1),
            ("pool_epochs", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag} must be {low} or more, got {value}")
        if not 0 <= self.seed <= _MAX_SEED - self.sets:
            raise InputError(
                f"--seed must be from 0 to 2**63 - {self.sets}, the number of sets, got {self.seed}"
            )
        if self.pool is not None and not TABLES[self.table].has_bands:
            raise InputError(f"--pool: {self.table} has no bands of networks; leave it out")
        check_out(self.out)
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other: leave one out")


def run(
    config: TableConfig,
    *,
    command: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Does what ``python -m dmfast.reproduce table1`` does; returns what its JSON file holds.

    Cells are run in the order of what they cost (:func:`dmfast._cells.rank`). With a budget, each
    may take the time that :func:`dmfast._budget.allotment` gives it, by rates that are measured in
    this run; where that does not suffice it is shortened (:func:`dmfast._budget.shortened`), and
    where there is no time even for the smallest form it is not run. What has begun is finished, so
    the budget can be exceeded by what an estimate is wrong.

    Args:
        command: the command line to name in the files, if there was one.
        clock: seconds, of which differences count.

    Raises:
        InputError: an option or a data set cannot be used, or they do not fit what the folder
            holds. Cells that are done are kept.
    """
    started = clock()
    table = TABLES[config.table]
    cells = select(table, config.only)
    device = resolve_device(config.device)
    networks: dict[str, dict[str, None]] = {}
    for cell in cells:
        of_set = networks.setdefault(cell.dataset, {})
        of_set |= dict.fromkeys(table.networks_of(cell.method))
    facts = {name: facts_of(name, config, of_set) for name, of_set in networks.items()}
    out = Path(config.out or f"runs/{config.table}")
    jobs = [CellJobs(table, cell, config, out, facts[cell.dataset]) for cell in cells]
    jobs.sort(key=lambda each: rank(each.is_dm, each.whole_work))
    pools = {each.pool.folder: each.pool for each in jobs if each.pool is not None}
    for pool in pools.values():
        pool.check()
    with locked(out):
        files = TableFiles(out, config, command, machine(device))
        files.begin(jobs)
        try:
            _Session(jobs, files, config, started, clock).run()
        finally:
            files.write()
    print(f"{config.table}: {files.json}, {files.markdown}")
    return files.content()


class _Session:
    """A pass over the cells."""

    def __init__(
        self,
        jobs: Sequence[CellJobs],
        files: TableFiles,
        config: TableConfig,
        started: float,
        clock: Callable[[], float],
    ) -> None:
        self._jobs, self._files, self._clock = jobs, files, clock
        self._rates = Rates()
        self._end: float | None = None
        if config.budget is not None:
            self._end = started + parse_duration("--budget", config.budget)

    def run(self) -> None:
        for number, jobs in enumerate(self._jobs):
            try:
                self._run_cell(number, jobs)
            except InputError as error:
                raise InputError(f"{jobs.cell.name}: {error}") from error
            finally:
                self._files.put(jobs)

    def _run_cell(self, number: int, jobs: CellJobs) -> None:
        if not self._make_pool(number, jobs):
            return
        if (why := jobs.hindrance()) is not None:
            self._leave_out(jobs, why)
            return
        size, until = jobs.asked, None
        if self._end is not None and jobs.is_left:
            fit = self._fit(self._jobs[number:], self._end)
            if isinstance(fit, str):
                self._leave_out(jobs, fit)
                return
            size, until = fit
        print(f"{jobs.cell.name}: {size_words(size)}", flush=True)
        for one in range(size.sets):
            if until is not None and one > 0:
                needed = self._rates.seconds(jobs.works_of_set(one, size))
                if self._clock() + needed > until:
                    jobs.reason = "the time that it was given is over"
                    return
            self._measured(jobs, one, size, partial(jobs.make, one, size.iterations))
            self._measured(jobs, one, size, partial(jobs.evaluate, one, size.networks))

    def _leave_out(self, jobs: CellJobs, why: str) -> None:
        print(f"{jobs.cell.name}: {why}", flush=True)
        jobs.reason = why

    def _make_pool(self, number: int, jobs: CellJobs) -> bool:
        """Trains the networks that a cell and others draw from; whether the cell can be run."""
        pool = jobs.pool
        if pool is None or not pool.work[1]:
            return True
        if not jobs.is_left:  # of what was made before it was removed
            return False
        key, work = pool.work
        if self._end is not None:
            if key not in self._rates and self._clock() < self._end:
                self._probe(*jobs.probe_of_training(pool.images))
            left, needed = self._end - self._clock(), self._least(self._jobs[number:])[0]
            if needed > left:
                what = f"its pool of networks and {size_words(jobs.asked.smallest)}"
                self._leave_out(jobs, _too_long(left, what, needed))
                return False
        start = self._clock()
        pool.make()
        self._rates.measure(key, work, self._clock() - start)
        return True

    def _least(self, coming: Sequence[CellJobs]) -> list[float]:
        """Seconds of the smallest form of each, and of a pool for the first that draws from it."""
        pools: set[Path] = set()
        seconds = []
        for jobs in coming:
            works = jobs.works()(jobs.asked.smallest)
            if (pool := jobs.pool) is not None and pool.folder not in pools:
                pools.add(pool.folder)
                works.append(pool.work)
            seconds.append(self._rates.seconds(works))
        return seconds

    def _probe(self, key: Key, probe: Callable[[], float]) -> None:
        start = self._clock()
        self._rates.measure(key, probe(), self._clock() - start)

    def _measured(self, jobs: CellJobs, one: int, size: Size, job: Callable[[], None]) -> None:
        """Does a job, and takes note of its rate where it was work of a single kind."""
        before, start = jobs.works_of_set(one, size), self._clock()
        job()
        seconds, after = self._clock() - start, jobs.works_of_set(one, size)
        done: dict[Key, float] = {}
        for sign, works in ((1, before), (-1, after)):
            for key, work in works:
                done[key] = done.get(key, 0.0) + sign * work
        if len(done := {key: work for key, work in done.items() if work > 0}) == 1:
            ((key, work),) = done.items()
            self._rates.measure(key, work, seconds)

    def _fit(self, coming: Sequence[CellJobs], end: float) -> tuple[Size, float] | str:
        """The size of the first of the cells and when it is to end, or why it is not run."""
        jobs = coming[0]
        if (left := end - self._clock()) <= 0:
            return "not run: the budget is used up"
        # By a guess that is too low rather than too high.
        least = self._rates.seconds(jobs.works()(jobs.asked.smallest))
        if least <= left:
            for key, probe in jobs.probes():
                if key not in self._rates:
                    self._probe(key, probe)
            left = end - self._clock()
            leasts = self._least(coming)
            least, allowed = leasts[0], allotment(left, leasts)
            works = jobs.works()
            size = shortened(jobs.asked, lambda size: self._rates.seconds(works(size)), allowed)
            if size is not None:
                return size, self._clock() + allowed
        return _too_long(left, size_words(jobs.asked.smallest), least)


def _too_long(left: float, what: str, needed: float) -> str:
    return (
        f"not run: {duration(max(left, 0))} of the budget are left, and {what} would take about "
        f"{duration(needed)}"
    )


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "dmfast.reproduce", "The paper's tables and figures on this machine, beside the paper's."
    )
    commands = parser.add_subparsers(
        dest="what",
        metavar="WHAT",
        required=True,
        prog="dmfast.reproduce",
        help=f"{', '.join(TABLES)} or {FIGURE_NAME}; each has a --help of its own",
    )
    for name, table in TABLES.items():
        _add_table_options(commands.add_parser(name, description=f"{table.title}."), name, table)
    description = "Figure 4: test accuracy over the time of condensing, DM and DSA on one machine."
    _add_figure_options(commands.add_parser(FIGURE_NAME, description=description))
    return parser


def _add_table_options(parser: cli.Parser, name: str, table: Table) -> None:
    default = TableConfig
    methods = "; ".join(f"{key}: {method.words}" for key, method in table.methods.items())
    parser.add_argument(
        "--only",
        metavar="CELLS",
        action="append",
        help="SET/IPC/METHOD, as cifar10/10/METHOD, or the beginning of that, or with wildcards, "
        "as cifar10/*/dm*; several divided by commas, or the option again. SET: "
        f"{', '.join(table.datasets)}, or any other, known by name or a path; IPC: "
        f"{', '.join(map(str, table.ipcs))}, or any number of images a class, or all for whole; "
        "METHOD: " + methods.replace("%", "%%"),
    )
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="as 90s, 40m or 1.5h: cells that would take longer are made of fewer sets, then "
        "fewer networks, then fewer iterations, or not at all, and the table says so (default: as "
        "long as it takes)",
    )
    parser.add_argument(
        "--sets", metavar="N", type=int, default=default.sets, help="for a cell, of as many seeds"
    )
    parser.add_argument(
        "--iterations",
        metavar="N",
        type=int,
        help="updates of the images of each set, of every method (default: the preset: 20000, of "
        "dc and dsa 1000)",
    )
    if table.has_coresets:
        parser.add_argument(
            "--coreset-epochs",
            metavar="E",
            type=int,
            help="train the network by which real images are selected for epochs 0 to E (default: "
            "200)",
        )
    if table.has_bands:
        parser.add_argument(
            "--pool",
            metavar="DIR",
            help="trained networks, of python -m dmfast.pretrain (default: train some, for all "
            "cells of a set, and keep them)",
        )
        parser.add_argument(
            "--pool-networks",
            metavar="N",
            type=int,
            default=default.pool_networks,
            help="how many to train, where no pool is given",
        )
        parser.add_argument(
            "--pool-epochs",
            metavar="E",
            type=int,
            default=default.pool_epochs,
            help="train each for epochs 0 to E",
        )
    _add_shared_options(parser, default.networks, f"runs/{name}")


def _add_figure_options(parser: cli.Parser) -> None:
    default = FigureConfig
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default=default.dataset,
        help="a known name, a path or hf:owner/name",
    )
    parser.add_argument("--ipc", metavar="N", type=int, default=default.ipc, help="images a class")
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="for the condensing of each method, as 90s, 10m or 1.5h (default: "
        f"{DEFAULT_BUDGET}; without limit where --iterations are given)",
    )
    parser.add_argument(
        "--iterations",
        metavar="N,N,...",
        help="after which to evaluate, of both methods (default: 10, 30, 100, 300, ... up to "
        "20000, of dsa 1000)",
    )
    _add_shared_options(parser, default.networks, default.out)


def _add_shared_options(parser: cli.Parser, networks: int, out: str) -> None:
    default = TableConfig
    parser.add_data_root()
    parser.add_argument(
        "--networks", metavar="N", type=int, default=networks, help="trained on each set"
    )
    parser.add_argument(
        "--epochs",
        metavar="E",
        type=int,
        help="train each for epochs 0 to E (default: as published, 1000)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=default.preset,
        help="of distribution matching; "
        + "; ".join(f"{name}: {what}" for name, what in PRESETS.items()),
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the network, as ConvNetD4BN (default: the preset)"
    )
    parser.add_passes(PRECISIONS, default)
    parser.add_argument(
        "--seed", metavar="N", type=int, default=default.seed, help="of the draws of the first set"
    )
    parser.add_argument("--out", metavar="DIR", default=out, help="folder of all results")
    parser.add_argument(
        "--resume", action="store_true", help="go on with what is in the folder, and keep it"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="remove what this command left in the folder"
    )
    parser.add_loading()


def _main(arguments: Sequence[str]) -> None:
    options = vars(_parser().parse_args(arguments))
    what = options.pop("what")
    command = shlex.join(["python", "-m", "dmfast.reproduce", *arguments])
    keep_freed_pages()
    if what == FIGURE_NAME:
        options["iterations"] = parse_iterations(options["iterations"])
        run_figure(FigureConfig(**options), command=command)
        return
    patterns = ",".join(options.pop("only") or []).split(",")
    only = tuple(stripped for pattern in patterns if (stripped := pattern.strip()))
    run(TableConfig(what, only, **options), command=command)

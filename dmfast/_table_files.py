# SPDX-License-Identifier: MIT
"""A table as JSON and Markdown: ours beside the paper's, and how each figure came about."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import paper
from ._budget import Size
from ._cells import ALL, Cell
from ._jobs import CellJobs
from ._making import count, span, trainer_of
from ._sources import short_name
from ._tables import SELECTED, TABLES
from .devices import versions
from .errors import InputError
from .files import write_bytes
from .paper import Reported

if TYPE_CHECKING:
    from .reproduce import TableConfig


#: What every row has.
_KEYS = frozenset(
    {"cell", "dataset", "images_per_class", "method", "words", "paper", "reason", "sets"}
)


class TableFiles:
    """``table1.json`` and ``table1.md`` of a folder."""

    def __init__(
        self, out: Path, config: TableConfig, command: str | None, machine: dict[str, Any]
    ) -> None:
        self.json = out / f"{config.table}.json"
        self.markdown = out / f"{config.table}.md"
        self._out, self._config = out, config
        self._command, self._machine = command, machine
        self._rows: dict[str, dict[str, Any]] = {}

    def begin(self, jobs: Sequence[CellJobs]) -> None:
        """Takes over the rows that are there, and adds those to come.

        Raises:
            InputError: the folder holds a table that is neither to be continued nor replaced.
        """
        config = self._config
        self._check_folders(jobs)
        if there := self._read():
            if not (config.resume or config.overwrite):
                raise InputError(
                    f"{self.json} is there: --resume continues the table, --overwrite replaces it; "
                    "or choose another --out"
                )
            if config.overwrite:
                self._clear(there)
            else:
                self._rows = {row["cell"]: row for row in there}
                self._check_folders(jobs)
        for each in jobs:
            self._rows[each.cell.name] = each.row()
        self.write()

    def _check_folders(self, jobs: Sequence[CellJobs]) -> None:
        folders: dict[str, str] = {}
        there = [str(row["dataset"]) for row in self._rows.values()]
        for dataset in (*there, *(each.cell.dataset for each in jobs)):
            folder = short_name(dataset)
            if (other := folders.setdefault(folder, dataset)) != dataset:
                raise InputError(
                    f"{other} and {dataset} would share the folder {self._out / folder}: give each "
                    "an --out of its own"
                )

    def _read(self) -> list[dict[str, Any]]:
        if not self.json.exists():
            return []
        try:
            content = json.loads(self.json.read_text(encoding="utf-8"))
            if content["table"] != self._config.table:
                raise ValueError(content["table"])
            known = TABLES[self._config.table].methods
            rows = [dict(row) for row in content["cells"] if cell_of(row).method in known]
            if not all(row.keys() >= _KEYS for row in rows):
                raise ValueError("rows lack something")
            return rows
        except (OSError, KeyError, TypeError, ValueError, RecursionError, OverflowError) as error:
            raise InputError(
                f"{self.json} is no table of this program; choose another --out, or move it"
            ) from error

    def _clear(self, rows: Sequence[dict[str, Any]]) -> None:
        """Removes the cells of the table that is there, with all that they were made from.

        But for a pool of networks, which is replaced only where another is wanted.
        """
        table = TABLES[self._config.table]
        for row in rows:
            cell = cell_of(row)
            source = table.methods[cell.method].source
            folders = [cell.folder(), cell.folder(source)]
            if (trainer := trainer_of(cell.dataset)).method in table.sources:
                folders.append(trainer.folder())
            for folder in folders:
                shutil.rmtree(self._out / folder, ignore_errors=True)
                for above in folder.parents[:-1]:
                    with suppress(OSError):  # other things are in it
                        (self._out / above).rmdir()
        self.markdown.unlink(missing_ok=True)
        self.json.unlink()  # last: what tells that the others are a table's

    def put(self, jobs: CellJobs) -> None:
        """Writes the files with what there is of a cell now."""
        self._rows[jobs.cell.name] = jobs.row()
        self.write()

    def content(self) -> dict[str, Any]:
        """What the JSON file holds."""
        skipped = {"table", "resume", "overwrite"}
        options = {name: v for name, v in asdict(self._config).items() if name not in skipped}
        table = TABLES[self._config.table]
        return {
            "table": self._config.table,
            "title": table.title,
            "command": self._command,
            "options": options,
            "machine": self._machine,
            "versions": versions(),
            "cells": sorted(self._rows.values(), key=lambda row: table.place(cell_of(row))),
        }

    def write(self) -> None:
        content = self.content()
        write_bytes(self.json, (json.dumps(content, indent=1) + "\n").encode())
        write_bytes(self.markdown, markdown(content).encode())


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell that a row of the JSON file is of."""
    ipc = row["images_per_class"]
    return Cell(str(row["dataset"]), None if ipc == ALL else int(ipc), str(row["method"]))


_HEADER = (
    *("cell", "paper", "ours", "between sets", "sets x networks", "iterations", "epochs"),
    *("augmentation", "products", "making a set", "a network", "shortened to"),
)


def markdown(content: dict[str, Any]) -> str:
    """The table for people, from what its JSON file holds."""
    details = _lines(_HEADER, (_line(row) for row in content["cells"]))
    return (
        f"# {content['title']}\n\n{grid(content)}\n## How each came about\n\n{details}\n"
        + "".join(f"{line}\n" for line in _notes(content))
    )


def grid(content: dict[str, Any], titles: Mapping[str, str] | None = None) -> str:
    """The figures as the paper has them: ours, and the paper's in brackets, in Markdown.

    Args:
        titles: what data sets are called.
    """
    table = TABLES[content["table"]]
    names = {row["method"] for row in content["cells"]}
    columns = dict.fromkeys(m.heading for name, m in table.methods.items() if name in names)
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in content["cells"]:
        method = table.methods[row["method"]]
        dataset = (titles or {}).get(row["dataset"], Path(row["dataset"]).name)
        start = [dataset, str(row["images_per_class"]), *([method.row] if table.corner else [])]
        text = _ours(row) if row["sets"] else "not run"
        if row["paper"] is not None:
            text += f" ({Reported(**row['paper'])})"
        lines.setdefault(tuple(start), {})[method.heading] = text
    header = ["set", "images a class", *([table.corner] if table.corner else []), *columns]
    return _lines(
        header,
        ([*start, *(found.get(at, "not run") for at in columns)] for start, found in lines.items()),
    )


def _lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    escaped = ([" ".join(text.replace("|", "\\|").split()) for text in line] for line in rows)
    lines = (header, ["---"] * len(header), *escaped)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _ours(row: dict[str, Any]) -> str:
    return f"**{row['accuracy_mean']:.1f} ± {row['accuracy_std']:.1f}**"


def _line(row: dict[str, Any]) -> list[str]:
    figure, sets = row["paper"], row["sets"]
    start = [
        "/".join((Path(row["dataset"]).name, str(row["images_per_class"]), row["method"])),
        "" if figure is None else str(Reported(**figure)),
    ]
    if not sets:
        return [*start, row["reason"] or "to do", *[""] * (len(_HEADER) - len(start) - 1)]
    between = row["std_between_sets"]
    making = [found["seconds_making"] for found in sets if found["seconds_making"] is not None]
    networks = [found["networks"] for found in sets]
    iterations = [found["iterations"] for found in sets if found["iterations"] is not None]
    return [
        *start,
        _ours(row),
        "" if between is None else f"± {between:.1f}",
        f"{len(sets)} x {span(networks)}",
        span(iterations) if iterations else "",
        span([found["epochs"] for found in sets]),
        *(", ".join(dict.fromkeys(found[key] for found in sets)) for key in _SHARED),
        duration(statistics.fmean(making)) if making else "",
        duration(sum(found["seconds_evaluating"] for found in sets) / sum(networks)),
        ", ".join(row["shortened"]),
    ]


_SHARED = ("augmentation", "precision")


def _notes(content: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown below the table."""
    rows, options = content["cells"], content["options"]
    methods = {row["method"]: row["words"] for row in rows}
    yield (
        'Mean ± standard deviation over all networks of all sets; "between sets" is that of the '
        f"sets' means. The paper's are of {paper.SETS} sets of {paper.NETWORKS} networks each."
    )
    if any(row["paper"] and row["paper"]["rebuilt"] for row in rows):
        yield (
            "Figures with \\* are rebuilt from other publications, right to within rounding: check "
            "them before they are quoted as the paper's."
        )
    if not methods.keys().isdisjoint(SELECTED):
        yield (
            "The paper's rows of random and selected images seem to be without augmentation. "
            "Coresets of a set and a seed share one network, trained on all real images without "
            "augmentation, whose training is in the time of the first of them (forgetting, 1 image "
            "a class)."
        )
    for dataset, pools in _pools(rows).items():
        yield f"Bands of {Path(dataset).name} draw from {' and '.join(pools)}."
    yield ""
    yield from (f"- `{method}`: {words}" for method, words in methods.items())
    yield ""
    if content["command"]:
        yield f"`{content['command']}`, seeds from {options['seed']} on."
    of_sets = [found for row in rows for found in row["sets"]]
    machines = {_machine_words(found) for found in of_sets}
    yield from sorted(machines)
    if of_sets:
        yield ""
        yield "The same by the other commands, for the first seed:"
        yield ""
        yield "```sh"
        for row in rows:
            if row["sets"]:
                yield f"# {' '.join(row['cell'].split())}"
                yield from row["commands"]
        yield "```"


def _pools(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Of each set, what its pools are and how many of their states are in the bands."""
    pools: dict[str, dict[tuple[int, int], list[str]]] = {}
    for row in rows:
        if "pool" in row and row["pool"]["networks"]:
            found = row["pool"]
            key = (found["networks"], found["epochs"])
            bands = pools.setdefault(row["dataset"], {}).setdefault(key, [])
            bands.append(f"{row['method']}: {found['states']}")
    return {
        dataset: [
            f"{count(networks, 'network')} trained for epochs 0 to {epochs}; states in them: "
            + ", ".join(dict.fromkeys(bands))
            for (networks, epochs), bands in of_set.items()
        ]
        for dataset, of_set in pools.items()
    }


def _machine_words(found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    where = machine["gpu"] or f"{machine['processor']}, threads: {machine['threads']}"
    return f"{where}; " + ", ".join(f"{name} {version}" for name, version in versions.items())


def size_words(size: Size) -> str:
    """As ``5 sets of 20 networks, 20,000 iterations``."""
    words = f"{count(size.sets, 'set')} of {count(size.networks, 'network')}"
    return words + (f", {count(size.iterations, 'iteration')}" if size.iterations else "")


def duration(seconds: float) -> str:
    """In the unit that suits."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

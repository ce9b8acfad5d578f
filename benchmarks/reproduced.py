# SPDX-License-Identifier: MIT
"""Parts of the paper's tables on real data, as ``python -m dmfast.reproduce`` makes them.

``python benchmarks/reproduced.py keep FILE`` keeps its ``table1.json`` (or 2, 3, 4) as
``results/table1-NAME.json``, NAME being that of the data set, without what is of a machine's
folders; ``... readme`` puts the tables of all that is kept into the README.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables import README, RESULTS, with_content

from dmfast._table_files import duration, grid
from dmfast._tables import TABLES

#: Methods of a table that the README leaves out.
_LEFT_OUT = {
    "table1": (
        *(f"{name}-no-augmentation" for name in ("herding", "k-center", "forgetting")),
        *("dc-dsa-augmentation", "whole"),
    )
}
#: Tables of which the README has the times of each cell.
_TIMED = ("table2", "table3", "table4")
_TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


def keep(path: Path) -> list[Path]:
    """Writes the cells of each data set in a table's file to a result; gives the results."""
    content = json.loads(path.read_text())
    name, options = content["table"], content["options"]
    shown = {"data_root": "DIR", "out": f"runs/{name}", "pool": "POOL"}
    folders = {options[key]: words for key, words in shown.items() if options.get(key)}
    content = _without(content, dict(sorted(folders.items(), key=lambda f: -len(f[0]))))
    written = []
    for dataset in dict.fromkeys(cell["dataset"] for cell in content["cells"]):
        cells = [cell for cell in content["cells"] if cell["dataset"] == dataset]
        result = RESULTS / f"{name}-{dataset}.json"
        result.write_text(json.dumps(content | {"cells": cells}, indent=1) + "\n")
        written.append(result)
    return written


def _without(content: Any, folders: dict[str, str]) -> Any:
    """With other words for folders, of which one in another comes first."""
    if isinstance(content, str):
        for folder, words in folders.items():
            content = content.replace(folder, words)
        return content
    if isinstance(content, list):
        return [_without(value, folders) for value in content]
    if isinstance(content, dict):
        return {key: _without(value, folders) for key, value in content.items()}
    return content


def table(name: str) -> str:
    """The README's table of what is kept, with how its cells were made; "" of nothing."""
    paths = [RESULTS / f"{name}-{dataset}.json" for dataset in _TITLES]
    cells = [
        cell
        for path in paths
        if path.exists()
        for cell in json.loads(path.read_text())["cells"]
        if cell["method"] not in _LEFT_OUT.get(name, ())
    ]
    if not cells:
        return ""
    notes = [
        _note(name, "Iterations of condensing", cells, _iterations, of_set=True),
        _note(name, "Epochs of the networks, from 0 to", cells, _epochs),
    ]
    if name in _TIMED:
        notes += [
            _note(name, "Making a set took", cells, _making, of_set=True),
            _note(name, "Training and testing a network took", cells, _evaluating),
        ]
    notes = list(filter(None, notes))
    return f"{grid({'table': name, 'cells': cells}, _TITLES)}\n{' '.join(notes)}\n"


def _iterations(found: dict[str, Any]) -> str | None:
    return f"{found['iterations']:,}" if found["iterations"] else None


def _epochs(found: dict[str, Any]) -> str | None:
    return f"{found['epochs']:,}"


def _making(found: dict[str, Any]) -> str | None:
    return duration(found["seconds_making"]) if found["seconds_making"] else None


def _evaluating(found: dict[str, Any]) -> str | None:
    return duration(found["seconds_evaluating"] / found["networks"])


def _note(
    name: str,
    what: str,
    cells: list[dict[str, Any]],
    words: Callable[[dict[str, Any]], str | None],
    of_set: bool = False,
) -> str:
    """What is so of the first set of each cell, said once where all have it in common.

    ``of_set``: it is of how the set was made, whatever is evaluated.
    """
    several = len({(cell["dataset"], cell["images_per_class"]) for cell in cells}) > 1
    labels: dict[str, dict[str, None]] = {}
    for cell in cells:
        if cell["sets"] and (said := words(cell["sets"][0])) is not None:
            method = TABLES[name].methods[cell["method"]]
            label = (of_set and method.row) or method.heading
            if several:
                label += f" on {_TITLES[cell['dataset']]} at {cell['images_per_class']}"
            labels.setdefault(said, {})[label] = None
    if not labels:
        return ""
    if len(labels) == 1:
        return f"{what}: {next(iter(labels))}."
    return f"{what}: " + "; ".join(f"{said}: {', '.join(of)}" for said, of in labels.items()) + "."


def with_tables(readme: str) -> str:
    """The README with the present tables between their marks."""
    for name in TABLES:
        readme = with_content(readme, name, table(name), script="reproduced")
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    keeper = commands.add_parser("keep", help="keep a result of python -m dmfast.reproduce")
    keeper.add_argument("file", type=Path, metavar="FILE", help="its table1.json, or another's")
    commands.add_parser("readme", help="put the tables into the README")
    given = parser.parse_args()
    if given.command == "keep":
        for path in keep(given.file):
            print(path)
    else:
        README.write_text(with_tables(README.read_text()))


if __name__ == "__main__":
    main()

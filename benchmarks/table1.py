# SPDX-License-Identifier: MIT
"""Rivals beside distribution matching, on real data: a part of the paper's Table 1.

``python -m dmfast.reproduce table1 ...`` makes the cells. ``python benchmarks/table1.py keep FILE``
keeps its ``table1.json`` as ``results/table1-NAME.json``, NAME being that of the data set, without
what is of a machine's folders; ``... readme`` puts the table of all that is kept into the README.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tables import README, RESULTS, markdown, with_content

#: Columns of the README's table, and the methods of ``dmfast.reproduce`` that they are.
COLUMNS = {
    "random": "random",
    "random, no augmentation": "random-no-augmentation",
    "herding": "herding",
    "k-center": "k-center",
    "forgetting": "forgetting",
    "DC": "dc",
    "DSA": "dsa",
    "DM": "dm",
}
_TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}


def keep(path: Path) -> list[Path]:
    """Writes the cells of each data set in ``table1.json`` to a result; gives the results."""
    content = json.loads(path.read_text())
    folders = {content["options"]["data_root"]: "DIR", content["options"]["out"]: "runs/table1"}
    text = json.dumps(content)
    for folder, shown in folders.items():
        text = text.replace(folder, shown)
    content = json.loads(text)
    written = []
    for dataset in dict.fromkeys(cell["dataset"] for cell in content["cells"]):
        cells = [cell for cell in content["cells"] if cell["dataset"] == dataset]
        result = RESULTS / f"table1-{dataset}.json"
        result.write_text(json.dumps(content | {"cells": cells}, indent=1) + "\n")
        written.append(result)
    return written


def table() -> str:
    """The README's table of what is kept, with how each cell was shortened; "" of nothing."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    notes: list[str] = []
    for dataset, title in _TITLES.items():
        path = RESULTS / f"table1-{dataset}.json"
        if not path.exists():
            continue
        for cell in json.loads(path.read_text())["cells"]:
            if not cell["sets"]:
                continue
            key = title, cell["images_per_class"]
            row = rows.setdefault(key, {})
            row[cell["method"]] = _figures(cell)
            iterations = cell["sets"][0]["iterations"]
            if cell["method"] in COLUMNS.values() and iterations:
                label = next(name for name, method in COLUMNS.items() if method == cell["method"])
                notes.append(f"{label} on {title} at {key[1]}: {iterations:,}")
    if not rows:
        return ""
    header = ["set", "images a class", *COLUMNS]
    lines = (
        [title, str(ipc), *(row.get(method, "not run") for method in COLUMNS.values())]
        for (title, ipc), row in rows.items()
    )
    return f"{markdown(header, lines)}\nIterations of condensing: {'; '.join(notes)}.\n"


def _figures(cell: dict[str, Any]) -> str:
    ours = f"**{cell['accuracy_mean']:.1f} ± {cell['accuracy_std']:.1f}**"
    paper = cell["paper"]
    if paper is None:
        return ours
    return f"{ours} ({paper['mean']:.1f} ± {paper['std']:.1f}{'*' if paper['rebuilt'] else ''})"


def with_table(readme: str) -> str:
    """The README with the present table between its marks."""
    return with_content(readme, "table1", table())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    keeper = commands.add_parser("keep", help="keep a result of python -m dmfast.reproduce table1")
    keeper.add_argument("file", type=Path, metavar="FILE", help="its table1.json")
    commands.add_parser("readme", help="put the table into the README")
    given = parser.parse_args()
    if given.command == "keep":
        for path in keep(given.file):
            print(path)
    else:
        README.write_text(with_table(README.read_text()))


if __name__ == "__main__":
    main()

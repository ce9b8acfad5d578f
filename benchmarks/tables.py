# SPDX-License-Identifier: MIT
"""Tables in Markdown, and their places in the README: between marks that name their command."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where the package is built in place, it need not be installed
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, one line a row."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_content(readme: str, name: str, content: str, script: str | None = None) -> str:
    """The README with ``content`` between the marks of ``benchmarks/SCRIPT.py``, else NAME."""
    begin = f"<!-- {name}: benchmarks/{script or name}.py readme -->\n"
    end = f"<!-- end of {name} -->\n"
    before, found, rest = readme.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"the README has no place for {name}: {begin.strip()} ... {end.strip()}")
    return f"{before}{begin}{content}{end}{after}"

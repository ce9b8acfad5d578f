# SPDX-License-Identifier: MIT
"""Small tables, and a clock by which they take time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from dmfast import _jobs, _making, reproduce
from dmfast.reproduce import TableConfig
from dmfast.runs import RunFolder

SMALL = {"sets": 2, "networks": 2, "iterations": 4, "epochs": 2, "coreset_epochs": 1}
MODEL = "ConvNetD1W8"


def table(out: Path, *only: str, **options: Any) -> dict[str, dict[str, Any]]:
    """Runs the cells; the rows of the table by name."""
    arguments = {"model": MODEL, **SMALL, **options}
    clock = arguments.pop("clock", time.monotonic)
    content = reproduce.run(TableConfig(only=only, out=str(out), **arguments), clock=clock)
    written = json.loads((out / f"{content['table']}.json").read_text())
    assert written == json.loads(json.dumps(content))
    return {row["cell"]: row for row in content["cells"]}


class Machine:
    """A clock that goes on by what was done: 0.1 s an iteration, 1 s a network of any training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seconds_a_network = 0.0, 1.0
        condense_run, evaluate_run = _making.condense.run, _jobs.evaluate.run

        def condense(config):
            before, _ = RunFolder(config.out).read_progress()
            result = condense_run(config)
            self.now += 0.1 * (config.iterations - before)
            return result

        def evaluated(config, **options):
            before = _jobs._read_evaluation(Path(config.out)) or {"accuracies": []}
            result = evaluate_run(config, **options)
            self.now += self.seconds_a_network * (
                len(result.accuracies) - len(before["accuracies"])
            )
            return result

        monkeypatch.setattr(_making.condense, "run", condense)
        monkeypatch.setattr(_jobs.evaluate, "run", evaluated)

    def __call__(self) -> float:
        return self.now

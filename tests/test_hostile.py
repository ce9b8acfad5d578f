# SPDX-License-Identifier: MIT
"""No argument crashes the interpreter: hostile.py, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dmfast import compat, ops

OPERATORS = [name for name in ops.__all__ if name != "Stream"]
FRONT_ENDS = [name for name in compat.__all__ if name != "ParamDiffAug"]


def failures(*names: str) -> dict[str, str | None]:
    """By operator, what failed; where the process died, also of those that it did not come to."""
    script = Path(__file__).with_name("hostile.py")
    done = subprocess.run(
        [sys.executable, str(script), *names], capture_output=True, text=True, timeout=300
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    last = "\n".join(done.stderr.splitlines()[-20:])
    died = f"the interpreter ended with status {done.returncode}, after:\n{last}"
    return dict.fromkeys(names, died) | {r["operator"]: r["failure"] for r in reports}


@pytest.fixture(scope="module")
def of_all() -> dict[str, str | None]:
    return failures(*OPERATORS, *FRONT_ENDS)


@pytest.mark.parametrize("name", [*OPERATORS, *FRONT_ENDS])
def test_hostile_arguments_are_served_or_named(name: str, of_all: dict[str, str | None]) -> None:
    assert of_all[name] is None, of_all[name]


def test_a_crash_is_a_failure() -> None:
    assert "status -11" in (failures("crash")["crash"] or "")

# SPDX-License-Identifier: MIT
"""What the README says: its code runs, its commands parse, its figures are those of the results."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split("\n")[0])
def test_python_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python -m dmfast.")]


@pytest.mark.parametrize("command", commands())
def test_commands_have_these_options(command: str) -> None:
    """Each option is one that --help names."""
    _, _, module, *rest = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    for option in (word for word in rest if word.startswith("--")):
        assert option in re.findall(r"--[\w-]+", done.stdout)


def test_the_accuracy_table_is_that_of_the_results() -> None:
    accuracy = runpy.run_path(str(ROOT / "benchmarks" / "accuracy.py"))
    assert accuracy["with_table"](README) == README
    assert accuracy["table"]().count("\n") > 2, "no results are committed"

# SPDX-License-Identifier: MIT
"""What the README says: its code runs, its commands parse, its figures are those of the results."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmfast import ops

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


def equivalent(operator: str) -> str:
    """The plain torch that the table of operators names."""
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{operator}(")]
    return row.split("|")[3].strip().strip("`")


def without_spaces(code: str) -> str:
    return re.sub(r"\s", "", code)


def test_operators_are_what_they_are_said_to_be_equivalent_to() -> None:
    params = ops.draw_augmentation("color_crop_rotate", 2, (8, 8), 0, 0, stream=2)
    bytes_ = torch.randint(0, 256, (5, 8, 8, 3)).byte()
    index, offsets = torch.tensor([4, 0, 3]), torch.tensor([0, 1, 3])
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    arguments = {
        "gather_augment": (bytes_, index, params, mean, std, torch.float32, offsets),
        "class_mean_discrepancy": (torch.randn(9, 4), torch.randn(6, 4), 3),
    }
    for name, values in arguments.items():
        operator = getattr(ops, name)
        code = equivalent(name)
        assert without_spaces(code) in without_spaces(operator.__doc__)
        named = inspect.signature(operator).bind(*values).arguments
        plain = eval(code, {"siamese_augment": ops.siamese_augment} | dict(named))
        torch.testing.assert_close(operator(*values), plain)


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

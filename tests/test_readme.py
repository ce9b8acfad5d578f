# SPDX-License-Identifier: MIT
"""What the README says: its code runs, its commands parse, its figures are those of the results."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import accuracy
import iteration
import pytest
import rates
import reproduced
import roofline
import stages
import torch
from tables import with_content

from dmfast import ops
from dmfast._tables import TABLES

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
    assert accuracy.with_table(README) == README
    assert accuracy.table().count("\n") > 2, "no results are committed"


def test_the_papers_tables_are_those_of_the_results() -> None:
    assert reproduced.with_tables(README) == README
    for name in TABLES:
        assert reproduced.table(name).count("\n") > 2, f"no results of {name} are committed"


def test_a_table_is_kept_without_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cell(dataset: str, method: str, **more: Any) -> dict[str, Any]:
        first = {"iterations": None, "epochs": 1000, "networks": 3, "seconds_evaluating": 90.0}
        return {
            **{"dataset": dataset, "images_per_class": 1, "method": method, "paper": None},
            **{"accuracy_mean": 50.04, "accuracy_std": 0.26, "sets": [first | more.pop("set", {})]},
            **{"commands": ["evaluate --data-root /d/ata --out /d/ata/öut/x"]} | more,
        }

    paper = {"mean": 64.9, "std": 3.5, "rebuilt": True}
    cells = [
        cell("mnist", "random", paper=paper),
        cell("mnist", "herding-no-augmentation"),
        cell("mnist", "dm", set={"iterations": 1500, "epochs": 200}),
        cell("cifar10", "herding"),
        cell("cifar10", "k-center", sets=[]),
    ]
    options = {"data_root": "/d/ata", "out": "/d/ata/öut", "pool": None}
    content = {"options": options, "table": "table1"}
    (tmp_path / "table1.json").write_text(json.dumps(content | {"cells": cells}))
    monkeypatch.setattr(reproduced, "RESULTS", tmp_path)
    kept = reproduced.keep(tmp_path / "table1.json")
    assert [path.name for path in kept] == ["table1-mnist.json", "table1-cifar10.json"]
    for path in kept:
        commands = {
            line for row in json.loads(path.read_text())["cells"] for line in row["commands"]
        }
        assert commands == {"evaluate --data-root DIR --out runs/table1/x"}
    shown = reproduced.table("table1")
    assert shown.splitlines() == [
        "| set | images a class | random | herding | k-center | DM |",
        "| --- | --- | --- | --- | --- | --- |",
        "| MNIST | 1 | **50.0 ± 0.3** (64.9 ± 3.5*) | not run | not run | **50.0 ± 0.3** |",
        "| CIFAR-10 | 1 | not run | **50.0 ± 0.3** | not run | not run |",
        "",
        "Iterations of condensing: 1,500. Epochs of the networks, from 0 to: 1,000: random on "
        "MNIST at 1, herding on CIFAR-10 at 1; 200: DM on MNIST at 1.",
    ]
    banded = [
        cell("cifar10", "random", set={"iterations": 500, "seconds_making": 60.0}),
        cell("cifar10", "all", set={"iterations": 500, "seconds_making": 120.0}),
    ]
    (tmp_path / "table4.json").write_text(
        json.dumps({"options": {**options, "data_root": None}, "table": "table4", "cells": banded})
    )
    assert [path.name for path in reproduced.keep(tmp_path / "table4.json")] == [
        "table4-cifar10.json"
    ]
    assert reproduced.table("table4").splitlines()[-1] == (
        "Iterations of condensing: 500. Epochs of the networks, from 0 to: 1,000. Making a set "
        "took: 60 s: random; 2.0 min: all. Training and testing a network took: 30 s."
    )


def test_the_table_of_rates_is_that_of_the_results() -> None:
    assert rates.with_table(README) == README
    assert rates.table().count("\n") > 2, "no results are committed"


def test_the_table_of_times_is_that_of_the_results() -> None:
    assert iteration.with_table(README) == README


def test_the_table_of_parts_is_that_of_the_results() -> None:
    assert stages.with_table(README) == README


def test_the_picture_is_drawn_from_the_results(tmp_path: Path) -> None:
    accuracy.draw(tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    shown = {label: curve for label, (curve, _) in accuracy.lines().items()}
    assert all(label in drawn for label in shown)
    assert [label for label, curve in shown.items() if curve == "fast"] == ["dmfast, fast preset"]
    assert f"](benchmarks/results/{accuracy.PICTURE.name})" in README
    assert accuracy.PICTURE.exists()


def test_the_roofline_table_is_that_of_the_counts_and_results() -> None:
    assert roofline.with_table(README) == README


def test_a_roofline_table(tmp_path: Path) -> None:
    """Measured is what was measured; what was not says so."""
    (header, _, *rows, _, note) = roofline.table(tmp_path / "none").splitlines()
    assert header.endswith("| 20,000 iterations | measured |")
    assert len(rows) == len(roofline.CASES)
    assert all(row.endswith("| not yet measured |") for row in rows)
    assert "| 9.1 s" not in rows[0]
    assert "of that products 9.1 s |" in rows[1]
    assert "Measured" not in note

    def step(iterations: int, seconds: float) -> dict[str, object]:
        median = seconds / iterations
        return {"result": {"iterations": iterations, "seconds": seconds, "median": median}}

    result = {
        "command": "python benchmarks/gpu.py",
        "date": "2000-01-01",
        "machine": {"gpu": "A GPU"},
        "versions": {"torch": "9.9"},
        "steps": {
            "cifar10-ipc10": step(20_000, 11.0),
            "cifar10-ipc50": step(40_000, 30.0),
            "mnist-ipc10": step(300, 0.3),
            "tiny-imagenet-ipc50": {"status": "FAILED"},
        },
    }
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(result))
    (_, _, *rows, _, note) = roofline.table(path).splitlines()
    assert [row.split(" | ")[-1] for row in rows] == [
        "11.0 s |",
        "15.0 s |",
        "not yet measured |",
        "not yet measured |",
        "20.0 s, from the time of 300 iterations |",
    ]
    assert note.endswith("Measured: A GPU, torch 9.9, 2000-01-01: `python benchmarks/gpu.py`.")


def test_a_table_of_times(tmp_path: Path) -> None:
    """A row for each precision, with the CPU's name below; the README keeps all else."""
    times = {
        contender: {"median": seconds, "min": 0.9 * seconds, "max": 1.1 * seconds, "rounds": 3}
        for contender, seconds in {
            "published": 4.0,
            "tidied float32": 2.0,
            "tidied bfloat16": 1.0,
            "dmfast float32": 0.5,
            "dmfast bfloat16": 0.25,
        }.items()
    }
    seconds = dict.fromkeys(iteration.PAGES, times)
    result = {
        "command": "python benchmarks/iteration.py run",
        "date": "2000-01-01",
        "machine": {"processor": "A CPU", "threads": 2},
        "versions": {"torch": "9.9"},
        "rate": {"float32": 1e12, "bfloat16": None},
        "cases": {
            "3x32x32-ipc10": {
                "flop": 10**11,
                "seconds": seconds,
                "ratios": iteration._ratios(seconds),
            }
        },
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    _, _, *rows, _, note = iteration.table(path).splitlines()
    assert [row.split(" | ", 1)[1] for row in rows] == [
        "float32: 500.0 ms (450.0 to 550.0) | 8.0 x | 8.0 x | 4.0 x | 4.0 x |",
        "bfloat16: 250.0 ms (225.0 to 275.0) | 16.0 x | 16.0 x | 4.0 x | 4.0 x |",
    ]
    assert note == (
        "A CPU, 2 threads, between registers 1000 GFLOP/s in float32, torch 9.9, 2000-01-01: "
        "`python benchmarks/iteration.py run`"
    )
    assert "dmfast float32      500.0 ms (450.0 to 550.0)   200.0 GFLOP/s  20.0%" in (
        iteration.report(result)
    )
    assert with_content(README, "iteration", iteration.table(path)).count("16.0 x") == 2
    with pytest.raises(ValueError, match="the README has no place for speed"):
        with_content(README, "speed", "")

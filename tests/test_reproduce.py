# SPDX-License-Identifier: MIT
"""Tables and figures: which cells, in what time, what is written, and going on where it ended."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_sets import make, write_idx, write_tiny_imagenet
from small_tables import MODEL, Machine, table

from dmfast import (
    InputError,
    _jobs,
    _making,
    _table_files,
    charts,
    coreset,
    evaluate,
    paper,
    reproduce,
)
from dmfast._budget import Rates, Size, allotment, parse_duration, shortened
from dmfast._cells import Cell, Facts, condensing_work, rank, select
from dmfast._figure4 import _Curve, parse_iterations
from dmfast._jobs import CellJobs
from dmfast._tables import TABLES
from dmfast.evaluate import EvaluateConfig
from dmfast.gradient_matching import LOOPS
from dmfast.reproduce import FigureConfig, TableConfig
from dmfast.runs import RunFolder

TABLE = TABLES["table1"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(reproduce.__file__).parents[1])}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dmfast.reproduce", *map(str, arguments)]


# ---- what fits a budget ------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("40m", 2400), (" 1.5h ", 5400)])
def test_a_time(text: str, seconds: float) -> None:
    assert parse_duration("--budget", text) == seconds


@pytest.mark.parametrize("text", ["", "40", "m", "0s", "-3s", "1d", "1e3s", "nan s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InputError, match=r"--budget must be a time such as 90s, 40m or 1\.5h"):
        parse_duration("--budget", text)


def seconds_of(size: Size) -> float:
    """A second an iteration, ten a network."""
    return size.sets * (size.iterations + 10 * size.networks)


@pytest.mark.parametrize(
    ("left", "size"),
    [
        (6000, Size(5, 20, 1000)),
        (5999, Size(4, 20, 1000)),
        (2400, Size(2, 20, 1000)),
        (1199, Size(1, 19, 1000)),
        (1030, Size(1, 3, 1000)),
        (1029, Size(1, 3, 990)),  # of two digits
        (267, Size(1, 3, 230)),
        (40, Size(1, 3, 10)),
        (39, None),
    ],
)
def test_sets_go_first_then_networks_then_iterations(left: float, size: Size | None) -> None:
    assert shortened(Size(5, 20, 1000), seconds_of, left) == size


def test_what_is_asked_is_never_exceeded_nor_gone_below() -> None:
    asked = Size(1, 2, 5)
    assert shortened(asked, seconds_of, 1e9) == asked
    assert asked.smallest == Size(1, 2, 1)
    assert shortened(asked, seconds_of, 21) == asked.smallest
    assert shortened(Size(3, 20, 0), seconds_of, 35) == Size(1, 3, 0)


def test_each_cell_gets_its_least_and_an_equal_share_of_the_rest() -> None:
    assert allotment(100, [10, 20, 30]) == 10 + 40 / 3
    assert allotment(100, [10]) == 100
    # What does not fit leaves its time to the others.
    assert allotment(100, [10, 200, 30]) == 10 + 60 / 2
    assert allotment(100, [101, 1]) == 100


def test_rates_are_the_last_measured_and_else_those_of_the_kind() -> None:
    rates = Rates()
    assert rates.seconds([(("training", "a", "10"), 5.0)]) == 0  # nothing is known
    rates.measure(("training", "a", "10"), 100, 50)
    rates.measure(("training", "a", "10"), 100, 10)
    rates.measure(("training", "a", "256"), 100, 5)
    rates.measure(("condensing", "a", "1"), 100, 1)
    assert ("training", "a", "10") in rates
    assert rates.seconds([(("training", "a", "10"), 30), (("training", "a", "256"), 40)]) == 5
    assert rates.seconds([(("training", "b", "10"), 40)]) == 2
    assert rates.seconds([(("else", "b"), 40)]) == 0.4
    assert rates.seconds([(("training", "a", "10"), 0)]) == 0


# ---- which cells -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["cifar10/10/dm"], ["cifar10/10/dm"]),
        (["CIFAR10/10/dm"], ["cifar10/10/dm"]),
        (["mnist/*/dm"], ["mnist/1/dm", "mnist/10/dm", "mnist/50/dm"]),
        (["*/10/ds?"], [f"{name}/10/dsa" for name in TABLE.datasets]),
        (["mnist/all"], ["mnist/all/whole"]),
        (["digits/3/dm", "digits/3/dm", "mnist/1/dm"], ["digits/3/dm", "mnist/1/dm"]),
        (["mnist/1/dc*"], ["mnist/1/dc", "mnist/1/dc-dsa-augmentation"]),
        (["digits/3/d*"], ["digits/3/dm"]),  # matching gradients has no loops for 3
    ],
)
def test_patterns(patterns: list[str], names: list[str]) -> None:
    assert [cell.name for cell in select(TABLE, patterns)] == names


def test_a_beginning_names_all_below_it() -> None:
    at_10 = select(TABLE, ["cifar10/10"])
    assert {cell.method for cell in at_10} == TABLE.methods.keys() - {"whole"}
    everything = select(TABLE, ["cifar10"])
    assert len(everything) == 3 * len(at_10) + 1
    assert len(select(TABLE, [])) == 4 * len(everything)


def test_a_path_is_a_set(tmp_path: Path) -> None:
    (tmp_path / "set.npz").touch()
    (cell,) = select(TABLE, [f"{tmp_path}/set.npz/2/dm"])
    assert cell == Cell(str(tmp_path / "set.npz"), 2, "dm")
    assert cell.folder() == Path("set-npz/2/dm")


def test_a_path_that_is_there_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "set[1].npz").touch()
    (cell,) = select(TABLE, [f"{tmp_path}/set[1].npz/2/dm"])
    assert cell.dataset == f"{tmp_path}/set[1].npz"


def test_sets_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    images = make(8, train=20)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "x.npz", **images._asdict())
    cells = [f"{tmp_path}/{name}/x.npz/1/random" for name in ("a", "b")]
    options = {"sets": 1, "networks": 1, "epochs": 0, "cache": False}
    out = tmp_path / "out"
    table(out, cells[0], **options)
    before = (out / "table1.json").read_bytes()
    for also in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match=r"would share the folder .*x-npz: give each an --out"):
            table(out, *cells, **options, **also)
        assert (out / "table1.json").read_bytes() == before
    with pytest.raises(InputError, match="would share the folder"):
        table(out, cells[1], **options, resume=True)
    assert (out / "x-npz/1/random/seed0/evaluation.json").exists()


def test_a_name_does_not_break_a_row() -> None:
    assert _table_files._lines(["a"], [["x|y\nz"]]).splitlines()[2:] == ["| x\\|y z |"]


@pytest.mark.parametrize(
    "pattern",
    [
        "mnist/1/best",
        "mnist/0/dm",
        "mnist/x/dm",
        "x*",
        "mnist/1/whole",
        "mnist/all/dm",
        "mnist/2/dc",
    ],
)
def test_a_pattern_of_no_cell_is_named(pattern: str) -> None:
    with pytest.raises(InputError, match=r"--only .*: no such cell; it is SET/IPC/METHOD"):
        select(TABLE, [pattern])


def test_a_set_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match="--only nodata/1/dm: 'nodata' is neither a known data"):
        select(TABLE, ["nodata/1/dm"])


def test_every_figure_of_the_paper_has_a_cell() -> None:
    columns = {method.column for method in TABLE.methods.values()}
    assert {column for _, _, column in paper.TABLE1} == columns - {None}
    assert {dataset for dataset, _, _ in paper.TABLE1} == set(TABLE.datasets)
    assert str(paper.TABLE1["cifar10", 50, "dm"]) == "63.0 ± 0.4"
    assert str(paper.TABLE1["mnist", 1, "dm"]) == "89.7 ± 0.6*"
    assert str(paper.TABLE1["tiny-imagenet", None, "whole"]) == "37.6 ± 0.4"
    assert ("cifar100", 50, "dc") not in paper.TABLE1
    # 4 sets x 3 x 6 columns and the whole sets, less what the paper does not have.
    assert len(paper.TABLE1) == 4 * 3 * 6 + 4 - (1 + 3 * 2)


# ---- in which order ----------------------------------------------------------------------------


def test_cheap_cells_come_first_and_dm_among_equals() -> None:
    assert sorted([rank(False, 2e6), rank(True, 9e6), rank(True, 2e7), rank(False, 3e5)]) == [
        rank(False, 3e5),
        rank(True, 9e6),
        rank(False, 2e6),
        rank(True, 2e7),
    ]


def test_the_work_of_a_cell_is_counted_in_images(tmp_path: Path) -> None:
    facts = Facts(
        classes=10,
        train_images=50_000,
        test_images=10_000,
        smallest_class=5000,
        costs={"ConvNet": 1.0},
    )
    assert condensing_work("dm", facts, 10, 256, 1.0) == 10 * (256 + 3 * 10)
    assert condensing_work("dm", facts, 10, 256, 4.0) == 4 * 10 * (256 + 3 * 10)
    assert condensing_work("dsa", facts, 1, 256, 1.0) == 10 * (3 * 256 + 9)
    rounds, epochs = LOOPS[10]
    of_round = 10 * (3 * 256 + 9 * 10)
    assert condensing_work("dc", facts, 10, 256, 1.0) == rounds * of_round + 9 * epochs * 3 * 100

    def work(name: str) -> float:
        (cell,) = select(TABLE, [name])
        config = TableConfig(sets=5, networks=20)
        return CellJobs(TABLE, cell, config, tmp_path, facts).whole_work

    network = 3 * 100 * 1001 + 10_000
    assert work("cifar10/10/random") == 5 * 20 * network
    assert work("cifar10/10/dm") == 5 * (20 * network + 20_000 * 10 * (256 + 30))
    assert work("cifar10/10/herding") == 5 * (20 * network + 201 * 3 * 50_000)
    assert work("cifar10/all/whole") == 20 * (51 * 3 * 50_000 + 10_000)
    dc = 5 * (20 * (3 * 100 * 301 + 10_000) + 1000 * condensing_work("dc", facts, 10, 256, 1.0))
    assert work("cifar10/10/dc") == dc


# ---- a table -----------------------------------------------------------------------------------

CELLS = ("digits/1", "digits/2/herding", "digits/all")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("made") / "table"
    return out, table(out, *CELLS)


def test_every_cell_is_made(made) -> None:
    _, rows = made
    methods = [*(f"digits/1/{name}" for name in TABLE.methods if name != "whole")]
    assert list(rows) == [*methods, "digits/2/herding", "digits/all/whole"]
    for name, row in rows.items():
        sets = row["sets"]
        assert [found["seed"] for found in sets] == ([0] if "all" in name else [0, 1])
        accuracies = [accuracy for found in sets for accuracy in found["accuracies"]]
        assert len(accuracies) == 2 * len(sets)
        mean = sum(accuracies) / len(accuracies)
        assert row["accuracy_mean"] == pytest.approx(mean)
        variance = sum((accuracy - mean) ** 2 for accuracy in accuracies) / len(accuracies)
        assert row["accuracy_std"] == pytest.approx(variance**0.5)
        assert (row["std_between_sets"] is None) == (len(sets) == 1)
        assert row["paper"] is None
        assert row["reason"] is None
    first, second = (sum(found["accuracies"]) / 2 for found in rows["digits/1/dm"]["sets"])
    assert rows["digits/1/dm"]["std_between_sets"] == pytest.approx(abs(first - second) / 2)
    assert rows["digits/1/dm"]["shortened"] == [
        *("2 sets", "2 networks", "4 iterations", "2 epochs"),
        f"{MODEL} in place of ConvNet",
    ]
    assert "selected by a network of 1 epoch" in rows["digits/2/herding"]["shortened"]
    assert rows["digits/all/whole"]["shortened"][:2] == ["2 networks", "2 epochs"]


def test_augmentation_is_that_of_the_method(made) -> None:
    _, rows = made
    siamese = "color_crop_cutout_scale_rotate"
    for name, row in rows.items():
        plain = name.endswith("no-augmentation") or name == "digits/1/dc"
        assert {found["augmentation"] for found in row["sets"]} == {"none" if plain else siamese}


def test_the_table_in_markdown_says_all(made) -> None:
    out, rows = made
    text = (out / "table1.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| digits/")]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows.values(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row["cell"]
        assert cells[2] == f"**{row['accuracy_mean']:.1f} ± {row['accuracy_std']:.1f}**"
        assert cells[4] == f"{len(row['sets'])} x 2"
        assert cells[-1] == ", ".join(row["shortened"])
    assert "torch" in text
    assert "python -m dmfast.condense --model" in text


def test_the_commands_make_the_same(made, tmp_path: Path) -> None:
    out, rows = made
    for cell in ("digits/1/dm", "digits/1/dc-dsa-augmentation", "digits/2/herding"):
        row = rows[cell]
        for line in row["commands"]:
            words = shlex.split(line.replace(str(out), str(tmp_path)))
            assert words[:2] == ["python", "-m"]
            importlib.import_module(words[2])._main(words[3:])
        folder = Path(words[words.index("--out") + 1])
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert evaluation["accuracies"] == row["sets"][0]["accuracies"]


def test_coresets_of_a_seed_share_a_network_and_dc_its_sets(made) -> None:
    out, _ = made
    trained = {path.relative_to(out) for path in out.rglob("features.safetensors")}
    assert trained == {Path(f"digits/1/forgetting/seed{n}/features.safetensors") for n in (0, 1)}
    condensed = {path.parent.relative_to(out) for path in out.rglob("checkpoint.safetensors")}
    assert condensed == {
        Path(f"digits/1/{method}/seed{n}") for method in ("dm", "dc", "dsa") for n in (0, 1)
    }


def test_the_paper_is_beside_where_the_images_are_the_same(tmp_path: Path) -> None:
    for name, write, arrays in (
        ("mnist", write_idx, make(28, train=40, test=20).grey()),
        ("tiny-imagenet", write_tiny_imagenet, make(64, train=20)),
    ):
        (tmp_path / name).mkdir()
        write(tmp_path / name, arrays)
    options = {"data_root": str(tmp_path), "cache": False, "iterations": 1, "sets": 1}
    rows = table(
        tmp_path / "out",
        "mnist/1/random-no-augmentation",
        "mnist/1/dc*",
        "tiny-imagenet/1/random",  # its first 10 classes
        **options,
    )
    plain = rows["mnist/1/random-no-augmentation"]
    assert plain["paper"] == {"mean": 64.9, "std": 3.5, "rebuilt": True}
    text = (tmp_path / "out/table1.md").read_text()
    assert "| mnist/1/random-no-augmentation | 64.9 ± 3.5* | **" in text
    assert "rebuilt from other publications" in text
    assert rows["mnist/1/dc"]["sets"][0]["augmentation"] == "crop_scale_rotate"
    assert rows["mnist/1/dc"]["paper"]["mean"] == 91.7
    assert rows["mnist/1/dc-dsa-augmentation"]["paper"] is None
    assert rows["tiny-imagenet/1/random"]["paper"] is None


# ---- going on ----------------------------------------------------------------------------------


def test_a_table_is_gone_on_with_and_nothing_done_twice(tmp_path: Path, monkeypatch) -> None:
    out, cells = tmp_path / "out", ("digits/1/dm", "digits/1/random", "digits/1/k-center")
    first = table(out, *cells)
    with pytest.raises(InputError, match=r"table1.json is there: --resume .*--overwrite .*--out"):
        table(out, *cells)

    trained: list[tuple[int, int]] = []
    original = evaluate._evaluate_rest

    def counted(evaluator, source, networks, epochs, record, result):
        trained.append((len(result.accuracies), networks))
        return original(evaluator, source, networks, epochs, record, result)

    monkeypatch.setattr(evaluate, "_evaluate_rest", counted)
    monkeypatch.delattr(coreset, "train")
    again = table(out, *cells, resume=True)
    assert trained == []
    assert again == first
    # More networks, and fewer sets than there are, which stay.
    more = table(out, *cells, resume=True, networks=3, sets=1)
    assert trained == [(2, 3)] * 3
    for name, row in more.items():
        assert row["sets"][0]["accuracies"][:2] == first[name]["sets"][0]["accuracies"]
        assert row["sets"][1] == first[name]["sets"][1]
        assert "2 to 3 networks" in row["shortened"]
    # More iterations: the spread is of sets of as many. Rows of other cells stay as they are.
    trained.clear()
    longer = table(out, "digits/1/dm", resume=True, iterations=6, sets=1)
    assert trained == [(0, 2)]
    assert [found["iterations"] for found in longer["digits/1/dm"]["sets"]] == [6]
    assert longer["digits/1/random"] == more["digits/1/random"]


def test_a_longer_table_is_that_of_a_single_call(tmp_path: Path) -> None:
    cell = "digits/1/dm"
    table(tmp_path / "a", cell, sets=1, networks=1, iterations=2)
    parts = table(tmp_path / "a", cell, resume=True)[cell]
    whole = table(tmp_path / "b", cell)[cell]
    assert parts["accuracy_mean"] == whole["accuracy_mean"]
    assert [s["accuracies"] for s in parts["sets"]] == [s["accuracies"] for s in whole["sets"]]


def test_other_options_than_those_begun_with_are_named(tmp_path: Path) -> None:
    table(tmp_path, "digits/1/dm", "digits/1/herding")
    with pytest.raises(InputError, match=r"digits/1/dm: .*epochs is 2, not 3"):
        table(tmp_path, "digits/1/dm", resume=True, epochs=3)
    with pytest.raises(InputError, match=r"digits/1/herding: .*'epochs': 1.*--overwrite"):
        table(tmp_path, "digits/1/herding", resume=True, coreset_epochs=2)
    mine = tmp_path / "digits/mine"
    mine.write_text("mine")
    rows = table(tmp_path, "digits/2/herding", overwrite=True, coreset_epochs=2)
    assert list(rows) == ["digits/2/herding"]
    assert not (tmp_path / "digits/1/dm").exists()
    assert mine.exists()


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"table": "table9", "cells": []}'])
@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_a_file_of_something_else_is_left_alone(content, option, tmp_path: Path) -> None:
    (tmp_path / "table1.json").write_text(content)
    with pytest.raises(InputError, match=r"table1.json is no table of this program"):
        table(tmp_path, "digits/1/dm", **{option: True})
    assert [path.read_text() for path in tmp_path.iterdir()] == [content]


@pytest.mark.parametrize("when", ["condensing", "selecting", "evaluating"])
def test_a_killed_table_goes_on_to_the_same_figures(when: str, tmp_path: Path) -> None:
    """Killed in the midst of a job of the second of the cells that are in work."""
    out, straight = tmp_path / "killed", tmp_path / "straight"
    place, calls = {
        "condensing": ("condense._Condensation._write_checkpoint", 1),
        "selecting": ("coreset._Folder.write", 2),
        "evaluating": ("evaluate._Record.write", 6),
    }[when]
    module, _, name = place.partition(".")
    script = f"""
import os, signal, sys
from dmfast import {module}, reproduce
holder, name, count = {module}.{name.rpartition(".")[0]}, {name.rpartition(".")[2]!r}, 0
original = getattr(holder, name)
def dying(*arguments):
    global count
    count += 1
    if count == {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(holder, name, dying)
reproduce._main(sys.argv[1:])
"""
    cells = "digits/1/dm,digits/1/forgetting"
    options = ["--sets", 2, "--networks", 2, "--iterations", 4, "--epochs", 2]
    options += ["--coreset-epochs", 1, "--model", MODEL, "--only", cells, "--out", out]
    process = subprocess.run(
        [sys.executable, "-c", script, "table1", *map(str, options)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert "to do" in (out / "table1.md").read_text()
    rows = table(out, *cells.split(","), resume=True)
    for name, row in table(straight, *cells.split(",")).items():
        for here, there in zip(rows[name]["sets"], row["sets"], strict=True):
            assert here["accuracies"] == there["accuracies"]
            assert here["iterations"] == there["iterations"]


def test_an_interrupt_leaves_the_table_so_far(tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_making.condense, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path, "digits/1/dm", "digits/1/random-no-augmentation", iterations=1000)
    content = json.loads((tmp_path / "table1.json").read_text())
    random, dm = content["cells"]
    assert dm["sets"] == []
    assert len(random["sets"]) == 2


# ---- a budget ----------------------------------------------------------------------------------


#: A probe trains networks for as many epochs, so that it predicts a second for each.
BUDGETED = {"sets": 3, "networks": 5, "iterations": 100, "epochs": 2}


@pytest.mark.parametrize(
    ("budget", "sets", "networks", "iterations"),
    [
        # Probes of 5 networks: 5 s, of 20 iterations: 2 s, which count; then a set is 10 s and its
        # 5 networks 5 s.
        ("50s", 3, 5, 100),
        ("49s", 2, 5, 100),
        ("34s", 1, 5, 100),
        ("19s", 1, 4, 100),
        ("18s", 1, 3, 100),
        ("16.5s", 1, 3, 85),
        ("10.5s", 1, 3, 25),
    ],
)
def test_a_cell_is_shortened_to_the_time_left(
    budget, sets, networks, iterations, tmp_path: Path, monkeypatch
) -> None:
    clock = Machine(monkeypatch)
    row = table(tmp_path, "digits/1/dm", clock=clock, budget=budget, **BUDGETED)["digits/1/dm"]
    assert [found["networks"] for found in row["sets"]] == [networks] * sets
    assert {found["iterations"] for found in row["sets"]} == {iterations}
    words = {f"{sets} set{'s' if sets > 1 else ''}", f"{networks} networks"}
    assert words < set(row["shortened"])
    assert f"{iterations} iterations" in row["shortened"]
    assert clock.now <= parse_duration("--budget", budget)


def test_what_there_is_no_time_for_is_named(tmp_path: Path, monkeypatch) -> None:
    clock = Machine(monkeypatch)
    cells = ("digits/1/random", "digits/1/dm", "digits/10/dm")
    rows = table(tmp_path, *cells, clock=clock, budget="9s", **BUDGETED)
    # 5 s for the probe, then four networks; what is left is not enough for more.
    assert [found["networks"] for found in rows["digits/1/random"]["sets"]] == [4]
    for name in cells[1:]:
        assert rows[name]["sets"] == []
        assert rows[name]["reason"].startswith("not run: ")
        assert rows[name]["reason"] in (tmp_path / "table1.md").read_text()
    # With more time it goes on, and the reasons are gone.
    rows = table(tmp_path, *cells, clock=clock, resume=True, **BUDGETED)
    assert {len(row["sets"]) for row in rows.values()} == {3}
    assert {row["reason"] for row in rows.values()} == {None}


def test_a_budget_is_shared_by_the_cells(tmp_path: Path, monkeypatch) -> None:
    clock = Machine(monkeypatch)
    cells = ("digits/1/random", "digits/1/random-no-augmentation", "digits/1/dm")
    rows = table(tmp_path, *cells, clock=clock, budget="60s", **BUDGETED)
    # Those that need less than their share leave it to the last.
    assert [len(rows[name]["sets"]) for name in cells] == [3, 3, 1]
    assert clock.now <= 60


def test_a_machine_that_gets_slower_makes_fewer_sets(tmp_path: Path, monkeypatch) -> None:
    clock = Machine(monkeypatch)
    original = _jobs.CellJobs.make

    def slower(self, number, iterations):
        clock.seconds_a_network = 3.0
        original(self, number, iterations)

    monkeypatch.setattr(_jobs.CellJobs, "make", slower)
    rows = table(tmp_path, "digits/1/random", clock=clock, budget="34s", **BUDGETED)
    row = rows["digits/1/random"]
    # 15 s were expected to do for all; the first set takes them, and the second finds 14.
    assert len(row["sets"]) == 1
    assert row["reason"] == "the time that it was given is over"


# ---- the figure --------------------------------------------------------------------------------

FIGURE = {"dataset": "digits", "model": MODEL, "networks": 2, "epochs": 2}


def figure(out: Path, **options: Any) -> dict[str, Any]:
    content = reproduce.run_figure(FigureConfig(out=str(out), **FIGURE | options))
    assert json.loads((out / "figure4.json").read_text()) == json.loads(json.dumps(content))
    return content


def points(content: dict[str, Any]) -> dict[str, list[int]]:
    return {
        method: [point["iterations"] for point in curve["points"]]
        for method, curve in content["curves"].items()
    }


def test_a_figure_has_both_curves(tmp_path: Path, monkeypatch) -> None:
    content = figure(tmp_path, iterations=(2, 5))
    assert points(content) == {"dm": [2, 5], "dsa": [2, 5]}
    for method, curve in content["curves"].items():
        metrics = RunFolder(tmp_path / method).read_metrics()
        seconds = {record["iteration"]: record["seconds"] for record in metrics}
        assert [p["seconds"] for p in curve["points"]] == [seconds[2], seconds[5]]
        assert all(len(point["accuracies"]) == 2 for point in curve["points"])
    drawn = (tmp_path / "figure4.svg").read_text()
    assert "distribution matching" in drawn
    assert "gradient matching with Siamese augmentation" in drawn
    # A point is that of a run of as many iterations, and is not made twice.
    straight = figure(tmp_path / "straight", iterations=(5,))
    for method, curve in straight["curves"].items():
        assert (
            curve["points"][0]["accuracies"]
            == (content["curves"][method]["points"][1]["accuracies"])
        )
    with pytest.raises(InputError, match=r"figure4.json is there: --resume"):
        figure(tmp_path, iterations=(2, 5))
    with pytest.raises(InputError, match=r"was evaluated with --epochs \d+ after 5 iterations"):
        figure(tmp_path, iterations=(2, 5), epochs=77, resume=True)
    with monkeypatch.context() as patch:
        patch.delattr(evaluate, "_evaluate_rest")
        assert figure(tmp_path, iterations=(2, 5), resume=True)["curves"] == content["curves"]
    assert points(figure(tmp_path, iterations=(7,), resume=True))["dsa"] == [2, 5, 7]
    assert points(figure(tmp_path, iterations=(1,), overwrite=True))["dm"] == [1]


def test_a_point_whose_evaluation_was_not_begun_is_made_up_for(tmp_path: Path) -> None:
    figure(tmp_path, iterations=(3,))
    (tmp_path / "dm/3-iterations/evaluation.json").unlink()
    assert points(figure(tmp_path, iterations=(2,), resume=True)) == {"dm": [3], "dsa": [3]}


@pytest.mark.parametrize(
    ("done", "seconds", "reached"),
    [
        (0, 0.0, 100),  # the first is made in any case
        (10, 1.0, 100),
        (10, 10.0, 20),
        (10, 19.5, None),  # for no iteration more
        (10, 30.0, None),
        (50, 19.0, None),  # for 2 of 50: nothing new
        (100, 30.0, 100),
        (150, 30.0, 150),
    ],
)
def test_a_curve_ends_with_its_budget(done, seconds, reached, tmp_path, monkeypatch) -> None:
    curve = _Curve(FigureConfig(out=str(tmp_path), budget="20s", **FIGURE), "dsa")
    monkeypatch.setattr(curve._run, "read_progress", lambda: (done, seconds))
    assert curve._reached(100) == reached


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"table": "table7"}, "TABLE: unknown value 'table7'"),
        ({"budget": "soon"}, "--budget must be a time"),
        ({"sets": 0}, "--sets must be 1 or more, got 0"),
        ({"networks": 0}, "--networks must be 1 or more"),
        ({"iterations": 0}, "--iterations must be 1 or more"),
        ({"epochs": -1}, "--epochs must be 0 or more"),
        ({"coreset_epochs": -1}, "--coreset-epochs must be 0 or more"),
        ({"preset": "best"}, "--preset: unknown value 'best'"),
        ({"precision": "int8"}, "--precision: unknown value 'int8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"seed": -1}, "--seed must be from 0 to"),
        ({"seed": 2**63 - 4}, "--seed must be from 0 to 2\\*\\*63 - 5, the number of sets"),
        ({"out": ""}, "--out is empty"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
        ({"model": "ConvNe"}, "unknown model 'ConvNe'"),
        ({"only": ("mnist/1/dm",), "data_root": "nowhere"}, "nowhere does not exist"),
        ({"only": (), "data_root": "nowhere"}, "nowhere .*--only names cells of other sets"),
    ],
)
def test_wrong_options_of_a_table(options, named, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=named) as error:
        reproduce.run(TableConfig(**{"only": ("digits/1/dm",)} | options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": "soon"}, "--budget must be a time"),
        ({"iterations": (3, 3)}, "--iterations must be 1 or more, each more than the one before"),
        ({"iterations": ()}, "--iterations must be .*got none"),
        ({"iterations": (0,)}, "--iterations must be 1 or more"),
        ({"ipc": 0}, "--ipc must be 1 or more"),
        ({"ipc": 3}, "--ipc 3: gradient matching has published loops for 1, 10"),
        ({"networks": 0}, "--networks must be 1 or more"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"out": ""}, "--out is empty"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
        ({"dataset": "nodata"}, "'nodata' is neither"),
    ],
)
def test_wrong_options_of_the_figure(options, named, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=named) as error:
        reproduce.run_figure(FigureConfig(**FIGURE | options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_list_of_iterations() -> None:
    assert parse_iterations(None) is None
    assert parse_iterations("10, 30") == (10, 30)
    with pytest.raises(InputError, match="whole numbers divided by commas, got '1,x'"):
        parse_iterations("1,x")


def test_a_figure_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "figure4.json").write_text("{}")
    with pytest.raises(InputError, match=r"figure4.json is no figure of this program"):
        figure(tmp_path, overwrite=True)
    assert (tmp_path / "figure4.json").read_text() == "{}"
    (tmp_path / "figure4.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"figure4.json is no figure of this program"):
        figure(tmp_path, resume=True)


def test_a_figure_of_data_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist|not found"):
        figure(tmp_path / "out", dataset="mnist", data_root=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out" / "figure4.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"table": "table1", "cells": [{"dataset": "digits", "images_per_class": Infinity, '
        '"method": "dm"}]}',
        '{"table": "table1", "cells": [{"dataset": "digits", "images_per_class": 1, '
        '"method": "dm"}]}',
    ],
)
def test_a_damaged_table_is_no_table(content: str, tmp_path: Path) -> None:
    (tmp_path / "table1.json").write_text(content)
    with pytest.raises(InputError, match=r"table1.json is no table of this program"):
        reproduce.run(TableConfig(only=("digits/1/dm",), out=str(tmp_path), resume=True))
    assert (tmp_path / "table1.json").read_text() == content


def test_a_chart_takes_any_name(tmp_path: Path) -> None:
    curves = {"a": [(1.0, 50.0, 1.0), (2.0, 60.0, 1.0)]}
    charts.save_accuracy_over_time(tmp_path / "a.svg", curves, r"of a$\q$b")
    assert r"a$\q$b" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("what", [*TABLES, "figure4"])
def test_help_names_the_options_that_there_are(what: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        reproduce._main([what, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert ("--coreset-epochs" in said) == (what == "table1")
    assert ("--pool-epochs" in said) == (what == "table4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table9"], "argument WHAT: invalid choice: 'table9'"),
        (["table1", "--budget", "x"], "--budget must be a time such as 90s, 40m or 1.5h, got 'x'"),
        (["table1", "--only", "digits/1/dm, digits/1/x"], "--only digits/1/x: no such cell"),
        (["figure4", "--iterations", "x"], "--iterations must be whole numbers"),
    ],
)
def test_wrong_options_end_with_status_2_and_one_line(arguments, words, tmp_path: Path) -> None:
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_evaluate_takes_what_a_table_leaves(made) -> None:
    """The folders are those of the commands: an evaluation in one of them is found again."""
    out, _ = made
    folder = out / "digits/1/random/seed0"
    found = json.loads((folder / "evaluation.json").read_text())
    config = EvaluateConfig(
        baseline="random",
        dataset="digits",
        ipc=1,
        networks=2,
        epochs=2,
        model=MODEL,
        out=str(folder),
    )
    assert list(evaluate.run(config).accuracies) == found["accuracies"]

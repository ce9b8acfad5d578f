# SPDX-License-Identifier: MIT
"""Tables whose cells differ in their networks: in norm, in architecture, in training."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from image_sets import make, write_cifar10
from small_tables import MODEL, Machine, table

from dmfast import InputError, evaluate, networks, paper, pool, pretrain
from dmfast._cells import CONVNET_FLOP, Cell, Facts, select
from dmfast._jobs import CellJobs, facts_of
from dmfast._tables import TABLES
from dmfast.reproduce import TableConfig


@pytest.mark.parametrize("name", ["table2", "table3", "table4"])
def test_every_figure_of_the_paper_has_a_cell(name: str) -> None:
    wanted = TABLES[name]
    cells = [(c.dataset, c.ipc, wanted.methods[c.method].column) for c in select(wanted, [])]
    assert set(cells) >= wanted.figures.keys()
    assert len(set(cells)) == len(cells)


# ---- Table 2: instance and batch norm -----------------------------------------------------------


def test_table_2_condenses_and_evaluates_with_the_same_norm(tmp_path: Path, monkeypatch) -> None:
    rows = table(tmp_path, "digits/1", table="table2", sets=1)
    assert list(rows) == [
        f"digits/1/{method}-{norm}"
        for norm in ("instance-norm", "batch-norm")
        for method in ("dsa", "dm")
    ]
    for name, row in rows.items():
        model = MODEL + ("BN" if name.endswith("batch-norm") else "")
        assert f'"model": "{model}"' in (tmp_path / name / "seed0/config.json").read_text()
        assert row["sets"][0]["model"] == model
        assert row["full"]["model"] == ("ConvNetBN" if model.endswith("BN") else "ConvNet")
        for line in row["commands"]:
            assert f"--model {model}" in line
    with monkeypatch.context() as patch:  # nothing is done twice
        patch.delattr(evaluate, "_evaluate_rest")
        assert table(tmp_path, "digits/1", table="table2", sets=1, resume=True) == rows
    only = "digits/1/dm-batch-norm"
    assert list(table(tmp_path, only, table="table2", sets=1, overwrite=True)) == [only]
    assert not (tmp_path / "digits/1/dsa-batch-norm").exists()


@pytest.mark.parametrize(
    ("dataset", "model"), [("cifar10", "ConvNetBN"), ("tiny-imagenet", "ConvNetD4BN")]
)
def test_the_usual_network_of_a_set_with_batch_norm(dataset: str, model: str) -> None:
    facts = Facts(classes=10, train_images=10, test_images=10, smallest_class=1, costs={})
    config = TableConfig(table="table2")
    cell = Cell(dataset, 50, "dm-batch-norm")
    jobs = CellJobs(TABLES["table2"], cell, config, Path("out"), facts)
    assert jobs._maker._condense_config(0, 1).model == model
    assert jobs._evaluate_config(0, 1, 1).model == model


def test_table_2_takes_a_model_with_instance_norm(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ConvNetBNBN"):
        table(tmp_path / "out", "digits/1", table="table2", model="ConvNetBN")
    assert not list(tmp_path.iterdir())


# ---- Table 3: across architectures ---------------------------------------------------------------


def test_the_papers_figures_across_architectures() -> None:
    assert len(paper.TABLE3) == 5 * 4
    assert str(paper.TABLE3["cifar10", 50, "dsa-ConvNetBN-ResNet18BN"]) == "47.3 ± 1.0"
    assert str(paper.TABLE3["cifar10", 50, "dm-ConvNetBN-VGG11BN"]) == "59.9*"
    assert str(paper.TABLE3["cifar10", 50, "dm-ResNet18BN-ConvNetBN"]) == "52.2 ± 1.0"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small CIFAR-10."""
    root = tmp_path_factory.mktemp("data")
    (root / "cifar10").mkdir()
    write_cifar10(root / "cifar10", make(32, train=40, test=20))
    return root


def test_sets_are_condensed_on_one_network_and_evaluated_on_others(
    images: Path, tmp_path: Path, monkeypatch
) -> None:
    options = {"table": "table3", "sets": 1, "networks": 1, "iterations": 2, "epochs": 1}
    options |= {"data_root": str(images), "cache": False}
    names = {"ConvNetBN": f"{MODEL}BN", "AlexNetBN": "AlexNetBN"}
    cells = [f"cifar10/1/dm-{a}-{b}" for a in names for b in names]
    rows = table(tmp_path, *cells, **options)
    assert list(rows) == cells
    for name, row in rows.items():
        _, condensed_on, tested_on = name.rpartition("/")[2].split("-")
        folder = tmp_path / "cifar10/1" / f"dm-{condensed_on}/seed0"
        assert (
            json.loads((folder / "config.json").read_text())["options"]["model"]
            == (names[condensed_on])
        )
        assert row["sets"][0]["model"] == names[tested_on]
        assert row["full"]["condensed_on"] == condensed_on
        replaced = f"{MODEL}BN in place of ConvNetBN"
        assert (replaced in row["shortened"]) == ("ConvNetBN" in (condensed_on, tested_on))
        assert f"AlexNetBN in place of {MODEL}" not in row["shortened"]
        words = [shlex.split(line) for line in row["commands"]]
        assert [line[line.index("--model") + 1] for line in words] == [
            names[condensed_on],
            names[tested_on],
        ]
        assert row["paper"] is None
    # A set is made once.
    assert len(list(tmp_path.rglob("synthetic.safetensors"))) == 2
    text = (tmp_path / "table3.md").read_text()
    assert "| set | images a class | condensed by | ConvNet | AlexNet |" in text
    shown = [f"**{rows[cell]['accuracy_mean']:.1f} ± 0.0**" for cell in cells]
    assert f"| cifar10 | 1 | DM on ConvNet | {shown[0]} | {shown[1]} |" in text
    assert f"| cifar10 | 1 | DM on AlexNet | {shown[2]} | {shown[3]} |" in text
    with monkeypatch.context() as patch:
        patch.delattr(evaluate, "_evaluate_rest")
        assert table(tmp_path, *cells, **options, resume=True) == rows


def test_work_goes_by_the_operations_of_the_network(images: Path, tmp_path: Path) -> None:
    (convnet,) = networks.table(["ConvNetBN"], 3, 10, (32, 32))
    assert convnet["flop"] == CONVNET_FLOP
    config = TableConfig(table="table3", data_root=str(images), cache=False)
    facts = facts_of("cifar10", config, ["{}BN", "ResNet18BN"])
    assert facts.costs.keys() == {"ConvNetBN", "ResNet18BN"}
    assert facts.costs["ConvNetBN"] == 1
    assert facts.costs["ResNet18BN"] == pytest.approx(10.9, abs=0.1)

    def work(method: str) -> dict[str, float]:
        jobs = CellJobs(TABLES["table3"], Cell("cifar10", 1, method), config, tmp_path, facts)
        (making, made), (training, trained) = jobs.works_of_set(0, jobs.asked)
        assert (making[0], making[-1]) == ("condensing by dm", method.split("-")[1])
        assert (training[0], training[-1]) == ("training", method.split("-")[2])
        return {"made": made, "trained": trained}

    cheap, tested = work("dm-ConvNetBN-ConvNetBN"), work("dm-ConvNetBN-ResNet18BN")
    condensed = work("dm-ResNet18BN-ConvNetBN")
    cost = facts.costs["ResNet18BN"]
    assert tested["made"] == cheap["made"]
    assert tested["trained"] == pytest.approx(cost * cheap["trained"])
    assert condensed["made"] == pytest.approx(cost * cheap["made"])
    assert condensed["trained"] == cheap["trained"]


def test_a_network_that_does_not_fit_the_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ResNet18BN"):
        table(tmp_path / "out", "digits/1/dm-ConvNetBN-ResNet18BN", table="table3")
    assert not list(tmp_path.iterdir())


# ---- Table 4: distributions of networks ----------------------------------------------------------

BANDED = {"table": "table4", "pool_networks": 2, "pool_epochs": 3, "model": "ConvNetD2W16"}


def test_the_papers_figures_of_bands() -> None:
    assert len(paper.TABLE4) == 3 * 9
    assert str(paper.TABLE4["cifar10", 10, "40-50"]) == "51.1 ± 0.6"
    assert str(paper.TABLE4["cifar10", 50, "70-"]) == "60.0 ± 0.5"
    assert paper.TABLE4["cifar10", 1, "random"] == paper.TABLE1["cifar10", 1, "dm"]


def test_cells_draw_from_a_pool_that_is_trained_once(tmp_path: Path, monkeypatch) -> None:
    calls: list[str] = []
    original = pretrain.run

    def counted(config, **options):
        calls.append(config.out)
        return original(config, **options)

    monkeypatch.setattr(pretrain, "run", counted)
    cells = ("digits/1/random", "digits/1/10-20", "digits/1/all", "digits/1/20-30")
    rows = table(tmp_path, *cells, **BANDED)
    assert calls == [str(tmp_path / "digits/pool")]
    facts, states = pool.read(tmp_path / "digits/pool")
    assert (facts["epochs"], len({s.network for s in states})) == (3, 2)
    there = {"10-20": 0, "20-30": 0, "all": len(states)}
    for state in states:
        band = f"{int(state.accuracy // 10) * 10}-{int(state.accuracy // 10) * 10 + 10}"
        there[band] = there.get(band, 0) + 1
    assert "pool" not in rows["digits/1/random"]
    banded = [name for name in rows if not name.endswith("random")]
    for name in banded:
        band = name.rpartition("/")[2]
        assert rows[name]["pool"] == {"networks": 2, "epochs": 3, "states": there[band]}
        if not there[band]:
            assert rows[name]["reason"] == f"not run: the pool has no network of {band} %"
            continue
        config = json.loads((tmp_path / "digits/1" / band / "seed0/config.json").read_text())
        assert config["options"]["band"] == band
        assert config["options"]["networks_from"] == str(tmp_path / "digits/pool")
        assert [shlex.split(line)[2] for line in rows[name]["commands"]] == [
            *("dmfast.pretrain", "dmfast.condense", "dmfast.evaluate")
        ]
    text = (tmp_path / "table4.md").read_text()
    assert (
        "Bands of digits draw from 2 networks trained for epochs 0 to 3; states in them: " in text
    )
    # Found again, also by another table.
    again = table(tmp_path, *cells, **BANDED, resume=True)
    assert again == rows
    given = table(tmp_path / "given", "digits/1/all", **BANDED, pool=str(tmp_path / "digits/pool"))
    assert len(calls) == 1
    assert given["digits/1/all"]["accuracy_mean"] == rows["digits/1/all"]["accuracy_mean"]
    assert [shlex.split(line)[2] for line in given["digits/1/all"]["commands"]] == [
        *("dmfast.condense", "dmfast.evaluate")
    ]


def condensed(out: Path, *cells: str, **options: Any) -> dict[str, Any]:
    """A table of bands whose figures do not matter."""
    settings = {"sets": 1, "networks": 1, "iterations": 2, "epochs": 1}
    return table(out, *cells, **BANDED | settings | options)


def networks_in(folder: Path) -> int:
    return pool.count_networks(pool.read(folder)[1])


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_other_networks_are_not_taken_for_those_of_the_table(tmp_path: Path) -> None:
    cell, there = "digits/1/all", tmp_path / "digits/pool"
    condensed(tmp_path, cell)
    before = everything(tmp_path)
    for options, named in (
        ({"pool_epochs": 4}, "holds another pool .*epochs is 3, not 4"),
        ({"seed": 5}, "holds another pool .*seed is 0, not 5"),
        ({"precision": "float32"}, "holds another pool .*precision is"),
        # Cells of fewer and of more networks would not be those of the table.
        ({"pool_networks": 1}, "has 2 networks, from which cells draw: give --pool-networks 2"),
        ({"pool_networks": 3}, "has 2 networks, from which cells draw: give --pool-networks 2"),
    ):
        if options.get("precision") == pool.read(there)[0]["precision"]:
            options = {"precision": "bfloat16"}
        with pytest.raises(InputError, match=named):
            condensed(tmp_path, cell, **options, resume=True)
    with pytest.raises(InputError, match="give --pool-networks 2"):
        condensed(tmp_path, cell, pool_networks=1, overwrite=True)
    assert everything(tmp_path) == before
    # What is trained is kept where it is what is wanted, and is replaced where it is not.
    condensed(tmp_path, cell, overwrite=True)
    for name, content in before.items():
        assert not name.startswith("digits/pool") or everything(tmp_path)[name] == content
    condensed(tmp_path, cell, pool_networks=3, overwrite=True)
    assert networks_in(there) == 3
    condensed(tmp_path, cell, pool_epochs=2, pool_networks=1, overwrite=True)
    assert (networks_in(there), pool.read(there)[0]["epochs"]) == (1, 2)


def test_a_refused_table_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    condensed(out, "digits/1/all")
    before = everything(out)
    refused = (
        ({"pool": "nowhere"}, "nowhere holds no pool.json"),
        ({"pool": str(out / "digits/pool"), "model": "ConvNetD1W16"}, "ConvNetD2W16 trained on"),
        ({"model": f"{Path(__file__).parent}/own_networks.py:plain"}, "own_networks.py"),
    )
    for options, named in refused:
        with pytest.raises(InputError, match=named):
            condensed(out, "digits/1/all", **options, overwrite=True)
        assert everything(out) == before
    # A given pool outlives the table that drew from it.
    given = out / "digits/pool"
    rows = condensed(out, "digits/1/all", pool=str(given), overwrite=True)
    assert len(rows["digits/1/all"]["sets"]) == 1
    assert networks_in(given) == 2


def test_a_given_pool_is_of_the_same_images_and_whole(tmp_path: Path) -> None:
    condensed(tmp_path / "a", "digits/1/all")
    given = tmp_path / "a/digits/pool"
    (facts, states) = pool.read(given)
    options = {"pool": str(given)}
    pool.write(given, facts | {"dataset": "mnist", "real_images": "0"}, states)
    with pytest.raises(InputError, match="trained on mnist, not ConvNetD2W16 on digits as it is"):
        condensed(tmp_path / "b", "digits/1/all", "digits/1/random", **options)
    pool.write(given, facts, states)
    (given / states[0].file).unlink()
    with pytest.raises(InputError, match=f"{states[0].file} is missing; name another"):
        condensed(tmp_path / "b", "digits/1/all", "digits/1/random", **options)
    with pytest.raises(InputError, match=r"pool.json is a file: name the folder"):
        condensed(tmp_path / "b", "digits/1/all", pool=str(given / "pool.json"))
    assert not (tmp_path / "b").exists()
    (given / "pool.json").write_text("{")
    with pytest.raises(InputError, match="holds no pool of this program: --overwrite trains it"):
        condensed(tmp_path / "a", "digits/1/all", resume=True)
    assert condensed(tmp_path / "a", "digits/1/all", overwrite=True)["digits/1/all"]["sets"]


def test_a_pool_that_was_removed_is_not_trained_for_what_is_made(tmp_path: Path) -> None:
    rows = condensed(tmp_path, "digits/1/all")
    shutil.rmtree(tmp_path / "digits/pool")
    again = condensed(tmp_path, "digits/1/all", resume=True)
    assert again["digits/1/all"]["sets"] == rows["digits/1/all"]["sets"]
    assert not (tmp_path / "digits/pool").exists()


def test_a_band_that_no_network_is_in_is_not_run(tmp_path: Path) -> None:
    options = {"pool_epochs": 0, "pool_networks": 1}
    row = condensed(tmp_path, "digits/1/70-", **options)["digits/1/70-"]
    assert row["sets"] == []
    assert row["reason"] == "not run: the pool has no network of 70 % and more"
    assert row["reason"] in (tmp_path / "table4.md").read_text()
    assert not (tmp_path / "digits/1/70-").exists()


def test_a_pool_is_in_the_budget(tmp_path: Path, monkeypatch) -> None:
    clock = Machine(monkeypatch)
    original = pretrain.run

    def pretrained(config, **options):
        clock.now += 100.0
        return original(config, **options)

    monkeypatch.setattr(pretrain, "run", pretrained)
    options = BANDED | {"sets": 1, "iterations": 20, "networks": 2, "epochs": 1}
    rows = table(tmp_path, "digits/1/all", **options, clock=clock, budget="20s")
    reason = rows["digits/1/all"]["reason"]
    assert reason.startswith("not run: 18 s of the budget are left, and its pool of networks and 1")
    assert not (tmp_path / "digits/pool").exists()
    rows = table(tmp_path, "digits/1/all", **options, clock=clock, budget="1h", resume=True)
    assert len(rows["digits/1/all"]["sets"]) == 1
    assert rows["digits/1/all"]["reason"] is None


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"table": "table1", "pool": "x"}, "--pool: table1 has no bands of networks"),
        ({"pool_networks": 0}, "--pool-networks must be 1 or more"),
        ({"pool_epochs": -1}, "--pool-epochs must be 0 or more"),
        ({"pool": "nowhere"}, r"nowhere holds no pool.json"),
    ],
)
def test_wrong_options_of_a_pool(options, named, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=named):
        table(
            tmp_path / "out",
            "digits/1/dm" if "table" in options else "digits/1/all",
            **BANDED | options,
        )

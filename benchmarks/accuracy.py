# SPDX-License-Identifier: MIT
"""Accuracy on real data beside the paper's figures: what the README's table is made from.

``python benchmarks/accuracy.py run NAME ... --data-root DIR`` condenses, trains and tests, and
writes ``benchmarks/results/accuracy-NAME.json``; interrupted, the same command continues.
``... curves`` does so after ever more iterations and writes ``accuracy-over-time.json``, of which
``... picture`` draws ``accuracy-over-time.svg``, with the times an iteration of
``iteration-cpu*.json``. ``... table`` prints the table of what has been run; ``... readme`` puts it
into the README.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import README, RESULTS, ROOT, markdown, with_content


@dataclass(frozen=True)
class Run:
    """One row of the table: the commands' options, and the paper's figures (Table 1) in %.

    Attributes:
        condense: options beyond these.
        products: ``float32`` or ``bfloat16``, or ``direct``: float32 by torch's own layers.
        random: the row whose random real images are those of this one too; "" for its own, None
            for none.
    """

    title: str
    dataset: str
    ipc: int
    paper: str
    paper_random: str
    condense: str
    products: str = "bfloat16"
    random: str | None = ""
    networks: int = 3

    @property
    def environment(self) -> dict[str, str]:
        return {"DMFAST_CPU": "direct"} if self.products == "direct" else {}

    @property
    def _same(self) -> list[str]:
        precision = "bfloat16" if self.products == "bfloat16" else "float32"
        return ["--seed", "0", "--precision", precision]

    def condense_command(self, folder: Path, data_root: str) -> list[str]:
        return [
            *("dmfast.condense", "--dataset", self.dataset, "--data-root", data_root),
            *("--ipc", str(self.ipc), *shlex.split(self.condense), *self._same),
            *("--out", str(folder), "--resume"),
        ]

    def evaluate_command(self, folder: Path, data_root: str) -> list[str]:
        return [
            *("dmfast.evaluate", str(folder), "--dataset", self.dataset, "--data-root", data_root),
            *("--networks", str(self.networks), *self._same),
        ]

    def commands(self, name: str, runs: Path, data_root: str) -> dict[str, list[str]]:
        folder = runs / name
        commands = {
            "condense": self.condense_command(folder, data_root),
            "condensed": self.evaluate_command(folder, data_root),
        }
        if self.random == "":
            commands["random"] = [
                *("dmfast.evaluate", "--baseline", "random", "--dataset", self.dataset),
                *("--data-root", data_root, "--ipc", str(self.ipc)),
                *("--networks", str(self.networks), *self._same, "--out", f"{folder}-random"),
            ]
        return commands


_FEW = "--iterations 300 --batch-real 64"
_MNIST_1 = ("MNIST", "mnist", 1, "89.7 ± 0.6", "64.9 ± 3.5")
_MNIST_10 = ("MNIST", "mnist", 10, "97.5 ± 0.1", "95.1 ± 0.9")
_CIFAR_1 = ("CIFAR-10", "cifar10", 1, "26.0 ± 0.8", "14.4 ± 2.0")
_CIFAR_10 = ("CIFAR-10", "cifar10", 10, "48.9 ± 0.6", "26.0 ± 1.2")
_CIFAR_50 = ("CIFAR-10", "cifar10", 50, "63.0 ± 0.4", "43.4 ± 1.0")
_PAPER, _FAST = "--iterations 1000", "--preset fast"

# The paper's figures are for 20,000 iterations, 5 sets and 20 networks each; its random rows seem
# to be trained without augmentation, ours are trained with it.
RUNS = {
    "mnist-ipc1": Run(*_MNIST_1, _FEW, "direct"),
    "mnist-ipc10-direct": Run(*_MNIST_10, _FEW, "direct", networks=2),
    "mnist-ipc10-float32": Run(*_MNIST_10, _FEW, "float32", "mnist-ipc10-bfloat16"),
    "mnist-ipc10-bfloat16": Run(*_MNIST_10, _FEW),
    "mnist-ipc10-fast": Run(*_MNIST_10, _FAST, random="mnist-ipc10-bfloat16"),
    "cifar10-ipc1": Run(*_CIFAR_1, _PAPER),
    "cifar10-ipc1-fast": Run(*_CIFAR_1, _FAST, random="cifar10-ipc1"),
    "cifar10-ipc10-direct": Run(*_CIFAR_10, _PAPER, "direct"),
    "cifar10-ipc10-float32": Run(*_CIFAR_10, _PAPER, "float32", "cifar10-ipc10-direct"),
    "cifar10-ipc10": Run(*_CIFAR_10, _PAPER, random="cifar10-ipc10-direct"),
    # As many iterations as 40 minutes gave, on one of two cores that others worked on, too.
    "cifar10-ipc10-40min": Run(*_CIFAR_10, "--iterations 3100", random="cifar10-ipc10-direct"),
    "cifar10-ipc10-fast": Run(*_CIFAR_10, _FAST, random="cifar10-ipc10-direct"),
    "cifar10-ipc50": Run(*_CIFAR_50, _PAPER, random=None),
    "cifar10-ipc50-40min": Run(*_CIFAR_50, "--iterations 2100", random=None),
    "cifar10-ipc50-fast": Run(*_CIFAR_50, _FAST, random=None),
}


@dataclass(frozen=True)
class Curve:
    """CIFAR-10, 10 images a class, after ever more iterations.

    Attributes:
        condense: its options but for the number of iterations.
        times: the case of ``benchmarks/iteration.py`` that has the time of one.
    """

    condense: str
    iterations: tuple[int, ...]
    times: str

    def run(self, iterations: int) -> Run:
        return Run(*_CIFAR_10, f"{self.condense} --iterations {iterations}")


CURVES = {
    "paper": Curve("", (100, 500, 1000), "3x32x32-ipc10"),
    "fast": Curve("--preset fast", (25, 50, 100, 250, 500), "3x32x32-ipc10-64"),
}
CURVES_RESULT, PICTURE = RESULTS / "accuracy-over-time.json", RESULTS / "accuracy-over-time.svg"


def _execute(command: list[str], environment: dict[str, str]) -> None:
    process = [sys.executable, "-m", *command]
    subprocess.run(process, check=True, cwd=ROOT, env=os.environ | environment)


def run(name: str, runs: Path, data_root: str) -> None:
    """Executes the commands of one row and writes its result."""
    row = RUNS[name]
    for command in row.commands(name, runs, data_root).values():
        _execute(command, row.environment)
    write_result(name, runs)


def write_result(name: str, runs: Path) -> None:
    """Writes what the commands of one row have left in ``runs``."""
    row, folder = RUNS[name], runs / name
    config = json.loads((folder / "config.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    variables = "".join(f"{key}={value} " for key, value in row.environment.items())
    shown = {
        which: f"{variables}python -m {shlex.join(command)}"
        for which, command in row.commands(name, Path("runs"), "DIR").items()
    }
    result: dict[str, Any] = {
        "condense": {
            "command": shown["condense"],
            "options": {
                k: v for k, v in config["options"].items() if k not in ("data_root", "out")
            },
            "versions": config["versions"],
            "machine": config["machine"],
            "seconds": last["seconds"],
            "loss": last["loss"],
        }
    }
    for which, path in (("condensed", folder), ("random", Path(f"{folder}-random"))):
        if which in shown:
            result[which] = _evaluation(path) | {"command": shown[which]}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"accuracy-{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def _evaluation(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "evaluation.json").read_text())
    return {k: v for k, v in found.items() if k != "set"}


def run_curves(runs: Path, data_root: str) -> None:
    """Condenses and evaluates at every point of the curves, and writes their result."""
    result: dict[str, Any] = {}
    for name, curve in CURVES.items():
        folder, points = runs / f"curve-{name}", []
        for iterations in curve.iterations:
            at = curve.run(iterations)
            _execute(at.condense_command(folder, data_root), {})
            out = runs / f"curve-{name}-at-{iterations}"
            _execute([*at.evaluate_command(folder, data_root), "--out", str(out)], {})
            found = _evaluation(out)
            kept = ("accuracy_mean", "accuracy_std", "accuracies", "precision", "epochs", "seed")
            points.append({"iterations": iterations} | {key: found[key] for key in kept})
        options = json.loads((folder / "config.json").read_text())["options"]
        result[name] = {
            "options": {key: options[key] for key in ("ipc", "batch_real", "lr_img", "precision")},
            "versions": found["versions"],
            "points": points,
        }
    CURVES_RESULT.write_text(json.dumps(result, indent=1) + "\n")


def lines() -> dict[str, tuple[str, float]]:
    """By its label in the picture: which curve a line shows, and the seconds of an iteration."""
    cases: dict[str, Any] = {}
    for path in RESULTS.glob("iteration-cpu*.json"):
        cases |= json.loads(path.read_text())["cases"]

    def of(curve: str, pages: str, contender: str) -> tuple[str, float]:
        return curve, cases[CURVES[curve].times]["seconds"][pages][contender]["median"]

    return {
        "dmfast, fast preset": of("fast", "kept", "dmfast bfloat16"),
        "dmfast, the paper's setting": of("paper", "kept", "dmfast bfloat16"),
        "published way, freed pages kept": of("paper", "kept", "published"),
        "published way": of("paper", "as-is", "published"),
    }


def draw(path: Path = PICTURE) -> None:
    """The accuracy over the time of condensing, with the spread over the networks."""
    import matplotlib
    from matplotlib.figure import Figure

    curves = json.loads(CURVES_RESULT.read_text())
    # A text file of the same bytes for the same figures, whose words are words.
    with matplotlib.rc_context({"svg.hashsalt": "dmfast", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for label, (curve, seconds) in lines().items():
            points = curves[curve]["points"]
            axes.errorbar(
                [point["iterations"] * seconds for point in points],
                [point["accuracy_mean"] for point in points],
                [point["accuracy_std"] for point in points],
                marker="o",
                markersize=3,
                capsize=2,
                linestyle="--" if "published" in label else "-",
                label=label,
            )
        axes.axhline(48.9, color="grey", linewidth=0.8)
        axes.annotate(
            "the paper's, after 20,000 iterations",
            (0.99, 48.95),
            color="grey",
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
        axes.set_xscale("log")
        ticks = {1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h"}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.set_xlabel("condensing CIFAR-10 to 10 images a class, on two cores")
        axes.set_ylabel("test accuracy, %")
        axes.set_ylim(bottom=37)  # room for the legend
        axes.legend(loc="lower center", fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def table() -> str:
    """The table of the results that are there, in Markdown."""
    header = (
        *("set", "images a class", "random real images", "condensed", "paper: random"),
        *("paper: condensed", "networks", "iterations", "real images a class", "learning rate"),
        *("products", "condensing"),
    )
    rows = []
    for name, row in RUNS.items():
        path = RESULTS / f"accuracy-{name}.json"
        if not path.exists():
            continue
        result = json.loads(path.read_text())
        options = result["condense"]["options"]
        random = "not run"
        of = RESULTS / f"accuracy-{row.random or name}.json"
        if row.random is not None and of.exists():
            random = _spread(json.loads(of.read_text())["random"])
        ours = f"**{_spread(result['condensed'])}**"
        rows.append(
            (
                *(row.title, str(row.ipc), random, ours, row.paper_random, row.paper),
                *(str(result["condensed"]["networks"]), str(options["iterations"])),
                *(str(options["batch_real"]), f"{options['lr_img']:g}", row.products),
                f"{result['condense']['seconds'] / 60:.1f} min",
            )
        )
    return markdown(header, rows)


def _spread(evaluation: dict[str, Any]) -> str:
    return f"{evaluation['accuracy_mean']:.1f} ± {evaluation['accuracy_std']:.1f}"


def with_table(readme: str) -> str:
    """The README with the present table between its marks."""
    return with_content(readme, "accuracy", table())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="condense, train and test")
    runner.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; all where left out"
    )
    curves = commands.add_parser("curves", help="condense, train and test at every point of them")
    for command in (runner, curves):
        command.add_argument(
            "--data-root", required=True, help="the folder that holds the sets' folders"
        )
        command.add_argument("--runs", type=Path, default=Path("runs"), help="where to work")
    commands.add_parser("picture", help=f"draw {PICTURE.name}")
    commands.add_parser("table", help="print the table")
    commands.add_parser("readme", help="put the table into the README")
    arguments = parser.parse_args()
    if arguments.command in ("run", "curves"):
        names = getattr(arguments, "names", [])
        if unknown := [name for name in names if name not in RUNS]:
            parser.error(f"no such row: {', '.join(unknown)}; choose from {', '.join(RUNS)}")
        runs, data_root = arguments.runs.resolve(), str(Path(arguments.data_root).resolve())
        try:
            if arguments.command == "curves":
                run_curves(runs, data_root)
            else:
                for name in names or RUNS:
                    run(name, runs, data_root)
        except subprocess.CalledProcessError as error:  # it has said why
            status = error.returncode
            sys.exit(status if status > 0 else 128 - status)
        except KeyboardInterrupt:
            sys.exit(130)
    elif arguments.command == "picture":
        draw()
    elif arguments.command == "table":
        print(table(), end="")
    else:
        README.write_text(with_table(README.read_text()))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""Figure 4 on this machine: test accuracy over the time of condensing, DM beside DSA.

Its folder:

==================== =============================================================================
METHOD               the condensation of ``dm`` and of ``dsa``
METHOD/N-iterations  the evaluation after so many
figure4.json         the points of both curves, and how they came about
figure4.svg          the same to look at
==================== =============================================================================
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import charts, condense, evaluate, paper
from ._budget import parse_duration
from ._jobs import evaluations_by_iterations
from ._making import command_of
from .condense import CondenseConfig
from .data import canonical_name
from .data import load as load_data
from .devices import PRECISIONS
from .errors import InputError, check_out, check_seed, choose
from .evaluate import EvaluateConfig
from .files import write_bytes
from .gradient_matching import loops_of
from .presets import METHODS, PRESETS, preset
from .runs import RunFolder, locked
from .training import PROTOCOLS

FIGURE_NAME = "figure4"
DEFAULT_BUDGET = "10m"
_METHODS = ("dm", "dsa")
_POINTS = (10, 30, 100, 300, 1000, 3000, 10_000, 20_000)
_LEAST_STEP = 1.1  # a last point nearer to the one before says nothing new


def parse_iterations(text: str | None) -> tuple[int, ...] | None:
    """From ``100,300,1000``.

    Raises:
        InputError: it is no list of whole numbers.
    """
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise InputError(
            f"--iterations must be whole numbers divided by commas, got {text!r}"
        ) from error


@dataclass(frozen=True)
class FigureConfig:
    """The options of the figure, named as on the command line.

    ``budget`` is what the condensing of each method may take, 10 minutes where neither it nor
    ``iterations`` is given; ``iterations`` are those after which both are evaluated, in rising
    order. The rest is as in :class:`dmfast.reproduce.TableConfig`, ``networks`` are trained at each
    point.

    Raises:
        InputError: on values out of range, or options that exclude each other.
    """

    dataset: str = "mnist"
    ipc: int = 1
    budget: str | None = None
    iterations: tuple[int, ...] | None = None
    networks: int = 5
    epochs: int | None = None
    preset: str = "paper"
    model: str | None = None
    precision: str = "auto"
    device: str = "auto"
    seed: int = 0
    data_root: str | None = None
    out: str = "runs/figure4"
    resume: bool = False
    overwrite: bool = False
    cache: bool = True
    download: bool = False

    def __post_init__(self) -> None:
        choose("--preset", self.preset, PRESETS)
        choose("--precision", self.precision, PRECISIONS)
        if self.budget is not None:
            parse_duration("--budget", self.budget)
        if self.iterations is not None:
            steps = (0, *self.iterations)
            if len(steps) == 1 or any(a >= b for a, b in pairwise(steps)):
                raise InputError(
                    "--iterations must be 1 or more, each more than the one before, got "
                    + (", ".join(map(str, self.iterations)) or "none")
                )
        for name, low in (("ipc", 1), ("networks", 1), ("epochs", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name} must be {low} or more, got {value}")
        check_seed(self.seed)
        check_out(self.out)
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other: leave one out")


def run_figure(config: FigureConfig, *, command: str | None = None) -> dict[str, Any]:
    """Does what ``python -m dmfast.reproduce figure4`` does; returns what its JSON file holds.

    The time of a point is that of its iterations alone: evaluation is not in it. With a budget the
    last point of a curve is as far as the rate so far lets expect it to reach.

    Args:
        command: the command line to name in the file, if there was one.

    Raises:
        InputError: an option or the data cannot be used, or they do not fit what the folder holds.
    """
    out = Path(config.out)
    curves = [_Curve(config, method) for method in _METHODS]
    # What cannot be used is to leave nothing behind.
    load_data(config.dataset, config.data_root, cache=config.cache, download=config.download)
    with locked(out):
        _begin(config, out)
        for curve in curves:
            curve.check()
        for curve in curves:
            for _ in curve.points_made():
                _write(out, _content(config, command, curves))
        content = _content(config, command, curves)
        _write(out, content)
    for method, curve in content["curves"].items():
        last = curve["points"][-1]
        print(
            f"{method}: {last['accuracy_mean']:.1f} % after {last['iterations']:,} iterations, "
            f"{last['seconds']:.0f} s"
        )
    print(f"{FIGURE_NAME}: {_json(out)}, {out / FIGURE_NAME}.svg")
    return content


def _write(out: Path, content: dict[str, Any]) -> None:
    write_bytes(_json(out), (json.dumps(content, indent=1) + "\n").encode())
    _draw(out / f"{FIGURE_NAME}.svg", content)


def _json(out: Path) -> Path:
    return out / f"{FIGURE_NAME}.json"


def _begin(config: FigureConfig, out: Path) -> None:
    """Raises InputError where there is a figure that is neither to be continued nor replaced."""
    path = _json(out)
    if path.exists():
        try:
            if json.loads(path.read_text(encoding="utf-8"))["figure"] != FIGURE_NAME:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{path} is no figure of this program; choose another --out, or move it"
            ) from error
        if not (config.resume or config.overwrite):
            raise InputError(
                f"{path} is there: --resume continues the figure, --overwrite replaces it; or "
                "choose another --out"
            )
    if config.overwrite and path.exists():
        for method in _METHODS:
            shutil.rmtree(out / method, ignore_errors=True)
        path.unlink()
    if not path.exists():
        write_bytes(path, (json.dumps({"figure": FIGURE_NAME, "curves": {}}) + "\n").encode())


class _Curve:
    """One method: what was made of it, and making more."""

    def __init__(self, config: FigureConfig, method: str) -> None:
        self._config, self.method = config, method
        self._dataset = canonical_name(config.dataset)
        self._folder = Path(config.out) / method
        self._run = RunFolder(self._folder)
        self._preset = config.preset if method == "dm" else "paper"
        self._budget: float | None = None
        if config.budget is not None or config.iterations is None:
            self._budget = parse_duration("--budget", config.budget or DEFAULT_BUDGET)
        if method != "dm":
            loops_of(config.ipc, None, None)  # where there are none, nothing is to be begun

    def check(self) -> None:
        """Raises InputError where points that are there were made of other trainings."""
        epochs = self._config.epochs
        epochs = PROTOCOLS["published"].epochs if epochs is None else epochs
        for at, found in self._evaluations().items():
            if found.get("epochs") != epochs:
                raise InputError(
                    f"{self._folder} was evaluated with --epochs {found.get('epochs')} after {at} "
                    f"iterations, not {epochs}: give the same, choose another --out, or start anew "
                    "with --overwrite"
                )

    def points_made(self) -> Iterator[None]:
        """Condenses and evaluates point after point; gives back control after each."""
        last = preset(self._dataset, self._config.ipc, self._preset, self.method).iterations
        usual = (*(n for n in _POINTS if n < last), last)
        for target in self._config.iterations or usual:
            reached = self._reached(target)
            if reached is None:
                break
            if reached <= target:  # else the run has passed it
                self._make_point(reached)
                yield
            if reached < target:
                break
        # Where an earlier call ended in the midst, and there is no time for more.
        done, _ = self._run.read_progress()
        if done not in self._evaluations():
            self._make_point(done)
            yield

    def _reached(self, target: int) -> int | None:
        """How many iterations there will be in place of ``target``; None: no time for any."""
        done, seconds = self._run.read_progress()
        if done >= target or done == 0 or self._budget is None:
            return max(done, target)
        affordable = done + int((self._budget - seconds) * done / seconds)
        if affordable < min(target, _LEAST_STEP * done):
            return None
        return min(target, affordable)

    def _make_point(self, iterations: int) -> None:
        print(f"{self.method}: {iterations:,} iterations", flush=True)
        condense.run(self._condense_config(iterations))
        evaluation = self._evaluate_config(iterations)
        evaluate.run(evaluation, command=command_of("dmfast.evaluate", evaluation, "set"))

    @property
    def _shared(self) -> dict[str, Any]:
        config = self._config
        names = ("data_root", "precision", "device", "seed", "model", "cache", "download")
        return {name: getattr(config, name) for name in names} | {"dataset": self._dataset}

    def _condense_config(self, iterations: int) -> CondenseConfig:
        return CondenseConfig(
            method=self.method,
            ipc=self._config.ipc,
            iterations=iterations,
            preset=self._preset,
            out=str(self._folder),
            resume=self._run.holds_run(),
            **self._shared,
        )

    def _evaluate_config(self, iterations: int) -> EvaluateConfig:
        there = self._evaluations().get(iterations, {"accuracies": []})
        return EvaluateConfig(
            set=str(self._folder),
            # What there is more of is not thrown away.
            networks=max(self._config.networks, len(there["accuracies"])),
            epochs=self._config.epochs,
            out=str(self._folder / f"{iterations}-iterations"),
            **self._shared,
        )

    def _evaluations(self) -> dict[int, dict[str, Any]]:
        return evaluations_by_iterations(self._folder)

    def content(self) -> dict[str, Any] | None:
        """The curve as the file has it; None where there is no point yet."""
        seconds = {r["iteration"]: r["seconds"] for r in self._run.read_metrics() if "loss" in r}
        kept = ("accuracy_mean", "accuracy_std", "accuracies", "networks", "epochs", "augmentation")
        points = [
            {"iterations": at, "seconds": seconds[at], **{key: found[key] for key in kept}}
            for at, found in sorted(self._evaluations().items())
            if at in seconds
        ]
        if not points:
            return None
        last = points[-1]["iterations"]
        described = json.loads(self._run.config.read_text(encoding="utf-8"))
        return {
            "points": points,
            "options": described["options"],
            "versions": described["versions"],
            "machine": described["machine"],
            "commands": [
                command_of("dmfast.condense", replace(self._condense_config(last), resume=False)),
                command_of("dmfast.evaluate", self._evaluate_config(last), "set"),
            ],
        }


def _content(config: FigureConfig, command: str | None, curves: Sequence[_Curve]) -> dict[str, Any]:
    skipped = {"resume", "overwrite"}
    made = {curve.method: found for curve in curves if (found := curve.content())}
    return {
        "figure": FIGURE_NAME,
        "command": command,
        "options": {name: v for name, v in asdict(config).items() if name not in skipped},
        "paper": paper.FIGURE4,
        "curves": made,
    }


def _draw(path: Path, content: dict[str, Any]) -> None:
    options = content["options"]
    curves = {
        METHODS[method]: [
            (point["seconds"], point["accuracy_mean"], point["accuracy_std"])
            for point in curve["points"]
        ]
        for method, curve in content["curves"].items()
    }
    ipc = options["ipc"]
    charts.save_accuracy_over_time(
        path,
        curves,
        f"condensing {Path(options['dataset']).name} to {ipc} image{'s' if ipc > 1 else ''} a "
        "class, seconds without evaluation",
    )

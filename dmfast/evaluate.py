# SPDX-License-Identifier: MIT
"""Trains freshly drawn networks on a few images, or on all, and tests them on real images.

``python -m dmfast.evaluate SET --dataset NAME``, and :func:`run` for the same job from Python.
Each network is a pure function of the seed and its own number, so how many others there are
changes nothing, and an interrupted evaluation continues where it was.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.evaluate")

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from . import cli
from ._formats import is_folder_of_pictures
from ._own import model_file
from ._own import short_name as short_model_name
from ._sources import BASELINES, Source, digest, note, source_of
from ._version import __version__
from .augment import WORDS, parse_strategy
from .devices import PRECISIONS, machine
from .errors import InputError, check_out, check_seed, choose
from .evaluator import EvaluationResult, Evaluator, evaluate_set
from .files import write_bytes
from .graphs import GRAPHS
from .memory import keep_freed_pages
from .networks import MODELS, get_network
from .presets import EVALUATION_MODES, evaluation_networks, preset
from .runs import interrupts_deferred, locked
from .training import PROTOCOLS

__all__ = ["BASELINES", "EvaluateConfig", "EvaluationResult", "evaluate_set", "run", "run_mode"]


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of an evaluation, named as on the command line.

    Where None, ``dataset``, ``model`` and ``dsa_strategy`` (words joined by underscores; "" for no
    augmentation) are what the set says it was condensed with, the latter two else the data set's
    presets, ``networks`` and ``epochs`` are the protocol's (fewer epochs of the whole set), and
    ``out`` is the folder of the set. One of ``set``, ``indices`` (a file), ``baseline`` and
    ``whole`` says what to train on.

    Raises:
        InputError: on values out of range, or options that exclude each other.
    """

    set: str | None = None
    dataset: str | None = None
    data_root: str | None = None
    indices: str | None = None
    baseline: str | None = None
    ipc: int | None = None
    whole: bool = False
    model: str | None = None
    networks: int | None = None
    epochs: int | None = None
    seed: int = 0
    dsa_strategy: str | None = None
    protocol: str = "published"
    precision: str = "auto"
    device: str = "auto"
    networks_at_once: int | None = None
    graph: str = "auto"
    out: str | None = None
    overwrite: bool = False
    cache: bool = True
    download: bool = False
    experiment: int = -1
    unsafe: bool = False

    def __post_init__(self) -> None:
        given = [
            words
            for words, there in (
                (self.set, self.set is not None),
                ("--indices", self.indices is not None),
                ("--baseline", self.baseline is not None),
                ("--whole", self.whole),
            )
            if there
        ]
        if not given:
            raise InputError(
                "nothing to evaluate: name a SET, or give --indices FILE, --baseline random "
                "--ipc N or --whole"
            )
        if len(given) > 1:
            raise InputError(f"{given[0]} and {given[1]} exclude each other: leave one out")
        if self.baseline is None:
            if self.ipc is not None:
                raise InputError(
                    f"--ipc goes with --baseline random; {given[0]} has its own number"
                )
        else:
            choose("--baseline", self.baseline, BASELINES)
            if self.ipc is None or self.ipc < 1:
                raise InputError(f"--baseline random needs --ipc of 1 or more, got {self.ipc}")
        choose("--protocol", self.protocol, PROTOCOLS)
        choose("--graph", self.graph, GRAPHS)
        if self.networks_at_once is not None and self.networks_at_once < 1:
            raise InputError(f"--networks-at-once must be 1 or more, got {self.networks_at_once}")
        check_out(self.out)
        if self.networks is not None and self.networks < 1:
            raise InputError(f"--networks must be 1 or more, got {self.networks}")
        if self.epochs is not None and self.epochs < 0:
            raise InputError(f"--epochs must be 0 or more, got {self.epochs}")
        check_seed(self.seed)


def run(config: EvaluateConfig, *, command: str | None = None) -> EvaluationResult:
    """Does what ``python -m dmfast.evaluate`` does: leaves ``evaluation.json`` in a folder.

    Networks are trained some at a time; after them, what is known so far is written to
    ``evaluation.partial.json``, from which the same call continues. A finished evaluation is
    extended to more networks in the same way; one that has them all is read, not repeated.

    Args:
        command: the command line to name in the file, if there was one.

    Raises:
        InputError: the set, the data or an option cannot be used, they do not fit each other, or
            the folder holds another evaluation.
    """
    source = source_of(config)
    folder = Path(config.out) if config.out else source.folder
    with locked(folder):
        return _run(config, source, folder, command)


def run_mode(
    config: EvaluateConfig, mode: str, *, command: str | None = None
) -> dict[str, EvaluationResult]:
    """Does what ``python -m dmfast.evaluate SET --eval-mode MODE`` does: several networks in turn.

    Each is evaluated as :func:`run` does, in a folder of its name in ``out``, by default that of
    the set (of a folder of pictures, one beside it); those that are there are not repeated.

    Args:
        mode: one of :data:`dmfast.presets.EVALUATION_MODES`.
        command: the command line to name in the files, if there was one.

    Returns:
        The results by the networks' names, without those that are not for images of such a size.

    Raises:
        InputError: as :func:`run`; or a model is named, or none of the networks is for the images.
    """
    if config.model is not None:
        raise InputError("--eval-mode and --model exclude each other: leave one out")
    source = source_of(config)
    data, results = source.data, dict[str, EvaluationResult]()
    folder = source.folder if config.out is None else Path(config.out)
    if config.out is None and config.set is not None and is_folder_of_pictures(folder):
        folder = folder.with_name(f"{folder.name}-evaluation")  # folders in it are classes
    why = ""
    for model in evaluation_networks(mode, _model_of(source)):
        try:
            get_network(model, data.channels, data.classes, data.size, seed=0)
        except InputError as error:
            why = str(error)
            note(f"{model} is left out: {why}")
            continue
        print(f"{model}:", flush=True)
        out = folder / short_model_name(model)
        with locked(out):
            results[model] = _run(replace(config, model=model), source, out, command)
    if not results:
        raise InputError(f"--eval-mode {mode} has no network for this set: {why}")
    longest = max(map(len, results))
    for model, result in results.items():
        print(f"{model:{longest}} {result.accuracy_mean:6.2f} % +- {result.accuracy_std:.2f}")
    return results


def _model_of(source: Source) -> str:
    """The network that a set was condensed on, or is usual."""
    named = source.config.get("model")
    return named if isinstance(named, str) else preset(source.data.name, int(source.ipc)).model


def _run(
    config: EvaluateConfig, source: Source, folder: Path, command: str | None
) -> EvaluationResult:
    model = _model_of(source) if config.model is None else config.model
    usual = preset(source.data.name, int(source.ipc)).dsa_strategy
    strategies = (config.dsa_strategy, source.config.get("dsa_strategy"), usual)
    strategy = next(value for value in strategies if isinstance(value, str))
    augmentation = "_".join(parse_strategy(strategy))
    protocol = PROTOCOLS[config.protocol]
    usual_epochs = protocol.epochs if augmentation else protocol.plain_epochs
    epochs = next(n for n in (config.epochs, source.epochs, usual_epochs) if n is not None)
    networks = protocol.networks if config.networks is None else config.networks
    evaluator = Evaluator(
        source.data,
        model=model,
        epochs=epochs,
        seed=config.seed,
        strategy=augmentation,
        precision=config.precision,
        device=config.device,
        protocol=config.protocol,
        learning_rate=source.learning_rate,
        networks_at_once=config.networks_at_once,
        graph=config.graph,
        note=note,
    )
    record = _Record(
        folder,
        identity={
            "dataset": source.data.name,
            "images_per_class": source.ipc,
            "baseline": source.baseline,
            "training_images": source.training_images,
            "test_images": digest(source.data.test_images, source.data.test_labels),
            "normalisation": [source.data.mean, source.data.std],
            "model": model,
            "protocol": config.protocol,
            "epochs": epochs,
            "augmentation": augmentation or "none",
            "seed": config.seed,
            "precision": evaluator.precision,
            "versions": {"dmfast": __version__, "torch": torch.__version__},
            **({} if model_file(model) is None else {"model_file": model_file(model)}),
        },
        facts={
            "set": config.set,
            "indices": config.indices,
            "labels": "softmax of the set's scores" if source.soft_labels else "hard",
            "learning_rate": evaluator.learning_rate,
            "accuracy_of": protocol.accuracy_of,
            "machine": machine(evaluator.device),
            "command": command,
        },
    )
    result = record.read(networks, config.overwrite)
    if len(result.accuracies) == networks:
        note("this evaluation is there already; nothing was trained")
        if record.partial.exists():  # it was stopped between its last network and its end
            record.finish(result)
    else:
        record.write(result)  # where that fails it is to fail now
        result = _evaluate_rest(evaluator, source, networks, epochs, record, result)
        record.finish(result)
    print(_summary(result, record.final))
    return result


def _evaluate_rest(
    evaluator: Evaluator,
    source: Source,
    networks: int,
    epochs: int,
    record: _Record,
    result: EvaluationResult,
) -> EvaluationResult:
    """Evaluates the networks that ``result`` lacks, some at once, and keeps what they give."""
    from tqdm import tqdm

    first = len(result.accuracies)
    start = time.perf_counter()
    total = (networks - first) * (epochs + 1)
    try:
        with tqdm(total=total, unit="epoch", disable=None, dynamic_ncols=True) as bar:
            while (index := len(result.accuracies)) < networks:
                began = time.perf_counter()
                sets = [source.images_of(index)]
                at_once = min(evaluator.networks_at_once(len(sets[0][1])), networks - index)
                sets += [source.images_of(other) for other in range(index + 1, index + at_once)]
                which = _which(index, index + at_once)
                bar.set_description(f"{which}/{networks}")
                accuracies = evaluator(sets, index, bar.update)
                now = time.perf_counter()
                with interrupts_deferred():
                    result = EvaluationResult(
                        (*result.accuracies, *accuracies), result.seconds + now - began
                    )
                    record.write(result)
                done = len(result.accuracies)
                left = (now - start) / (done - first) * (networks - done)
                found = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
                with bar.external_write_mode():
                    print(
                        f"{which} of {networks}: {found} %, {now - began:.0f} s; "
                        f"{timedelta(seconds=round(left))} left",
                        flush=True,
                    )
    except KeyboardInterrupt:
        done = len(result.accuracies)
        print(
            f"{done} of {networks} networks are done and kept in {record.partial}; the same "
            "command "
            + (
                f"continues with network {done + 1}, from its first epoch"
                if done < networks
                else "finishes the evaluation"
            ),
            file=sys.stderr,
        )
        raise
    return result


def _which(first: int, end: int) -> str:
    """Networks ``first`` to ``end - 1``, counted from 1."""
    return f"network {end}" if end == first + 1 else f"networks {first + 1} to {end}"


class _Record:
    """The evaluation in a folder: ``evaluation.json``, or a partial one under way."""

    def __init__(self, folder: Path, identity: dict[str, Any], facts: dict[str, Any]) -> None:
        """``identity`` is what the accuracies follow from, ``facts`` is told beside them."""
        self.final = folder / "evaluation.json"
        self.partial = folder / "evaluation.partial.json"
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._facts = facts

    def read(self, networks: int, overwrite: bool) -> EvaluationResult:
        """What is known of the first ``networks``; removes what else there is if ``overwrite``."""
        known = EvaluationResult((), 0.0)
        for path in (self.final, self.partial):
            if not path.exists():
                continue
            result, there = self._parse(path)
            try:
                self._check(path, result, there, networks)
            except InputError:
                if not overwrite:
                    raise
                path.unlink()
            else:
                known = max(known, result, key=lambda result: len(result.accuracies))
        return known

    def _parse(self, path: Path) -> tuple[EvaluationResult, dict[str, Any]]:
        """The accuracies in the file, and what they follow from."""
        try:
            content = json.loads(path.read_text())
            result = EvaluationResult(
                tuple(map(float, content["accuracies"])), float(content["seconds"])
            )
            return result, {key: content[key] for key in self._identity}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is no evaluation of this program; name another --out, or move it"
            ) from error

    def _check(
        self, path: Path, result: EvaluationResult, there: dict[str, Any], networks: int
    ) -> None:
        """Raises InputError where the file is of another evaluation, or of more networks."""
        remedy = "name another --out, or give --overwrite"
        differences = [
            f"{key} is {there[key]!r}, not {value!r}"
            for key, value in self._identity.items()
            if there[key] != value
        ]
        if differences:
            raise InputError(
                f"{path} is of another evaluation ({'; '.join(differences)}); {remedy}"
            )
        if len(result.accuracies) > networks:
            raise InputError(
                f"{path} has {len(result.accuracies)} networks of this evaluation already; ask for "
                f"as many or more, {remedy}"
            )

    def write(self, result: EvaluationResult) -> None:
        """Keeps the networks evaluated so far."""
        self._write(self.partial, result)

    def finish(self, result: EvaluationResult) -> None:
        """Keeps all of them."""
        with interrupts_deferred():
            self._write(self.final, result)
            self.partial.unlink()

    def _write(self, path: Path, result: EvaluationResult) -> None:
        statistics = (
            {
                "accuracy_mean": result.accuracy_mean,
                "accuracy_std": result.accuracy_std,
                "interval_95": result.interval_95,
            }
            if result.accuracies
            else {}
        )
        content = {
            **statistics,
            "accuracies": result.accuracies,
            "networks": len(result.accuracies),
            **self._identity,
            **self._facts,
            "seconds": round(result.seconds, 3),
        }
        try:
            write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise InputError(
                f"{path} cannot be written: {'; '.join(cli.disk_words(error))}"
            ) from error


def _summary(result: EvaluationResult, path: Path) -> str:
    interval = result.interval_95
    return (
        f"{result.accuracy_mean:.2f} % +- {result.accuracy_std:.2f} over "
        f"{len(result.accuracies)} networks"
        + (
            f" (95 % interval of the mean: {interval[0]:.2f} to {interval[1]:.2f})"
            if interval
            else ""
        )
        + f"; {path}"
    )


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "dmfast.evaluate",
        "Trains freshly drawn networks on a condensed set, or on real images, and tests them on "
        "the real test images.",
    )
    default = EvaluateConfig
    parser.add_argument(
        "set",
        metavar="SET",
        nargs="?",
        help="a run's folder, a set in any format of this package, or a folder of pictures for "
        "each class",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="the real images: a known name, a path or hf:owner/name (default: what SET says)",
    )
    parser.add_data_root()
    parser.add_argument(
        "--indices",
        metavar="FILE",
        help="train on the real images listed there in place of a SET: numbers from 0 in the "
        "training set, as JSON (as coreset.json has them) or words",
    )
    parser.add_argument(
        "--baseline",
        choices=BASELINES,
        help="train on that in place of a SET: random real images, others for each network",
    )
    parser.add_argument(
        "--whole", action="store_true", help="train on the whole real set: the upper bound"
    )
    parser.add_argument("--ipc", metavar="N", type=int, help="images a class, of a baseline")
    parser.add_argument(
        "--model", metavar="NAME", help=f"{MODELS} (default: as SET says, else the preset)"
    )
    parser.add_argument(
        "--eval-mode",
        choices=EVALUATION_MODES,
        help="in place of --model, each network of a published mode, in a folder of its name; "
        + "; ".join(f"{mode}: {what}" for mode, what in EVALUATION_MODES.items()),
    )
    parser.add_argument(
        "--networks", metavar="N", type=int, help="how many to train (default: the protocol, 20)"
    )
    parser.add_argument(
        "--epochs",
        metavar="E",
        type=int,
        help="train epochs 0 to E, as the published option does (default: the protocol, 1000; of "
        "the whole set 50)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=default.seed, help="of all draws")
    parser.add_augmentation(
        WORDS,
        "default: as SET says, else the preset",
        "train without, as the paper's random rows seem to be",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=default.protocol,
        help="how networks are trained and which accuracy counts; dc-bench: as published, but 5 "
        "networks, and 300 epochs without augmentation; best-epoch: as published, but the best of "
        "every 20th epoch and the last, which the test images choose",
    )
    parser.add_passes(PRECISIONS, default)
    parser.add_argument(
        "--networks-at-once",
        metavar="N",
        type=int,
        help="how many are trained together, where they are made of fused blocks (default: as many "
        "as are of use); the accuracies are the same, beyond rounding on a GPU",
    )
    parser.add_argument(
        "--graph",
        choices=GRAPHS,
        default=default.graph,
        help="capture an epoch on a GPU in a CUDA graph and replay it; required: or fail",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of evaluation.json (default: that of SET or FILE; "
        "runs/NAME-random-ipcN-seedN, runs/NAME-whole-seedN)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another evaluation in the folder"
    )
    parser.add_loading()
    parser.add_argument(
        "--experiment",
        metavar="N",
        type=int,
        default=default.experiment,
        help="which set of a published res_*.pt file; -1 is the last",
    )
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="let a .pt file run the code it asks for: for files you trust only",
    )
    return parser


def _main(arguments: Sequence[str]) -> None:
    options = vars(_parser().parse_args(arguments))
    mode = options.pop("eval_mode")
    config = EvaluateConfig(**options)
    command = shlex.join(["python", "-m", "dmfast.evaluate", *arguments])
    keep_freed_pages()
    if mode is None:
        run(config, command=command)
    else:
        run_mode(config, mode, command=command)

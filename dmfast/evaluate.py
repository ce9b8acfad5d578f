# SPDX-License-Identifier: MIT
"""Trains freshly drawn networks on a condensed set and tests them on real images.

``python -m dmfast.evaluate SET --dataset NAME``, and :func:`run` for the same job from Python.
Each network is a pure function of the seed and its own number, so how many others there are
changes nothing, and an interrupted evaluation continues where it was.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.evaluate")

import hashlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cli, ops
from ._version import __version__
from .augment import WORDS, parse_strategy
from .data import ImageData
from .data import load as load_data
from .devices import PRECISIONS, machine
from .errors import InputError, choose
from .files import write_bytes
from .memory import keep_freed_pages
from .ops import Stream
from .presets import preset
from .runs import locked
from .synthetic import SyntheticSet
from .training import PROTOCOLS, EvaluationResult, Evaluator, evaluate_set

__all__ = ["BASELINES", "EvaluateConfig", "EvaluationResult", "evaluate_set", "run"]

#: What can be trained on in place of a condensed set.
BASELINES = {"random": "random real images, drawn anew for each network"}


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of an evaluation, named as on the command line.

    Where None, ``dataset``, ``model`` and ``dsa_strategy`` (words joined by underscores; "" for no
    augmentation) are what the set says it was condensed with, the latter two else the data set's
    presets, and ``out`` is the folder of the set.

    Raises:
        InputError: on values out of range, or options that exclude each other.
    """

    set: str | None = None
    dataset: str | None = None
    data_root: str | None = None
    baseline: str | None = None
    ipc: int | None = None
    model: str | None = None
    networks: int = 20
    epochs: int = 1000
    seed: int = 0
    dsa_strategy: str | None = None
    protocol: str = "published"
    precision: str = "auto"
    device: str = "auto"
    out: str | None = None
    overwrite: bool = False
    cache: bool = True
    download: bool = False
    experiment: int = -1
    unsafe: bool = False

    def __post_init__(self) -> None:
        if self.baseline is None:
            if self.set is None:
                raise InputError(
                    "nothing to evaluate: name a SET, or give --baseline random --ipc N"
                )
            if self.ipc is not None:
                raise InputError("--ipc goes with --baseline random; a SET has its own number")
        else:
            choose("--baseline", self.baseline, BASELINES)
            if self.set is not None:
                raise InputError(f"{self.set} and --baseline exclude each other: leave one out")
            if self.ipc is None or self.ipc < 1:
                raise InputError(f"--baseline random needs --ipc of 1 or more, got {self.ipc}")
        choose("--protocol", self.protocol, PROTOCOLS)
        if self.out == "":
            raise InputError("--out is empty: name a folder, or leave it out")
        if self.networks < 1:
            raise InputError(f"--networks must be 1 or more, got {self.networks}")
        if self.epochs < 0:
            raise InputError(f"--epochs must be 0 or more, got {self.epochs}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed must be from 0 to 2**63 - 1, got {self.seed}")


def run(config: EvaluateConfig, *, command: str | None = None) -> EvaluationResult:
    """Does what ``python -m dmfast.evaluate`` does: leaves ``evaluation.json`` in a folder.

    After each network, what is known so far is written to ``evaluation.partial.json``, from which
    the same call continues. A finished evaluation is extended to more networks in the same way;
    one that has them all is read, not repeated.

    Args:
        command: the command line to name in the file, if there was one.

    Raises:
        InputError: the set, the data or an option cannot be used, they do not fit each other, or
            the folder holds another evaluation.
    """
    source = _random(config) if config.set is None else _condensed(config, config.set)
    folder = Path(config.out) if config.out else source.folder
    with locked(folder):
        return _run(config, source, folder, command)


def _run(
    config: EvaluateConfig, source: _Source, folder: Path, command: str | None
) -> EvaluationResult:
    presets = preset(source.data.name, int(source.ipc))
    model, strategy = (
        next(value for value in values if isinstance(value, str))
        for values in (
            (config.model, source.config.get("model"), presets.model),
            (config.dsa_strategy, source.config.get("dsa_strategy"), presets.dsa_strategy),
        )
    )
    augmentation = "_".join(parse_strategy(strategy))
    evaluator = Evaluator(
        source.data,
        model=model,
        epochs=config.epochs,
        seed=config.seed,
        strategy=augmentation,
        precision=config.precision,
        device=config.device,
        protocol=config.protocol,
    )
    record = _Record(
        folder,
        identity={
            "dataset": source.data.name,
            "images_per_class": source.ipc,
            "baseline": BASELINES.get(config.baseline or ""),
            "training_images": source.training_images,
            "test_images": _digest(source.data.test_images, source.data.test_labels),
            "normalisation": [source.data.mean, source.data.std],
            "model": model,
            "protocol": config.protocol,
            "epochs": config.epochs,
            "augmentation": augmentation or "none",
            "seed": config.seed,
            "precision": evaluator.precision,
            "versions": {"dmfast": __version__, "torch": torch.__version__},
        },
        facts={"set": config.set, "machine": machine(evaluator.device), "command": command},
    )
    result = record.read(config.networks, config.overwrite)
    if len(result.accuracies) == config.networks:
        _note("this evaluation is there already; nothing was trained")
    else:
        record.write(result)  # where that fails it is to fail now
        result = _evaluate_rest(evaluator, source, config, record, result)
        record.finish(result)
    print(_summary(result, record.final))
    return result


def _evaluate_rest(
    evaluator: Evaluator,
    source: _Source,
    config: EvaluateConfig,
    record: _Record,
    result: EvaluationResult,
) -> EvaluationResult:
    """Evaluates the networks that ``result`` lacks, one after another, and keeps each."""
    from tqdm import tqdm

    first = len(result.accuracies)
    start = time.perf_counter()
    total = (config.networks - first) * (config.epochs + 1)
    try:
        with tqdm(total=total, unit="epoch", disable=None, dynamic_ncols=True) as bar:
            for index in range(first, config.networks):
                bar.set_description(f"network {index + 1}/{config.networks}")
                began = time.perf_counter()
                accuracy = evaluator(*source.images_of(index), index, bar.update)
                now = time.perf_counter()
                result = EvaluationResult(
                    (*result.accuracies, accuracy), result.seconds + now - began
                )
                record.write(result)
                left = (now - start) / (index + 1 - first) * (config.networks - index - 1)
                with bar.external_write_mode():
                    print(
                        f"network {index + 1} of {config.networks}: {accuracy:.2f} %, "
                        f"{now - began:.0f} s; {timedelta(seconds=round(left))} left",
                        flush=True,
                    )
    except KeyboardInterrupt:
        print(
            f"{len(result.accuracies)} of {config.networks} networks are done and kept in "
            f"{record.partial}; the same command continues with the next",
            file=sys.stderr,
        )
        raise
    return result


@dataclass(frozen=True)
class _Source:
    """What the networks train on: ``images_of(index)`` gives the images and labels of each."""

    data: ImageData
    ipc: float
    images_of: Callable[[int], tuple[Tensor, Tensor]]
    training_images: str  # a digest of all that images_of follows from
    folder: Path  # of the result, where the user names none
    config: dict[str, Any]  # how the set was made, as far as it says


def _condensed(config: EvaluateConfig, path: str) -> _Source:
    name = config.dataset
    if name is None:
        recorded = SyntheticSet.load(path, config.experiment, config.unsafe).config.get("dataset")
        if not isinstance(recorded, str):
            raise InputError(f"{path} does not say what it was condensed from: give --dataset NAME")
        name = recorded
    try:
        data = load_data(name, config.data_root, cache=config.cache, download=config.download)
    except InputError as error:
        if config.dataset is not None:
            raise
        raise InputError(
            f"{error} ({path} says that it was condensed from {name}: give --dataset where that is "
            "called otherwise here)"
        ) from error
    synthetic = SyntheticSet.load(
        path, config.experiment, config.unsafe, mean=data.mean, std=data.std
    )
    _check_fit(path, synthetic, data)
    if not (_close(synthetic.mean, data.mean) and _close(synthetic.std, data.std)):
        _note(
            f"{path} is normalised by mean {synthetic.mean} and std {synthetic.std}, {data.name} "
            f"by {data.mean} and {data.std}; the test images are normalised as the set is"
        )
        data = replace(data, mean=synthetic.mean, std=synthetic.std)
    if synthetic.learning_rate is not None:
        _note(
            f"{path} came with a learning rate of {synthetic.learning_rate:g}; the protocol "
            f"{config.protocol} trains with {PROTOCOLS[config.protocol].learning_rate:g}"
        )
    images, labels = synthetic.images, synthetic.labels
    return _Source(
        data,
        _plain(len(labels) / data.classes),
        lambda index: (images, labels),
        _digest(images, labels),
        Path(path) if Path(path).is_dir() else Path(path).parent,
        synthetic.config,
    )


def _random(config: EvaluateConfig) -> _Source:
    assert config.ipc is not None
    data = load_data(
        config.dataset or "digits", config.data_root, cache=config.cache, download=config.download
    )
    order, class_offsets = data.by_class()
    sizes = class_offsets.diff()
    if config.ipc > sizes.min():
        raise InputError(
            f"--ipc {config.ipc}: class {data.class_names[int(sizes.argmin())]!r} of {data.name} "
            f"has {int(sizes.min())} images; ask for at most that many"
        )
    offsets, rows = data.batch_offsets(config.ipc)

    def images_of(index: int) -> tuple[Tensor, Tensor]:
        drawn = ops.draw_batch(
            order,
            class_offsets,
            offsets,
            rows,
            config.seed,
            index,
            stream=Stream.EVALUATION_INITIAL_IMAGES,
        )
        return data.normalise(data.train_images[drawn]), data.train_labels[drawn]

    words = [re.sub(r"[^\w-]+", "-", Path(data.name).name), "random"]
    words += [f"ipc{config.ipc}", f"seed{config.seed}"]
    if config.dsa_strategy is not None and not parse_strategy(config.dsa_strategy):
        words.append("no-augmentation")
    return _Source(
        data,
        config.ipc,
        images_of,
        _digest(data.train_images, data.train_labels),
        Path("runs", "-".join(words)),
        {},
    )


def _check_fit(path: str, synthetic: SyntheticSet, data: ImageData) -> None:
    shape, expected = list(synthetic.images.shape[1:]), [data.channels, *data.size]
    if shape != expected:
        raise InputError(
            f"{path} has images of {_shape_words(shape)}, {data.name} of {_shape_words(expected)}: "
            "give the --dataset it was condensed from"
        )
    if synthetic.classes != data.classes:
        raise InputError(
            f"{path} has {synthetic.classes} classes, {data.name} has {data.classes}: give the "
            "--dataset it was condensed from"
        )
    names = synthetic.class_names
    if names != data.class_names and sorted(names) == sorted(data.class_names):
        raise InputError(
            f"{path} numbers the classes of {data.name} in another order ({', '.join(names[:3])}, "
            f"... for {', '.join(data.class_names[:3])}, ...): reorder its labels"
        )
    for what, there in (
        ("soft labels", synthetic.soft_labels is not None),
        ("ZCA-whitened images", synthetic.zca),
        (f"images that hold {synthetic.factor}x{synthetic.factor} others", synthetic.factor != 1),
    ):
        if there:
            raise InputError(
                f"{path} has {what}, which no protocol here trains on; use a set without"
            )


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


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(a, b, strict=True))


def _plain(number: float) -> float:
    """An int where the number is whole."""
    return int(number) if number == int(number) else number


def _shape_words(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{height}x{width} pixels and {channels} channel{'s' if channels > 1 else ''}"


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


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
        "Trains freshly drawn networks on a condensed set and tests them on the real test images.",
    )
    default = EvaluateConfig
    parser.add_argument(
        "set",
        metavar="SET",
        nargs="?",
        help="a run's folder, or a set in any format of this package",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="the real images: a known name, a path or hf:owner/name (default: what SET says)",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="what holds the data set's folder or files (default: ./data, then $DMFAST_DATA)",
    )
    parser.add_argument(
        "--baseline",
        choices=BASELINES,
        help="train on that in place of a SET: random real images, others for each network",
    )
    parser.add_argument("--ipc", metavar="N", type=int, help="images a class, of a baseline")
    parser.add_argument(
        "--model", metavar="NAME", help="as ConvNetD4BN (default: as SET says, else the preset)"
    )
    parser.add_argument(
        "--networks", metavar="N", type=int, default=default.networks, help="how many to train"
    )
    parser.add_argument(
        "--epochs",
        metavar="E",
        type=int,
        default=default.epochs,
        help="train epochs 0 to E, as the published option does",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=default.seed, help="of all draws")
    strategy = parser.add_mutually_exclusive_group()
    strategy.add_argument(
        "--dsa-strategy",
        metavar="WORDS",
        help=f"{', '.join(WORDS)}, joined by underscores, or none (default: as SET says, else "
        "the preset)",
    )
    strategy.add_argument(
        "--no-augmentation",
        dest="dsa_strategy",
        action="store_const",
        const="none",
        help="train without, as the paper's random rows seem to be",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=default.protocol,
        help="how networks are trained",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=default.precision,
        help="of the networks' passes; auto is bfloat16 on a GPU, and on a CPU "
        "that has its instructions where the model is made of fused blocks",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        default=default.device,
        help="cpu, cuda, cuda:N, or auto (a GPU where there is one)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder of evaluation.json (default: that of SET; runs/NAME-random-ipcN-seedN)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another evaluation in the folder"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the data set where it is not found"
    )
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="keep no decoded images of the data set",
    )
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
    config = EvaluateConfig(**vars(_parser().parse_args(arguments)))
    keep_freed_pages()
    run(config, command=shlex.join(["python", "-m", "dmfast.evaluate", *arguments]))

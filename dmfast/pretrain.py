# SPDX-License-Identifier: MIT
"""Trains networks on the real set and keeps states on their way: the pools of Table 4.

``python -m dmfast.pretrain --dataset NAME``, and :func:`run` for the same job from Python. A state
is kept where the accuracy, on training images that are kept apart, is in a band of ten per cent for
the first time. ``dmfast.condense --networks-from POOL --band 40-50`` draws its networks from it.
:mod:`dmfast.pool` describes the folder.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.pretrain")

import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cli, pool
from ._own import is_own
from ._sources import digest, note, short_name
from ._version import __version__
from .augment import WORDS, parse_strategy
from .data import ImageData, NormalisedImages
from .data import load as load_data
from .devices import (
    PRECISIONS,
    autocast,
    machine,
    memory_format,
    resolve_device,
    resolve_precision,
)
from .errors import InputError, check_out, check_seed, choose
from .memory import keep_freed_pages
from .networks import Network, get_network, initialise_
from .ops import Stream
from .pool import State
from .presets import preset
from .runs import locked
from .training import Protocol, train

_WIDTH = 10.0  # of a band, in %
_FIRST_NETWORK = 2**25  # its number: one that no evaluated network and no coreset's has
_TEST_BATCH = 500
_STATE = re.compile(r"\d{4,}-\d{6,}\.safetensors")
_Keep = Callable[[Network, int, float], None]  # step and accuracy


@dataclass(frozen=True)
class PretrainConfig:
    """The options of a pool, named as on the command line.

    ``model`` and ``dsa_strategy`` (words joined by underscores; "" for no augmentation) are the
    data set's presets where None. ``validation`` images of the training set, the same for all
    networks, are kept apart. ``out`` is a folder in ``runs`` where None.

    Raises:
        InputError: on values out of range.
    """

    dataset: str = "digits"
    data_root: str | None = None
    model: str | None = None
    networks: int = 20
    epochs: int = 10
    validation: int = 1000
    dsa_strategy: str | None = None
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    out: str | None = None
    overwrite: bool = False
    cache: bool = True
    download: bool = False

    def __post_init__(self) -> None:
        choose("--precision", self.precision, PRECISIONS)
        for flag, value, least in (
            ("--networks", self.networks, 1),
            ("--epochs", self.epochs, 0),
            ("--validation", self.validation, 1),
        ):
            if value < least:
                raise InputError(f"{flag} must be {least} or more, got {value}")
        check_seed(self.seed)
        check_out(self.out)


def run(config: PretrainConfig, *, command: str | None = None) -> list[State]:
    """Does what ``python -m dmfast.pretrain`` does: leaves a pool in its folder.

    Interrupted, the same call goes on with the network that it was at; asked for more networks, it
    trains these. Each network is a pure function of the seed and its number.

    Args:
        command: the command line to name in the folder, if there was one.

    Returns:
        What the pool holds.

    Raises:
        InputError: an option or the data cannot be used, or the folder holds something else.
    """
    data, facts = _described(config)
    device = resolve_device(config.device)
    trainer = _Trainer(data, facts, device)
    folder = Path(config.out or f"runs/{short_name(data.name)}-pool-seed{config.seed}")
    with locked(folder):
        states = _begin(folder, facts, config.overwrite)
        done = pool.count_networks(states)
        if done >= config.networks:
            note(f"these {done} networks are there already; nothing was trained")
        facts |= {"machine": machine(device), "command": command}
        for number in range(done, config.networks):
            states = _train_one(trainer, folder, facts, states, number, config.networks)
    print(_summary(states, folder))
    return states


def describe(config: PretrainConfig) -> dict[str, Any]:
    """What a pool of these options says of itself: all that its networks follow from.

    Raises:
        InputError: an option or the data cannot be used.
    """
    return _described(config)[1]


def _described(config: PretrainConfig) -> tuple[ImageData, dict[str, Any]]:
    data = load_data(config.dataset, config.data_root, cache=config.cache, download=config.download)
    images = len(data.train_labels)
    if config.validation >= images:
        raise InputError(
            f"--validation {config.validation}: {data.name} has {images} training images; keep "
            "fewer apart"
        )
    usual = preset(data.name, 1)
    model = usual.model if config.model is None else config.model
    if is_own(model):
        raise InputError(f"--model {model}: a pool is of dmfast's networks; name one of these")
    strategy = usual.dsa_strategy if config.dsa_strategy is None else config.dsa_strategy
    device = resolve_device(config.device)
    facts = {
        "format": pool.FORMAT,
        "dataset": data.name,
        "real_images": digest(data.train_images, data.train_labels),
        "model": model,
        "epochs": config.epochs,
        "validation": config.validation,
        "augmentation": "_".join(parse_strategy(strategy)) or "none",
        "seed": config.seed,
        "precision": resolve_precision(config.precision, device, model),
        "versions": {"dmfast": __version__, "torch": torch.__version__},
    }
    return data, facts


def differences(there: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In what a pool is not that of :func:`describe`, in words."""
    return [
        f"{key} is {there.get(key)!r}, not {value!r}"
        for key, value in json.loads(json.dumps(wanted)).items()
        if there.get(key) != value
    ]


def _begin(folder: Path, facts: dict[str, Any], overwrite: bool) -> list[State]:
    """The states that the folder has of the same pool, which is begun where there is none."""
    if not (folder / pool.DESCRIPTION).exists():
        foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if foreign:
            raise InputError(f"{folder} holds {foreign[0]}, and no pool; choose another --out")
        pool.write(folder, facts, [])  # by which the folder is known, whatever ends the first
        return []
    try:
        there, states = pool.read(folder)
    except InputError:
        if not overwrite:
            raise
        there, states = {}, []
    others = differences(there, facts)
    if not others:
        _remove(folder, known=states)
        return states
    if not overwrite:
        raise InputError(
            f"{folder} holds another pool ({'; '.join(others)}): --overwrite replaces it; or "
            "choose another --out"
        )
    _remove(folder, known=[])
    pool.write(folder, facts, [])
    return []


def _remove(folder: Path, known: Sequence[State]) -> None:
    """Removes states that are not known: those of a network whose training was killed."""
    files = {state.file for state in known}
    for path in folder.iterdir():
        if _STATE.fullmatch(path.name) and path.name not in files:
            path.unlink()


def _train_one(
    trainer: _Trainer,
    folder: Path,
    facts: dict[str, Any],
    states: list[State],
    number: int,
    networks: int,
) -> list[State]:
    """Trains a network, writes its states, and gives all states with them."""
    start = time.perf_counter()
    found: list[State] = []

    def keep(network: Network, step: int, accuracy: float) -> None:
        state = State(f"{number:04d}-{step:06d}.safetensors", number, step, accuracy)
        found.append(state)
        pool.write_state(folder / state.file, network)

    try:
        trainer(number, keep)
    except BaseException as error:
        for state in found:
            (folder / state.file).unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt):
            print(
                f"{number} of {networks} networks are kept in {folder}; the same command goes on "
                "with the next",
                file=sys.stderr,
            )
        raise
    states = [*states, *found]
    pool.write(folder, facts, states)
    seconds = time.perf_counter() - start
    left = timedelta(seconds=round(seconds * (networks - number - 1)))
    print(
        f"network {number + 1} of {networks}: {len(found)} states of "
        f"{', '.join(f'{state.accuracy:.1f}' for state in found)} %, {seconds:.0f} s; {left} left",
        flush=True,
    )
    return states


def _next_test(step: int) -> int:
    """The step before which a network is tested next: bands are passed fast at first."""
    return step + 1 + step // 10


def count_tests(images: int, epochs: int) -> int:
    """How often a network is tested that is trained on so many for epochs 0 to ``epochs``."""
    steps = math.ceil(images / Protocol.batch) * (epochs + 1)
    step, tests = 0, 1  # that of its end
    while step < steps:
        step, tests = _next_test(step), tests + 1
    return tests


class _Trainer:
    """Trains networks on all but some images of a set, and tests them on these on the way."""

    def __init__(self, data: ImageData, facts: dict[str, Any], device: torch.device) -> None:
        self._facts, self._device = facts, device
        self._network = get_network(
            facts["model"], data.channels, data.classes, data.size, facts["seed"]
        )
        layout = memory_format(device)
        self._network.to(device, memory_format=layout)  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(facts["seed"])
        order = torch.randperm(len(data.train_labels), generator=generator)
        apart, rest = order[: facts["validation"]], order[facts["validation"] :].sort().values
        self._images = NormalisedImages(data, data.train_images[rest]).to(device, layout)
        self._labels = data.train_labels[rest].to(device)
        self._apart = NormalisedImages(data, data.train_images[apart]).to(device, layout)
        self._apart_labels = data.train_labels[apart].to(device)

    def __call__(self, number: int, keep: _Keep) -> None:
        """Trains network ``number``; calls ``keep`` in every band that it comes to."""
        facts, network = self._facts, self._network
        index = _FIRST_NETWORK + number
        initialise_(
            network, facts["seed"], 0, network_index=index, stream=Stream.EVALUATION_WEIGHTS
        )
        bands: set[int] = set()
        step, next_test = 0, 0

        def test() -> None:
            accuracy = self._accuracy()
            band = math.floor(accuracy / _WIDTH)
            if band not in bands:
                bands.add(band)
                keep(network, step, accuracy)

        def on_batch(rows: Tensor, logits: Tensor) -> None:
            nonlocal step, next_test
            if step >= next_test:
                test()
                next_test = _next_test(step)
            step += 1

        train(
            network,
            self._images,
            self._labels,
            epochs=facts["epochs"],
            seed=facts["seed"],
            index=index,
            strategy="_".join(parse_strategy(facts["augmentation"])),
            precision=facts["precision"],
            on_batch=on_batch,
        )
        test()

    @torch.no_grad()
    def _accuracy(self) -> float:
        self._network.eval()
        right = 0
        for rows in torch.split(torch.arange(len(self._apart)), _TEST_BATCH):
            rows = rows.to(self._device)
            with autocast(self._device, self._facts["precision"]):
                logits = self._network(self._apart[rows])
            right += int((logits.argmax(1) == self._apart_labels[rows]).sum())
        self._network.train()
        return 100 * right / len(self._apart)


def _summary(states: Sequence[State], folder: Path) -> str:
    bands: dict[int, int] = {}
    for state in states:
        low = math.floor(state.accuracy / _WIDTH) * int(_WIDTH)
        bands[low] = bands.get(low, 0) + 1
    counts = ", ".join(f"{low}-{low + int(_WIDTH)} %: {bands[low]}" for low in sorted(bands))
    return f"{len(states)} states ({counts}): {folder / pool.DESCRIPTION}"


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "dmfast.pretrain",
        "Trains networks on the real set and keeps states on their way, for dmfast.condense "
        "--networks-from.",
    )
    default = PretrainConfig
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default=default.dataset,
        help="a known name, a path or hf:owner/name",
    )
    parser.add_data_root()
    parser.add_argument("--model", metavar="NAME", help="the networks (default: the preset)")
    parser.add_argument(
        "--networks", metavar="N", type=int, default=default.networks, help="how many"
    )
    parser.add_argument(
        "--epochs",
        metavar="E",
        type=int,
        default=default.epochs,
        help="train each for epochs 0 to E, as dmfast.evaluate does",
    )
    parser.add_argument(
        "--validation",
        metavar="N",
        type=int,
        default=default.validation,
        help="training images that are kept apart, by which states are told",
    )
    parser.add_augmentation(
        WORDS,
        "default: the preset",
        "train without",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=default.seed, help="of all draws")
    parser.add_passes(PRECISIONS, default)
    parser.add_argument(
        "--out", metavar="DIR", help="the pool's folder (default: runs/NAME-pool-seedN)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another pool in the folder"
    )
    parser.add_loading()
    return parser


def _main(arguments: Sequence[str]) -> None:
    config = PretrainConfig(**vars(_parser().parse_args(arguments)))
    keep_freed_pages()
    run(config, command=shlex.join(["python", "-m", "dmfast.pretrain", *arguments]))

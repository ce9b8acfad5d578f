# SPDX-License-Identifier: MIT
"""Chooses real images as rivals of condensed ones: random, herding, k-center or forgetting.

``python -m dmfast.coreset METHOD --dataset NAME --ipc N``, and :func:`run` for the same job from
Python. Each class is chosen from by itself. All but ``random`` train a network on the whole real
set first: ``herding`` and ``k-center`` compare its embeddings (:mod:`dmfast.selection`),
``forgetting`` counts how often it forgot an image (Toneva et al. 2019). The coreset is a pure
function of its options and the data, on the same machine; fewer images a class are the beginning of
more.

A coreset's folder:

==================== =============================================================================
coreset.json         how it was chosen, in what time (with that of a network that was trained for
                     it), and ``indices`` into the training images, class by class
features.safetensors the trained network, and how often it forgot each image
synthetic.safetensors, grid.png  the images as a set that ``dmfast.evaluate`` takes
==================== =============================================================================
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.coreset")

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cli, selection
from ._own import model_file
from ._sources import check_class_sizes, digest, draw_random, note, short_name
from ._version import __version__
from .augment import WORDS, parse_strategy
from .data import ImageData
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
from .files import write_bytes
from .memory import keep_freed_pages
from .networks import MODELS, Network, get_network, initialise_
from .ops import Stream
from .presets import preset
from .runs import locked
from .synthetic import SyntheticSet, save_grid
from .training import train

#: The methods, and what each chooses.
METHODS = {
    "random": "at random, the same as network 0 of dmfast.evaluate --baseline random",
    "herding": "such that the mean of the embeddings keeps close to the class's",
    "k-center": "such that every embedding is near a chosen one, from that nearest the mean on",
    "forgetting": "the most often forgotten in training, those never learned first",
}
_GREEDY = {"herding": selection.herding, "k-center": selection.k_center}
_EPOCHS = 200  # as Toneva et al. train, and DeepCore's defaults
_NETWORK = 2**24  # its number: one that no evaluated network has
_BATCH = 256  # images that are embedded at once
_FEATURES, _FORMAT = "features.safetensors", "dmfast-features-1"


@dataclass(frozen=True)
class CoresetConfig:
    """The options of a coreset, named as on the command line.

    ``model``, ``epochs`` and ``dsa_strategy`` (words joined by underscores; "" for no augmentation)
    are those of the network that is trained on the whole set, where None the data set's preset,
    200, and the preset (none for ``forgetting``: what is wrong is to be the image's fault, not the
    transform's). ``trained`` names the folder of another coreset, whose network is taken in place
    of training one. ``out`` is a folder in ``runs`` where None.

    Raises:
        InputError: on values out of range, or options that exclude each other.
    """

    method: str
    dataset: str = "digits"
    data_root: str | None = None
    ipc: int = 10
    model: str | None = None
    epochs: int | None = None
    dsa_strategy: str | None = None
    trained: str | None = None
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    out: str | None = None
    overwrite: bool = False
    cache: bool = True
    download: bool = False

    def __post_init__(self) -> None:
        choose("METHOD", self.method, METHODS)
        choose("--precision", self.precision, PRECISIONS)
        if self.ipc < 1:
            raise InputError(f"--ipc must be 1 or more, got {self.ipc}")
        if self.epochs is not None and self.epochs < 0:
            raise InputError(f"--epochs must be 0 or more, got {self.epochs}")
        check_seed(self.seed)
        check_out(self.out)
        of_network = {
            "--model": self.model,
            "--epochs": self.epochs,
            "--dsa-strategy": self.dsa_strategy,
        }
        given = [flag for flag, value in of_network.items() if value is not None]
        if self.method == "random" and (given or self.trained is not None):
            raise InputError(
                f"{(given or ['--trained'])[0]} is of a network, and random needs none: leave it "
                "out, or choose another METHOD"
            )
        if given and self.trained is not None:
            raise InputError(f"{given[0]} and --trained exclude each other: leave one out")


@dataclass(frozen=True, eq=False)
class Coreset:
    """``indices`` of training images [K * ipc] int64, class by class, and these as a set."""

    indices: Tensor
    synthetic: SyntheticSet


def _fit(indices: Tensor, data: ImageData, ipc: int) -> bool:
    """Whether they are ``ipc`` images of each class, class by class, no two the same."""
    labels = torch.arange(data.classes).repeat_interleave(ipc)
    known = bool(((indices >= 0) & (indices < len(data.train_labels))).all())
    return (
        known
        and len(set(indices.tolist())) == len(indices)
        and torch.equal(data.train_labels[indices], labels)
    )


def run(config: CoresetConfig, *, command: str | None = None) -> Coreset:
    """Does what ``python -m dmfast.coreset`` does: leaves a coreset in its folder.

    A coreset that is there already is read. Where it was interrupted after the network was trained,
    the same call goes on from there.

    Args:
        command: the command line to name in the folder, if there was one.

    Raises:
        InputError: an option or the data cannot be used, they do not fit each other, or the folder
            holds something else.
    """
    data = load_data(config.dataset, config.data_root, cache=config.cache, download=config.download)
    check_class_sizes(data, config.ipc)
    device = resolve_device(config.device)
    name = f"{short_name(data.name)}-{config.method}-ipc{config.ipc}-seed{config.seed}"
    real = {
        "dataset": data.name,
        "real_images": digest(data.train_images, data.train_labels),
        "versions": {"dmfast": __version__, "torch": torch.__version__},
    }
    training = None if config.method == "random" else _training(config, data, real, device)
    identity = {
        "method": config.method,
        "images_per_class": config.ipc,
        "seed": config.seed,
        **real,
        "network": training,
    }
    if training is not None:  # what cannot be made is to fail before anything is replaced
        get_network(training["model"], data.channels, data.classes, data.size, config.seed)
    folder = _Folder(Path(config.out or f"runs/{name}"), identity)
    with locked(folder.path):
        indices = folder.begin(config.overwrite)
        if indices is not None and not _fit(indices, data, config.ipc):
            raise InputError(f"{folder.description} is damaged: --overwrite chooses anew")
        if indices is None:
            with folder.work():
                start = time.perf_counter()
                indices = _choose(config, data, training, device, folder)
                seconds = round(time.perf_counter() - start, 3)
                folder.write(
                    indices, {"machine": machine(device), "command": command, "seconds": seconds}
                )
        else:
            note("this coreset is there already; nothing was chosen")
        synthetic = SyntheticSet(
            images=data.normalise(data.train_images[indices]),
            labels=data.train_labels[indices],
            mean=data.mean,
            std=data.std,
            class_names=data.class_names,
            config=identity,
        )
        synthetic.save(folder.synthetic)
        save_grid(folder.grid, synthetic)
    print(f"{len(indices)} images: {folder.description}, {folder.synthetic}, {folder.grid}")
    return Coreset(indices, synthetic)


def _training(
    config: CoresetConfig, data: ImageData, real: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """All that the trained network follows from."""
    if config.trained is not None:
        path = Path(config.trained) / _FEATURES
        training, _ = _read_features(path)
        if training["real_images"] != real["real_images"]:
            raise InputError(
                f"{path} was trained on other images, of {training['dataset']}, than {data.name} "
                "has here: leave --trained out, or name another folder"
            )
        return training
    usual = preset(data.name, config.ipc)
    strategy = "" if config.method == "forgetting" else usual.dsa_strategy
    model = usual.model if config.model is None else config.model
    if config.dsa_strategy is not None:
        strategy = config.dsa_strategy
    digest_of_file = model_file(model)
    return {
        **real,
        "model": model,
        **({} if digest_of_file is None else {"model_file": digest_of_file}),
        "epochs": _EPOCHS if config.epochs is None else config.epochs,
        "augmentation": "_".join(parse_strategy(strategy)) or "none",
        "seed": config.seed,
        "precision": resolve_precision(config.precision, device, model),
    }


def _choose(
    config: CoresetConfig,
    data: ImageData,
    training: dict[str, Any] | None,
    device: torch.device,
    folder: _Folder,
) -> Tensor:
    """The indices of the images that the method chooses."""
    if training is None:
        return draw_random(data, config.ipc, config.seed, 0)
    network = get_network(training["model"], data.channels, data.classes, data.size, 0)
    forgotten = _trained(config, data, training, network, device, folder)
    if config.method == "forgetting":
        return most_forgotten(data, forgotten, config.ipc, config.seed)
    greedy = _GREEDY[config.method]
    network.to(device).eval()
    order, class_offsets = data.by_class()
    chosen = []
    for start, stop in zip(class_offsets[:-1].tolist(), class_offsets[1:].tolist(), strict=True):
        rows = order[start:stop]
        features = embed(network, data, rows, training["precision"])
        if not features.square().sum(1).isfinite().all():
            raise InputError(
                f"the embeddings of {data.name} are not finite: train with fewer --epochs or "
                "another --model"
            )
        chosen.append(rows[greedy(features, config.ipc).cpu()])
    return torch.cat(chosen)


@torch.no_grad()
def embed(network: Network, data: ImageData, rows: Tensor, precision: str) -> Tensor:
    """The embeddings of training images, a batch at a time: [n, D] float32, on the device."""
    device = next(network.parameters()).device
    features = []
    for part in torch.split(rows, _BATCH):
        images = data.normalise(data.train_images[part].to(device))
        with autocast(device, precision):
            features.append(network.embed(images.contiguous(memory_format=memory_format(device))))
    return torch.cat([part.float() for part in features])


def most_forgotten(data: ImageData, forgotten: Tensor, ipc: int, seed: int) -> Tensor:
    """Indices of the ``ipc`` images of each class that were forgotten most often.

    Args:
        forgotten: [M], infinite where an image was never learned.
        seed: of the order among equals, which is that of the method ``random``.
    """
    order, class_offsets = data.by_class()
    shuffled = draw_random(data, len(order), seed, 0)
    chosen = []
    for start, stop in zip(class_offsets[:-1].tolist(), class_offsets[1:].tolist(), strict=True):
        rows = shuffled[start:stop]
        chosen.append(rows[forgotten[rows].argsort(descending=True, stable=True)[:ipc]])
    return torch.cat(chosen)


class Forgetting:
    """Counts the forgetting events of a training: an image right once, and wrong the next time.

    Right or wrong is what the network said of it in the batch that it was trained with.
    """

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels
        self._was_right = torch.zeros_like(labels, dtype=torch.bool)
        self._learned = torch.zeros_like(self._was_right)
        self._events = torch.zeros_like(labels, dtype=torch.float32)

    def see(self, rows: Tensor, logits: Tensor) -> None:
        """Takes note of a batch: the rows of its images, no two the same, and their logits."""
        right = logits.argmax(1) == self._labels[rows]
        self._events[rows] += (self._was_right[rows] & ~right).float()
        self._was_right[rows] = right
        self._learned[rows] |= right

    def events(self) -> Tensor:
        """How often each image was forgotten, [M] float32 on the CPU; infinity: never learned."""
        return self._events.masked_fill(~self._learned, torch.inf).cpu()


def _trained(
    config: CoresetConfig,
    data: ImageData,
    training: dict[str, Any],
    network: Network,
    device: torch.device,
    folder: _Folder,
) -> Tensor:
    """Puts the trained weights into ``network``; returns how often it forgot each image."""
    path = folder.features if config.trained is None else Path(config.trained) / _FEATURES
    if path.exists():
        _, tensors = _read_features(path)
        forgotten = tensors.pop("forgotten")
        network.load_state_dict(tensors)
        return forgotten
    initialise_(
        network, training["seed"], 0, network_index=_NETWORK, stream=Stream.EVALUATION_WEIGHTS
    )
    layout = memory_format(device)
    network.to(device, memory_format=layout)  # type: ignore[call-overload]
    labels = data.train_labels.to(device)
    counter = Forgetting(labels)
    with _progress(training["model"], training["epochs"] + 1) as on_epoch:
        train(
            network,
            data.normalised().to(device, memory_format=layout),
            labels,
            epochs=training["epochs"],
            seed=training["seed"],
            index=_NETWORK,
            strategy="_".join(parse_strategy(training["augmentation"])),
            precision=training["precision"],
            on_batch=counter.see,
            on_epoch=on_epoch,
        )
    forgotten = counter.events()
    _write_features(path, training, {**network.state_dict(), "forgotten": forgotten})
    return forgotten


@contextmanager
def _progress(model: str, epochs: int) -> Iterator[Callable[[], None]]:
    """What to call after each epoch: a bar on a terminal, a line for each tenth in a log."""
    from tqdm import tqdm

    print(f"training a {model} on the whole real set for {epochs} epochs", flush=True)
    done, start = 0, time.perf_counter()
    with tqdm(total=epochs, unit="epoch", disable=None, dynamic_ncols=True) as bar:

        def on_epoch() -> None:
            nonlocal done
            done += 1
            bar.update()
            if bar.disable and 10 * done // epochs > 10 * (done - 1) // epochs:
                each = (time.perf_counter() - start) / done
                left = timedelta(seconds=round(each * (epochs - done)))
                print(f"epoch {done} of {epochs}: {each:.2g} s each, {left} left", flush=True)

        yield on_epoch


def _write_features(path: Path, training: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    # Cloned: a network of the user's may have one parameter in several places.
    content = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(content, {_FORMAT: json.dumps(training)}))


def _read_features(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a trained network follows from, and its weights, and ``forgotten`` [M]."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise InputError(
            f"{path} is not there: name the folder of a coreset for which a network was trained"
        )
    try:
        with safe_open(path, "pt") as file:
            training = json.loads(file.metadata()[_FORMAT])
            return training, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is no network of this program ({error}): move it, or name another folder"
        ) from error


class _Folder:
    """The files of one coreset, or of one that is being chosen."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """``identity`` is what the coreset follows from."""
        self.path = path
        self.description = path / "coreset.json"
        self.features = path / _FEATURES
        self.synthetic = path / "synthetic.safetensors"
        self.grid = path / "grid.png"
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))

    def begin(self, overwrite: bool) -> Tensor | None:
        """The indices, where they were chosen before; else makes the folder that of a choice.

        Raises:
            InputError: the folder is of something else, or of another coreset and not to be
                overwritten.
        """
        there = self._read()
        if there is not None:
            differences = [
                f"{key} is {there.get(key)!r}, not {value!r}"
                for key, value in self._identity.items()
                if there.get(key) != value
            ]
            if not differences:
                return None if there["indices"] is None else torch.tensor(there["indices"])
            if not overwrite:
                raise InputError(
                    f"{self.path} holds another coreset ({'; '.join(differences)}): --overwrite "
                    "replaces it; or choose another --out"
                )
            self._clear()
        self.write(None, {})
        return None

    def write(self, indices: Tensor | None, facts: dict[str, Any]) -> None:
        """Writes the description; ``indices`` None: they are being chosen."""
        listed = None if indices is None else indices.tolist()
        content = {**self._identity, **facts, "indices": listed}
        write_bytes(self.description, (json.dumps(content) + "\n").encode())

    @contextmanager
    def work(self) -> Iterator[None]:
        """Leaves nothing where the block ends without a result, but a network that was trained."""
        try:
            yield
        except BaseException as error:
            trained = self.features.exists()
            if not trained:
                self.description.unlink(missing_ok=True)
            if isinstance(error, KeyboardInterrupt):
                print(
                    f"the trained network is kept in {self.features}; the same command goes on "
                    "from there"
                    if trained
                    else "nothing was kept; the same command starts over",
                    file=sys.stderr,
                )
            raise

    def _read(self) -> dict[str, Any] | None:
        """The description, None where there is none and nothing that would be overwritten."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder; choose another --out")
        if not self.description.exists():
            others = ("config.json", "checkpoint.safetensors", "evaluation.json")
            ours = (self.features, self.synthetic, self.grid)
            paths = (*ours, *(self.path / name for name in others))
            if there := [path.name for path in paths if path.exists()]:
                raise InputError(
                    f"{self.path} holds {', '.join(there)} of something else than a coreset; "
                    "choose another --out"
                )
            return None
        try:
            content = json.loads(self.description.read_text(encoding="utf-8"))
            indices = content["indices"]
            if indices is not None and not all(type(index) is int for index in indices):
                raise TypeError("indices are no whole numbers")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.description} is no coreset of this program; choose another --out, or move "
                "it"
            ) from error
        return dict(content)

    def _clear(self) -> None:
        """Removes another coreset and its evaluation; its network stays where it is the same."""
        with suppress(InputError):
            if _read_features(self.features)[0] != self._identity["network"]:
                self.features.unlink()
        evaluations = (self.path / f"evaluation{part}.json" for part in ("", ".partial"))
        for path in (self.synthetic, self.grid, *evaluations):
            path.unlink(missing_ok=True)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "dmfast.coreset",
        "Chooses real images, as many of each class, as rivals of condensed ones.",
    )
    default = CoresetConfig
    parser.add_argument(
        "method",
        metavar="METHOD",
        choices=METHODS,
        help="; ".join(f"{name}: {what}" for name, what in METHODS.items()),
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default=default.dataset,
        help="a known name, a path or hf:owner/name",
    )
    parser.add_data_root()
    parser.add_argument("--ipc", metavar="N", type=int, default=default.ipc, help="images a class")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"the network that is trained on the whole set, {MODELS} (default: the preset)",
    )
    parser.add_argument(
        "--epochs",
        metavar="E",
        type=int,
        help=f"train it for epochs 0 to E, as dmfast.evaluate does (default: {_EPOCHS})",
    )
    parser.add_augmentation(
        WORDS,
        "default: the preset, but none for forgetting",
        "train it without",
    )
    parser.add_argument(
        "--trained",
        metavar="DIR",
        help="the folder of another coreset: take its network in place of training one",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=default.seed, help="of all draws")
    parser.add_passes(PRECISIONS, default)
    parser.add_argument(
        "--out", metavar="DIR", help="the coreset's folder (default: runs/NAME-METHOD-ipcN-seedN)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another coreset in the folder"
    )
    parser.add_loading()
    return parser


def _main(arguments: Sequence[str]) -> None:
    config = CoresetConfig(**vars(_parser().parse_args(arguments)))
    keep_freed_pages()
    run(config, command=shlex.join(["python", "-m", "dmfast.coreset", *arguments]))

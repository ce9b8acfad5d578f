# SPDX-License-Identifier: MIT
"""A pool of trained networks, from which matching takes its networks in place of random ones.

The network distributions of Table 4 of the paper: states of networks on their way through training,
by the accuracy that they have on images kept apart.

=================== ==============================================================================
pool.json           ``format``, what the networks were trained on and how, and ``states``: a list of
                    objects with ``file``, ``network``, ``step`` and ``accuracy`` (%)
NETWORK-STEP.safetensors  a state dict, as ``dmfast.networks`` names it: weights, and nothing else
=================== ==============================================================================
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._own import OwnNetwork
from .errors import InputError
from .files import write_bytes
from .networks import Network
from .ops import Stream

FORMAT = "dmfast-pool-1"
DESCRIPTION = "pool.json"


class State(NamedTuple):
    """A network of a pool after ``step`` updates; ``accuracy`` in %, of the images kept apart."""

    file: str
    network: int
    step: int
    accuracy: float


class Band(NamedTuple):
    """Accuracies from ``low`` up to, and without, ``high``, in %."""

    low: float
    high: float

    def __contains__(self, accuracy: object) -> bool:
        return isinstance(accuracy, float) and self.low <= accuracy < self.high

    def __str__(self) -> str:
        return f"{self.low:g}-" + ("" if self.high == math.inf else f"{self.high:g}")


def parse_band(words: str) -> Band:
    """``40-50``, ``70-`` for 70 and more, or ``all``.

    Raises:
        InputError: it is nothing of that, or holds nothing.
    """
    if words == "all":
        return Band(0.0, math.inf)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)?", words)
    if found is None or (found[2] and float(found[1]) >= float(found[2])):
        raise InputError(
            f"--band must be LOW-HIGH in %, as 40-50, or LOW-, as 70-, or all; got {words!r}"
        )
    return Band(float(found[1]), float(found[2]) if found[2] else math.inf)


def read(folder: Path) -> tuple[dict[str, Any], list[State]]:
    """What ``pool.json`` says of the networks, and their states.

    Raises:
        InputError: it is not there, or is something else.
    """
    path = folder / DESCRIPTION
    if folder.is_file():
        raise InputError(f"{folder} is a file: name the folder of a pool's {DESCRIPTION}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        states = [
            State(str(s["file"]), int(s["network"]), int(s["step"]), float(s["accuracy"]))
            for s in content["states"]
        ]
        for state in states:
            if Path(state.file).name != state.file or not math.isfinite(state.accuracy):
                raise ValueError(f"a state {state.file!r} of accuracy {state.accuracy}")
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no {DESCRIPTION}: name the folder of python -m dmfast.pretrain"
        ) from error
    except (OSError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} is no pool of this program ({error}); name another") from error
    return {key: value for key, value in content.items() if key != "states"}, states


def count_networks(states: Sequence[State]) -> int:
    """How many networks were trained, which are numbered from 0."""
    return 1 + max((state.network for state in states), default=-1)


def write(folder: Path, facts: dict[str, Any], states: Sequence[State]) -> None:
    """Writes ``pool.json``."""
    content = {**facts, "states": [state._asdict() for state in states]}
    write_bytes(folder / DESCRIPTION, (json.dumps(content, indent=1) + "\n").encode())


def write_state(path: Path, network: Network) -> None:
    """Writes the weights of a network."""
    from safetensors.torch import save

    weights = {
        name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()
    }
    write_bytes(path, save(weights))


class NetworkPool:
    """The states of a band, all on one device, to be drawn from.

    Attributes:
        states: those of the band.
        dataset: what the networks were trained on, as the pool calls it.
        real_images: the digest of its training images and labels.
    """

    def __init__(self, folder: str | Path, band: str, network: Network, model: str) -> None:
        """Reads the states into the layout of ``network``, a network of that ``model``.

        Raises:
            InputError: there is no such pool or band, or its networks are others.
        """
        if isinstance(network, OwnNetwork):
            raise InputError(
                f"--networks-from: a pool is of dmfast's networks, not of {model}; leave one out"
            )
        folder = Path(folder)
        facts, states = read(folder)
        if facts.get("model") != model:
            raise InputError(
                f"{folder} has networks {facts.get('model')!r}: give --model {facts.get('model')}, "
                "or name another pool"
            )
        self.dataset, self.real_images = facts.get("dataset"), facts.get("real_images")
        chosen = parse_band(band)
        self.states = [state for state in states if state.accuracy in chosen]
        if not self.states:
            there = sorted({f"{math.floor(s.accuracy / 10) * 10}" for s in states}, key=int)
            raise InputError(
                f"{folder} has no network of an accuracy in --band {band}: it has some from "
                f"{', '.join(there)} % on"
                if there
                else f"{folder} has no networks yet"
            )
        self._targets = dict(network.named_parameters())
        read_states = [self._read(folder / state.file) for state in self.states]
        self._weights = {
            name: torch.stack([weights[name] for weights in read_states]).to(target.device)
            for name, target in self._targets.items()
        }
        device = next(iter(self._targets.values())).device
        self._order = torch.arange(len(self.states), device=device)
        self._all = torch.tensor([0, len(self.states)], device=device)
        self._one = torch.tensor([0, 1], device=device)

    @staticmethod
    def digest(folder: str | Path) -> str:
        """Of what the states are, wherever the folder is.

        Raises:
            InputError: there is no pool.
        """
        facts, states = read(Path(folder))
        follows_from = {key: facts.get(key) for key in ("dataset", "real_images", "model", "seed")}
        content = json.dumps([follows_from, states])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def _read(self, path: Path) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read ({error}): train the pool anew") from error
        for name, target in self._targets.items():
            if name not in weights or weights[name].shape != target.shape:
                raise InputError(
                    f"{path} does not fit: its networks are for images of another size or other "
                    "classes; name another pool"
                )
        return weights

    @torch.no_grad()
    def load_(self, seed: int, step: int | Tensor) -> None:
        """Puts a state that is drawn for an iteration into the network.

        Args:
            step: an int, or an int64 tensor of one element on the network's device.
        """
        number = ops.draw_batch(
            self._order, self._all, self._one, 1, seed, step, stream=Stream.WEIGHTS
        )
        for name, target in self._targets.items():
            target.copy_(self._weights[name].index_select(0, number)[0])

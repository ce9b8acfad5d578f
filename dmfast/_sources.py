# SPDX-License-Identifier: MIT
"""What an evaluation trains on: a set, images drawn or listed from the real set, or all of it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from ._readers import reason
from .augment import parse_strategy
from .data import ImageData, NormalisedImages
from .data import load as load_data
from .errors import InputError
from .ops import Stream
from .synthetic import SyntheticSet

if TYPE_CHECKING:
    from .evaluate import EvaluateConfig

#: What can be trained on in place of a condensed set.
BASELINES = {"random": "random real images, drawn anew for each network"}
# An epoch of 50,000 images is 196 updates; of a condensed set, from 1 to 20.
_WHOLE_EPOCHS = 50


@dataclass(frozen=True)
class Source:
    """What the networks train on.

    Attributes:
        data: what they are tested on.
        ipc: images a class, a mean where that differs.
        images_of: gives the images and labels of a network, as :func:`dmfast.training.train` takes
            them; the same objects where they are the same for all.
        training_images: a digest of all that ``images_of`` follows from.
        folder: of the result, where the user names none.
        config: how the set was made, as far as it says.
        baseline: in words, where it is one.
        epochs: in place of the protocol's.
        learning_rate: in place of the protocol's.
        soft_labels: whether the labels are probabilities.
    """

    data: ImageData
    ipc: float
    images_of: Callable[[int], tuple[Tensor | NormalisedImages, Tensor]]
    training_images: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    epochs: int | None = None
    learning_rate: float | None = None
    soft_labels: bool = False


def source_of(config: EvaluateConfig) -> Source:
    """What these options say to train on.

    Raises:
        InputError: it cannot be read, or does not fit the real set.
    """
    if config.set is not None:
        return _condensed(config, config.set)
    if config.indices is not None:
        return _listed(config, config.indices)
    data = _real(config, config.dataset or "digits")
    if config.baseline == "random":
        return _random(config, data)
    images = data.normalised()
    return Source(
        data,
        plain_number(len(data.train_labels) / data.classes),
        lambda index: (images, data.train_labels),
        digest(data.train_images, data.train_labels),
        _folder(config, data, "whole"),
        baseline="the whole real set",
        epochs=_WHOLE_EPOCHS,
    )


def check_class_sizes(data: ImageData, ipc: int) -> None:
    """Raises InputError where a class has fewer real images than ``ipc``."""
    sizes = data.by_class()[1].diff()
    if ipc > sizes.min():
        raise InputError(
            f"--ipc {ipc}: class {data.class_names[int(sizes.argmin())]!r} of {data.name} "
            f"has {int(sizes.min())} images; ask for at most that many"
        )


def draw_random(data: ImageData, ipc: int, seed: int, index: int) -> Tensor:
    """Indices of random training images, ``ipc`` of each class in order of class, of a network.

    The choice of fewer is, class by class, the beginning of the choice of more.
    """
    order, class_offsets = data.by_class()
    offsets, rows = data.batch_offsets(ipc)
    return ops.draw_batch(
        order,
        class_offsets,
        offsets,
        rows,
        seed,
        index,
        stream=Stream.EVALUATION_INITIAL_IMAGES,
    )


def digest(*tensors: Tensor) -> str:
    """Of what the tensors hold."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()[:16]


def plain_number(number: float) -> float:
    """An int where the number is whole."""
    return int(number) if number == int(number) else number


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _real(config: EvaluateConfig, name: str, said_by: str | None = None) -> ImageData:
    """The real set of that name, which is said by a file where the user does not."""
    try:
        return load_data(name, config.data_root, cache=config.cache, download=config.download)
    except InputError as error:
        if config.dataset is not None or said_by is None:
            raise
        raise InputError(
            f"{error} ({said_by} says that it was made of {name}: give --dataset where that is "
            "called otherwise here)"
        ) from error


def _condensed(config: EvaluateConfig, path: str) -> Source:
    name = config.dataset
    if name is None:
        recorded = SyntheticSet.load(path, config.experiment, config.unsafe).config.get("dataset")
        if not isinstance(recorded, str):
            raise InputError(f"{path} does not say what it was condensed from: give --dataset NAME")
        name = recorded
    data = _real(config, name, path)
    synthetic = SyntheticSet.load(
        path, config.experiment, config.unsafe, mean=data.mean, std=data.std
    )
    _check_fit(path, synthetic, data)
    if not (_close(synthetic.mean, data.mean) and _close(synthetic.std, data.std)):
        note(
            f"{path} is normalised by mean {synthetic.mean} and std {synthetic.std}, {data.name} "
            f"by {data.mean} and {data.std}; the test images are normalised as the set is"
        )
        data = replace(data, mean=synthetic.mean, std=synthetic.std)
    images, labels = synthetic.images, _labels_in_order_of(data, synthetic)
    follows_from = [images, labels]
    if synthetic.learning_rate is not None:
        if not 0 < synthetic.learning_rate < math.inf:
            raise InputError(
                f"{path} came with a learning rate of {synthetic.learning_rate:g}, with which "
                "nothing is learned; use a set with another"
            )
        note(f"{path} came with a learning rate of {synthetic.learning_rate:g}, which is used")
        follows_from.append(torch.tensor(synthetic.learning_rate))
    return Source(
        data,
        plain_number(len(labels) / data.classes),
        lambda index: (images, labels),
        digest(*follows_from),
        Path(path) if Path(path).is_dir() else Path(path).parent,
        synthetic.config,
        learning_rate=synthetic.learning_rate,
        soft_labels=synthetic.soft_labels is not None,
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
    for what, there in (
        ("ZCA-whitened images", synthetic.zca),
        (f"images that hold {synthetic.factor}x{synthetic.factor} others", synthetic.factor != 1),
    ):
        if there:
            raise InputError(
                f"{path} has {what}, which no protocol here trains on; use a set without"
            )


def _labels_in_order_of(data: ImageData, synthetic: SyntheticSet) -> Tensor:
    """The labels, or the probabilities of the classes, numbered as those of ``data`` are.

    Folders of pictures number classes in the order of their names.
    """
    labels = synthetic.labels
    if synthetic.soft_labels is not None:  # as the loss of TESLA, DATM and PAD takes them
        labels = synthetic.soft_labels.softmax(1)
    names = synthetic.class_names
    unique = len(set(names)) == len(names)
    if names == data.class_names or not unique or set(names) != set(data.class_names):
        return labels
    number = torch.tensor([data.class_names.index(name) for name in names])
    return number[labels] if labels.dim() == 1 else labels[:, number.argsort()]


def _listed(config: EvaluateConfig, path: str) -> Source:
    """The real images that a file lists, by their index among the training images."""
    listed, recorded = _read_indices(path)
    name = config.dataset or recorded
    if name is None:
        raise InputError(f"{path} does not say of which set the images are: give --dataset NAME")
    data = _real(config, name, path)
    count = len(data.train_labels)
    for image in listed:
        if not 0 <= image < count:
            raise InputError(
                f"{path} lists image {image}, but {data.name} has the training images 0 to "
                f"{count - 1}: give the --dataset it was made for"
            )
    index = torch.tensor(listed)
    images, labels = data.normalise(data.train_images[index]), data.train_labels[index]
    return Source(
        data,
        plain_number(len(labels) / data.classes),
        lambda network: (images, labels),
        digest(images, labels),
        Path(path).parent,
    )


def _read_indices(path: str) -> tuple[list[int], str | None]:
    """The whole numbers in a file, no two the same, and the data set that it names, if any.

    JSON: a list, or an object with one as ``indices`` and the name as ``dataset``; or words.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        words = text.split()
        content = [int(word) for word in words if re.fullmatch(r"-?\d{1,18}", word)]
        content = content if len(content) == len(words) else None
    if type(content) is int:  # a single word is JSON, too
        content = [content]
    described = content if isinstance(content, dict) else {}
    indices = described.get("indices", content)
    if not isinstance(indices, list) or {type(index) for index in indices} != {int}:
        raise InputError(
            f"{path} holds no indices: it must be a list of whole numbers, as JSON or words, or "
            "JSON that has one as 'indices'"
        )
    if len(set(indices)) != len(indices):
        twice = Counter(indices).most_common(1)[0][0]
        raise InputError(f"{path} lists image {twice} more than once: list each once")
    name = described.get("dataset")
    return indices, name if isinstance(name, str) else None


def _random(config: EvaluateConfig, data: ImageData) -> Source:
    ipc = config.ipc
    assert ipc is not None
    check_class_sizes(data, ipc)

    def images_of(index: int) -> tuple[Tensor, Tensor]:
        drawn = draw_random(data, ipc, config.seed, index)
        return data.normalise(data.train_images[drawn]), data.train_labels[drawn]

    return Source(
        data,
        ipc,
        images_of,
        digest(data.train_images, data.train_labels),
        _folder(config, data, "random", f"ipc{ipc}"),
        baseline=BASELINES["random"],
    )


def _folder(config: EvaluateConfig, data: ImageData, *what: str) -> Path:
    words = [short_name(data.name), *what, f"seed{config.seed}"]
    if config.dsa_strategy is not None and not parse_strategy(config.dsa_strategy):
        words.append("no-augmentation")
    return Path("runs", "-".join(words))


def short_name(dataset: str) -> str:
    """The name of a set, or the last part of its path, as part of a folder's name."""
    return re.sub(r"[^\w-]+", "-", Path(dataset).name)


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(a, b, strict=True))


def _shape_words(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{height}x{width} pixels and {channels} channel{'s' if channels > 1 else ''}"

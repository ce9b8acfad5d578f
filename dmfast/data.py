# SPDX-License-Identifier: MIT
"""Real image sets: found by name or path, read from whatever layout they are in, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import _cache
from ._images import hub_layout, size_words
from ._readers import RawSet, Split, reason
from ._sets import KNOWN, KnownSet, canonical_name, locate, locate_path, names_of_another
from .errors import InputError

__all__ = ["ImageData", "NormalisedImages", "canonical_name", "load"]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled set of real images, on the CPU.

    ``train_images`` [M, H, W, C] and ``test_images`` are uint8, or float32 in [0, 1]; the labels
    int64, 0 to K - 1, each of which occurs in training. ``mean`` and ``std`` are of each channel
    of images scaled to [0, 1]. ``name`` is as :func:`canonical_name` gives it.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str

    @property
    def channels(self) -> int:
        return self.train_images.shape[3]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.train_images.shape[1], self.train_images.shape[2]

    @property
    def classes(self) -> int:
        """K."""
        return len(self.class_names)

    def by_class(self) -> tuple[Tensor, Tensor]:
        """The training images in order of class, and within a class in their own order.

        Returns ``order`` int64 [M], indices of images, and ``class_offsets`` int64 [K + 1]: those
        of class k are ``order[class_offsets[k]:class_offsets[k + 1]]``.
        """
        order = torch.argsort(self.train_labels, stable=True)
        return order, _running_sums(self._class_sizes())

    def batch_offsets(self, batch: int) -> tuple[Tensor, int]:
        """Where each class starts in a real batch of at most ``batch`` images a class.

        Returns ``offsets`` int64 [K + 1], the running sums of min(batch, class size), and its
        last entry, the rows of the batch.
        """
        offsets = _running_sums(self._class_sizes().clamp(max=batch))
        return offsets, int(offsets[-1])

    def normalise(self, images: Tensor) -> Tensor:
        """Images [n, H, W, C] of this set as float32 [n, C, H, W]: less the mean, over the std.

        uint8 is scaled to [0, 1] first. Works in the memory of its result alone.
        """
        n, height, width, channels = images.shape
        result = torch.empty(n, channels, height, width, dtype=torch.float32, device=images.device)
        result.copy_(images.permute(0, 3, 1, 2))
        if images.dtype == torch.uint8:
            result.div_(255)
        # By numbers, not by tensors of them: these would be sent to a device, which a graph cannot.
        for channel, mean, std in zip(result.unbind(1), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        return result

    def normalised(self) -> NormalisedImages:
        """The training images, normalised as they are picked."""
        return NormalisedImages(self, self.train_images)

    def _class_sizes(self) -> Tensor:
        return torch.bincount(self.train_labels, minlength=self.classes)


@dataclass(frozen=True, eq=False)
class NormalisedImages:
    """Real images that stay the bytes they are: those picked by an index are normalised.

    ``images`` [N, H, W, C] are of the set ``source``, on any device.
    """

    source: ImageData
    images: Tensor
    memory_format: torch.memory_format = torch.contiguous_format

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        """[n, C, H, W] float32."""
        return self.source.normalise(self.images[index]).contiguous(
            memory_format=self.memory_format
        )

    @property
    def shape(self) -> torch.Size:
        """[N, C, H, W]."""
        n, height, width, channels = self.images.shape
        return torch.Size((n, channels, height, width))

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(
        self, device: torch.device, memory_format: torch.memory_format = torch.contiguous_format
    ) -> NormalisedImages:
        """The same on a device; those picked have the memory format."""
        return NormalisedImages(self.source, self.images.to(device), memory_format)


def _running_sums(sizes: Tensor) -> Tensor:
    return torch.nn.functional.pad(sizes.cumsum(0), (1, 0))


def load(
    name: str, root: str | Path | None = None, *, cache: bool = True, download: bool = False
) -> ImageData:
    """Loads a set of real images; raises :class:`InputError` on anything that is unusable.

    ``name``: digits (scikit-learn's, needs no files), mnist, fashion-mnist, svhn, cifar10,
    cifar100, tiny-imagenet, the path of a folder or ``.npz`` file, or ``hf:owner/name``.
    ``root``: for a set known by name, the folder that holds its folder or its files; None looks in
    ``./data``, then in ``$DMFAST_DATA``. ``cache``: keep decoded images in the user's cache folder.
    ``download``: fetch a known set that is not found, into ``root`` (or ``./data``) by torchvision
    or into the hub's cache by ``datasets``, whichever is installed.

    Of a tree or parquet set with test and validation splits, test is the test set. Classes are the
    labels 0 to the largest in training, which must all occur.
    """
    name = canonical_name(name)
    if name == "digits":
        return _image_data(name, name, _read_digits())
    try:
        if name in KNOWN:
            layout = locate(name, root, download)
        elif name.startswith("hf:"):
            layout = hub_layout(name[3:])
        else:
            layout = locate_path(name)
        raw = _cache.read(layout) if cache and layout.decodes else layout.read()
    except OSError as error:  # a file that vanishes or may not be read
        raise InputError(f"{error.filename or name} cannot be read: {reason(error)}") from error
    return _image_data(name, name if layout.kind == "hub" else str(layout.folder), raw)


def _read_digits() -> RawSet:
    """scikit-learn's 1,797 digits of 8x8, every fifth of each class (in its order) for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[4::5]] = True
    return RawSet(
        Split(images[~is_test], labels[~is_test]), Split(images[is_test], labels[is_test])
    )


# Checking a set.


def _image_data(name: str, where: str, raw: RawSet) -> ImageData:
    """The set as tensors, once it is known to be sound; ``where`` it is from, for errors."""
    train, test = (
        _checked(f"{where}: {split_name}", split)
        for split_name, split in (("training", raw.train), ("test", raw.test))
    )
    shape = train.images.shape[1:]
    if test.images.shape[1:] != shape:
        raise InputError(
            f"{where}: training images are {_shape_words(shape)}, but test images are "
            f"{_shape_words(test.images.shape[1:])}: make them alike"
        )
    known = KNOWN.get(name)
    class_names = raw.class_names or (known.class_names if known else ())
    classes = _count_classes(where, train.labels, test.labels, class_names)
    if known is not None:
        _check_known(name, known, where, shape, classes)
        if other := names_of_another(name, raw.class_names):
            raise InputError(
                f"{where} has the classes of {other} ({', '.join(raw.class_names[:3])}, ...), not "
                f"of {name}: give --dataset {other}, or the path in place of the name"
            )
    mean, std = (known.mean, known.std) if known else _measure(train.images)
    return ImageData(
        train_images=_tensor(train.images),
        train_labels=_tensor(train.labels),
        test_images=_tensor(test.images),
        test_labels=_tensor(test.labels),
        class_names=class_names[:classes] or tuple(str(label) for label in range(classes)),
        mean=mean,
        std=std,
        name=name,
    )


def _shape_words(shape: tuple[int, ...]) -> str:
    return f"{size_words(shape)} in {shape[-1]} channel{'s' if shape[-1] > 1 else ''}"


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _checked(what: str, split: Split) -> Split:
    """The split with int64 labels, if it has images, all of some size, and a label for each."""
    images, labels = split
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"{what} labels are {labels.dtype} {list(labels.shape)}: they must be one integer an "
            "image"
        )
    if len(images) != len(labels):
        raise InputError(f"{what} has {len(images)} images but {len(labels)} labels: replace it")
    if images.size == 0:
        raise InputError(
            f"{what} images are {list(images.shape)}: there must be at least one pixel"
        )
    return Split(images, labels.astype(np.int64))


def _count_classes(
    where: str,
    train_labels: NDArray[np.int64],
    test_labels: NDArray[np.int64],
    class_names: tuple[str, ...],
) -> int:
    """The number of classes: labels 0 to the largest in training, all of which must occur."""
    present = np.unique(train_labels)
    largest = int(present[-1])
    limit = len(class_names) if class_names else largest + 1
    low = min(int(present[0]), int(test_labels.min()))
    high = max(largest, int(test_labels.max()))
    if low < 0 or high >= limit:
        raise InputError(
            f"{where}: label {low if low < 0 else high} is outside the classes, 0 to {limit - 1}: "
            "relabel such images or remove them"
        )
    if len(present) <= largest:
        gap = int(np.flatnonzero(present != np.arange(len(present)))[0])
        raise InputError(
            f"{where}: no training image has label {gap}, but labels go up to {largest}: number "
            f"the {len(present)} classes from 0 without a gap"
        )
    return largest + 1


def _check_known(
    name: str, known: KnownSet, where: str, shape: tuple[int, ...], classes: int
) -> None:
    """Raises InputError where what was found under a known name is another set."""
    # The first classes of TinyImageNet are in use as a set of their own.
    fits = classes == known.classes or (name == "tiny-imagenet" and classes < known.classes)
    if shape != known.shape or not fits:
        raise InputError(
            f"{where} holds {classes} classes of images of {_shape_words(shape)}, but {name} has "
            f"{known.classes} of {_shape_words(known.shape)}: give the path in place of the name"
        )


_MEASURED_AT_ONCE = 1024  # images


def _measure(images: NDArray[Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images [n, H, W, C] scaled to [0, 1].

    Sums of uint8 are exact in float64, so they do not depend on the order of adding. A constant
    channel is given the deviation 1, which leaves it at 0 when normalised.
    """
    scale = 255 if images.dtype == np.uint8 else 1
    means, stds = [], []
    for channel in range(images.shape[3]):
        total = squares = 0.0
        for start in range(0, len(images), _MEASURED_AT_ONCE):
            part = images[start : start + _MEASURED_AT_ONCE, ..., channel].astype(np.float64)
            total += float(part.sum())
            squares += float(np.square(part).sum())
        count = images[..., channel].size
        mean = total / count
        variance = max(squares / count - mean * mean, 0.0)
        means.append(mean / scale)
        stds.append(variance**0.5 / scale or 1.0)
    return tuple(means), tuple(stds)

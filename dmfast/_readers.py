# SPDX-License-Identifier: MIT
"""Layouts of image sets that hold plain arrays: idx, CIFAR's pickles, SVHN's .mat, .npz.

A recogniser takes a folder and returns a :class:`Layout`, None where the folder holds nothing of
the kind, or raises :class:`InputError` where a part is missing. Nothing is read until
``Layout.read`` is called.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._unpickle import load_plain
from .errors import InputError


class Split(NamedTuple):
    """Images [n, H, W, C], uint8 or float32 in [0, 1], and labels [n] of any integer type."""

    images: NDArray[Any]
    labels: NDArray[Any]


class RawSet(NamedTuple):
    """Both splits as read, not yet checked; no class names where the layout has none."""

    train: Split
    test: Split
    class_names: tuple[str, ...] = ()


class Layout(NamedTuple):
    """A set that was recognised: its kind, where it is, every file it consists of, its reader.

    ``decodes`` says that reading takes long enough to be worth caching.
    """

    kind: str
    folder: Path
    files: tuple[Path, ...]
    read: Callable[[], RawSet]
    decodes: bool = False


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Turns any exception inside into one :class:`InputError` that names ``what`` was read.

    Any: what a damaged file makes numpy, pickle, Pillow or Arrow raise has no common class.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{what} cannot be read, it may be truncated ({reason(error)}): copy or download it "
            "again"
        ) from error


def reason(error: Exception) -> str:
    """What an exception says, in one line of at most 160 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:160]


def require(paths: tuple[Path, ...]) -> None:
    """Raises :class:`InputError` for the first of a layout's files that is not there."""
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path} is missing beside its siblings: copy or download it again")


# idx: MNIST, FashionMNIST and their like.

_IDX_NAME = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")


def idx_layout(folder: Path) -> Layout | None:
    """MNIST's four files, packed by gzip or not."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()):  # so that of a file and its .gz the first is taken
        if match := _IDX_NAME.fullmatch(path.name):
            found.setdefault(("train" if match[1] == "train" else "t10k", match[2]), path)
    if not found:
        return None
    parts = [(split, what) for split in ("train", "t10k") for what in ("images", "labels")]
    files = tuple(
        found.get((split, what), folder / f"{split}-{what}-idx{rank}-ubyte.gz")
        for (split, what), rank in zip(parts, (3, 1, 3, 1), strict=True)
    )
    require(files)

    def read() -> RawSet:
        train_images, train_labels, test_images, test_labels = (
            _read_idx(path, rank) for path, rank in zip(files, (3, 1, 3, 1), strict=True)
        )
        return RawSet(
            Split(train_images[..., None], train_labels), Split(test_images[..., None], test_labels)
        )

    return Layout("idx", folder, files, read)


def _read_idx(path: Path, rank: int) -> NDArray[np.uint8]:
    """The array of an idx file: two zeros, the type (8: uint8), the rank, big-endian sides."""
    with reading(path):
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:4] != bytes((0, 0, 8, rank)):
            raise InputError(f"{path} is not an idx file of {rank}-dimensional uint8: replace it")
        shape = tuple(np.frombuffer(content, ">u4", rank, 4).tolist())
        start = 4 + 4 * rank
        if len(content) - start != prod(shape):
            raise InputError(
                f"{path} holds {len(content) - start} values, but its header says {prod(shape)}: "
                "copy or download it again"
            )
        values = np.frombuffer(content, np.uint8, offset=start)
        return np.array(values.reshape(shape), dtype=np.uint8)  # writable, as frombuffer's is not


# CIFAR's pickles, as torchvision unpacks them.


def cifar10_layout(folder: Path) -> Layout | None:
    """``cifar-10-batches-py``."""
    batches = tuple(folder / f"data_batch_{i}" for i in range(1, 6))
    if not any(path.is_file() for path in batches):
        return None
    return _cifar_layout(
        "cifar10", folder, batches, folder / "test_batch", folder / "batches.meta", "label"
    )


def cifar100_layout(folder: Path) -> Layout | None:
    """``cifar-100-python``, with its fine labels."""
    train, test, meta = folder / "train", folder / "test", folder / "meta"
    if not (train.is_file() and meta.is_file()):
        return None
    return _cifar_layout("cifar100", folder, (train,), test, meta, "fine_label")


def _cifar_layout(
    kind: str, folder: Path, batches: tuple[Path, ...], test: Path, meta: Path, label: str
) -> Layout:
    files = (*batches, test, meta)
    require(files)

    def read() -> RawSet:
        train = [_read_cifar_batch(path, f"{label}s") for path in batches]
        with reading(meta):
            names = tuple(str(name) for name in load_plain(meta)[f"{label}_names"])
        return RawSet(
            Split(
                np.concatenate([batch.images for batch in train]),
                np.concatenate([batch.labels for batch in train]),
            ),
            _read_cifar_batch(test, f"{label}s"),
            names,
        )

    return Layout(kind, folder, files, read)


def _read_cifar_batch(path: Path, label: str) -> Split:
    with reading(path):
        batch = load_plain(path)
        data, labels = np.asarray(batch["data"]), np.asarray(batch[label])
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
            raise InputError(
                f"{path} holds {data.dtype} {list(data.shape)}, not CIFAR's uint8 [n, 3072]: "
                "replace it"
            )
    if labels.shape != data.shape[:1]:
        raise InputError(f"{path} holds {len(data)} images but {labels.size} labels: replace it")
    return Split(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)


# SVHN.


def svhn_layout(folder: Path) -> Layout | None:
    """SVHN's cropped digits; its label 10 means the digit 0."""
    train, test = files = (folder / "train_32x32.mat", folder / "test_32x32.mat")
    if not (train.is_file() or test.is_file()):
        return None
    require(files)
    return Layout("svhn", folder, files, lambda: RawSet(_read_svhn(train), _read_svhn(test)))


def _read_svhn(path: Path) -> Split:
    from scipy.io import loadmat

    with reading(path):
        content = loadmat(path, variable_names=("X", "y"))
        images, labels = content["X"], content["y"].ravel().astype(np.int64)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise InputError(f"{path} holds {images.dtype} images, not SVHN's uint8: replace it")
    return Split(images.transpose(3, 0, 1, 2), np.where(labels == 10, 0, labels))


# .npz


def npz_layout(path: Path) -> Layout:
    """One ``.npz`` file of train_images, train_labels, test_images and test_labels.

    Images [n, H, W] or [n, H, W, C] with 1 to 4 channels, uint8 or floating point in [0, 1];
    labels [n] or [n, 1] of any integer type.
    """

    def read() -> RawSet:
        with reading(path), np.load(path, allow_pickle=False) as file:
            names = [f"{split}_{what}" for split in ("train", "test") for what in _NPZ_PARTS]
            if missing := [name for name in names if name not in file]:
                raise InputError(f"{path} has no array {missing[0]}: it needs {', '.join(names)}")
            train_images, train_labels, test_images, test_labels = (file[name] for name in names)
        return RawSet(
            Split(_npz_images(path, "train", train_images), _npz_labels(train_labels)),
            Split(_npz_images(path, "test", test_images), _npz_labels(test_labels)),
        )

    return Layout("npz", path, (path,), read)


_NPZ_PARTS = ("images", "labels")


def _npz_images(path: Path, split: str, images: NDArray[Any]) -> NDArray[Any]:
    name = f"{path}: {split}_images"
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or not 1 <= images.shape[-1] <= 4:
        raise InputError(
            f"{name} has shape {list(images.shape)}: images are [n, height, width, channels], with "
            "1 to 4 channels last"
        )
    if images.dtype == np.uint8 or images.size == 0:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"{name} is {images.dtype}: save uint8, or float in [0, 1]")
    low, high = float(images.min()), float(images.max())  # both are NaN where one value is
    if not np.isfinite((low, high)).all():
        raise InputError(f"{name} has values that are NaN or infinite: remove them")
    if low < 0 or high > 1:
        raise InputError(f"{name} is in [{low:g}, {high:g}]: scale it to [0, 1], or save uint8")
    return images.astype(np.float32, copy=False)


def _npz_labels(labels: NDArray[Any]) -> NDArray[Any]:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels

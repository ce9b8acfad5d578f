# SPDX-License-Identifier: MIT
"""Small image sets, written in every layout that can be read."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat


class Arrays(NamedTuple):
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def grey(self) -> Arrays:
        return self._replace(
            train_images=self.train_images[..., :1], test_images=self.test_images[..., :1]
        )


def make(size: int = 32, classes: int = 10, train: int = 20, test: int = 10) -> Arrays:
    rng = np.random.default_rng(0)
    return Arrays(
        rng.integers(0, 256, (train, size, size, 3), dtype=np.uint8),
        rng.permutation(np.arange(train) % classes),
        rng.integers(0, 256, (test, size, size, 3), dtype=np.uint8),
        rng.permutation(np.arange(test) % classes),
    )


def idx_bytes(values: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + (
        values.astype(np.uint8).tobytes()
    )


def write_idx(folder: Path, arrays: Arrays, packed: bool = False) -> None:
    for split, images, labels in (("train", *arrays[:2]), ("t10k", *arrays[2:])):
        for what, values in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
            content = idx_bytes(values)
            name = f"{split}-{what}-ubyte{'.gz' if packed else ''}"
            (folder / name).write_bytes(gzip.compress(content) if packed else content)


def python2_pickle(rows: np.ndarray, labels: list[int]) -> bytes:
    """A CIFAR batch as its authors' Python 2 wrote it: arrays' bytes as a string."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        + b"(K\x01J" + struct.pack("<i", len(rows)) + b"M\x00\x0c\x86"
        + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + b"\x89T" + struct.pack("<i", rows.size) + rows.tobytes() + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


def cifar_rows(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def write_cifar10(folder: Path, arrays: Arrays, protocol: int = 0) -> None:
    """``protocol`` 0: as Python 2 wrote them."""
    batches = np.array_split(np.arange(len(arrays.train_labels)), 5)
    parts = [(f"data_batch_{i}", *arrays[:2], rows) for i, rows in enumerate(batches, 1)]
    parts.append(("test_batch", *arrays[2:], np.arange(len(arrays.test_labels))))
    for name, images, labels, rows in parts:
        pixels, numbers = cifar_rows(images[rows]), labels[rows].tolist()
        content = (
            pickle.dumps({b"data": pixels, b"labels": list(labels[rows])}, protocol)
            if protocol
            else python2_pickle(pixels, numbers)
        )
        (folder / name).write_bytes(content)
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, 2))


def write_cifar100(folder: Path, arrays: Arrays) -> None:
    for name, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        content = {"data": cifar_rows(images), "fine_labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, 2))
    names = [f"class {i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, 2))


def write_svhn(folder: Path, arrays: Arrays) -> None:
    for split, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)}
        savemat(folder / f"{split}_32x32.mat", content, do_compression=True)


def encoded(image: np.ndarray, kind: str = "png", mode: str | None = None) -> bytes:
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def table(cells: list[Any], labels: Any, label: str = "label", names: int = 10) -> pyarrow.Table:
    """The hub's layout; metadata that names so many classes."""
    features = {label: {"names": [f"class {i}" for i in range(names)], "_type": "ClassLabel"}}
    return pyarrow.table({"image": cells, label: labels}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def write_parquet(folder: Path, arrays: Arrays) -> None:
    for split, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
        cells = [{"bytes": encoded(image), "path": f"{i}.png"} for i, image in enumerate(images)]
        parquet.write_table(table(cells, labels), folder / f"{split}-00000-of-00001.parquet")


def write_parquet_shards(folder: Path, arrays: Arrays) -> None:
    """Two shards, lossless WebP, plain bytes, a split called validation, two kinds of label."""
    cells = [encoded(image, "webp") for image in arrays.train_images]
    whole = table(cells, arrays.train_labels, "fine_label", names=200)
    whole = whole.append_column("coarse_label", [arrays.train_labels // 5])
    parquet.write_table(whole[:7], folder / "train-00000-of-00002-0123abcd.parquet")
    parquet.write_table(whole[7:], folder / "train-00001-of-00002-4567cdef.parquet")
    cells = [encoded(image, "webp") for image in arrays.test_images]
    parquet.write_table(
        table(cells, arrays.test_labels, "fine_label"), folder / "validation-00000-of-00001.parquet"
    )
    (folder / "extra.parquet").write_bytes(b"another split")


def write_converted_parquet(folder: Path, arrays: Arrays) -> None:
    """The hub's own conversions: a folder a split."""
    write_parquet(folder, arrays)
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / f"{split}-00000-of-00001.parquet").rename(folder / split / "0000.parquet")


def write_tree(folder: Path, arrays: Arrays, test: str = "test") -> None:
    for split, images, labels in (("train", *arrays[:2]), (test, *arrays[2:])):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / split / f"class {label}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i:03}.PNG").write_bytes(encoded(image))
    (folder / "train" / ".hidden").mkdir()
    (folder / "train" / "class 0" / "notes.txt").write_text("not an image")


def write_tiny_imagenet(folder: Path, arrays: Arrays) -> None:
    wnids = [f"n{i:08}" for i in range(10)]
    (folder / "wnids.txt").write_text("\n".join(reversed(wnids)))
    (folder / "words.txt").write_text(
        "".join(f"{wnid}\tclass {i}, other word\n" for i, wnid in enumerate(wnids))
    )
    for i, (image, label) in enumerate(zip(*arrays[:2], strict=True)):
        place = folder / "train" / wnids[label] / "images"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{wnids[label]}_{i:03}.JPEG").write_bytes(encoded(image))
    place = folder / "val" / "images"
    place.mkdir(parents=True)
    lines = []
    for i, (image, label) in enumerate(zip(*arrays[2:], strict=True)):
        (place / f"val_{i}.JPEG").write_bytes(encoded(image))
        lines.append(f"val_{i}.JPEG\t{wnids[label]}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))


def write_npz(folder: Path, arrays: Arrays) -> None:
    np.savez(folder / "set.npz", **arrays._asdict())


#: Each writes a set into a folder that is there, ``npz`` as set.npz.
LAYOUTS: dict[str, Callable[[Path, Arrays], None]] = {
    "idx": lambda folder, arrays: write_idx(folder, arrays),
    "idx.gz": lambda folder, arrays: write_idx(folder, arrays, packed=True),
    "cifar10": lambda folder, arrays: write_cifar10(folder, arrays),
    "cifar10 protocol 2": lambda folder, arrays: write_cifar10(folder, arrays, 2),
    "cifar10 protocol 5": lambda folder, arrays: write_cifar10(folder, arrays, 5),
    "cifar100": write_cifar100,
    "svhn": write_svhn,
    "parquet": write_parquet,
    "parquet shards": write_parquet_shards,
    "parquet folders": write_converted_parquet,
    "tree": write_tree,
    "tree with val": lambda folder, arrays: write_tree(folder, arrays, "val"),
    "tiny-imagenet": write_tiny_imagenet,
    "npz": write_npz,
}

# SPDX-License-Identifier: MIT
"""Layouts of image sets that hold encoded images: parquet, TinyImageNet's folder, class folders.

Recognisers are as in ``_readers``. Images are decoded by Pillow, large ones in threads.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._readers import Layout, RawSet, Split, reading, reason
from .errors import InputError

if TYPE_CHECKING:
    import pyarrow

_TEST_SPLITS = ("test", "valid", "validation", "val")  # of several, the first is the test set
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_CHUNK = 256  # images a task
# Values in an image from which threads help. With two on 2 cores a JPEG of 224 x 224 takes half the
# time and one of 64 x 64 the same, but a WebP of 32 x 32 takes 1.6 times as long: there the threads
# mostly wait for Python's lock.
_WORTH_THREADS = 3 * 128 * 128


class Encoded(NamedTuple):
    """A split to decode.

    ``fetch(start, stop)`` gives the bytes of those images, ``name(i)`` what to call one in errors.
    """

    number: int
    fetch: Callable[[int, int], list[bytes | None]]
    name: Callable[[int], str]
    labels: NDArray[Any]


def _decode_set(train: Encoded, test: Encoded, class_names: tuple[str, ...]) -> RawSet:
    """Three channels where any image of either split is in colour, else one."""
    decoded = [decode(split) for split in (train, test)]
    in_colour = any(colour for _, colour in decoded)
    train_images, test_images = (
        images if in_colour else images[..., :1].copy() for images, _ in decoded
    )
    return RawSet(Split(train_images, train.labels), Split(test_images, test.labels), class_names)


def decode(split: Encoded) -> tuple[NDArray[np.uint8], bool]:
    """Images [n, H, W, 3] as RGB, and whether any of them is in colour."""
    if split.number == 0:
        return np.empty((0, 1, 1, 3), np.uint8), False
    first, _ = _pixels(split, 0, split.fetch(0, 1)[0])
    images = np.empty((split.number, *first.shape), np.uint8)

    def decode_chunk(start: int) -> bool:
        any_colour = False
        for i, data in enumerate(split.fetch(start, min(start + _CHUNK, split.number)), start):
            pixels, colour = _pixels(split, i, data)
            if pixels.shape != first.shape:
                raise InputError(
                    f"{split.name(i)} is {size_words(pixels.shape)}, but {split.name(0)} is "
                    f"{size_words(first.shape)}: make all images one size"
                )
            images[i] = pixels
            any_colour |= colour
        return any_colour

    workers = None if first.size >= _WORTH_THREADS else 1
    with ThreadPoolExecutor(workers) as pool:
        return images, any(list(pool.map(decode_chunk, range(0, split.number, _CHUNK))))


def size_words(shape: tuple[int, ...]) -> str:
    """The size of images [..., H, W, C] in words."""
    return f"{shape[-2]} x {shape[-3]} pixels (width x height)"


def _pixels(split: Encoded, i: int, data: bytes | None) -> tuple[NDArray[np.uint8], bool]:
    """Image i as RGB [H, W, 3], and whether it is in colour (a palette of greys is not)."""
    from PIL import Image

    if data is None:
        raise InputError(f"{split.name(i)} has no image bytes: a row must hold the image itself")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            mode = image.mode
            if mode not in _GREY_MODES | _COLOUR_MODES:
                raise InputError(
                    f"{split.name(i)} is of mode {mode}: save it with 8 bits a channel"
                )
            pixels = np.asarray(image if mode == "RGB" else image.convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # what damaged bytes make Pillow raise has no common class
        raise InputError(
            f"{split.name(i)} cannot be decoded, it may be truncated ({reason(error)}): "
            f"replace it by a {', '.join(_FORMATS)} image"
        ) from error
    if mode == "P":
        return pixels, bool((pixels != pixels[..., :1]).any())
    return pixels, mode not in _GREY_MODES


# Hugging Face parquet.

_PARQUET_SPLIT = re.compile(r"(?:^|[^a-z])(train|test|validation|valid|val)(?:[^a-z]|$)")
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label")


def parquet_layout(folder: Path) -> Layout | None:
    """Shards named by their split: ``train-00000-of-00002.parquet`` or ``train/0000.parquet``."""
    shards: dict[str, list[Path]] = {}
    stray = None  # SVHN has a split "extra", for one
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]):
        place = path.stem if path.parent == folder else path.parent.name
        if match := _PARQUET_SPLIT.search(place.lower()):
            shards.setdefault(match[1], []).append(path)
        elif path.parent == folder:
            stray = path
    if not shards:
        if stray is not None:
            raise InputError(f"{stray} is of no known split: name it train-... or test-...")
        return None
    test = next((shards[split] for split in _TEST_SPLITS if split in shards), None)
    train = shards.get("train")
    if train is None or test is None:
        missing = "train" if train is None else "test (or validation)"
        raise InputError(f"{folder} holds parquet files but none of split {missing}: add it")
    _require_all_shards(train)
    _require_all_shards(test)
    return Layout(
        "parquet",
        folder,
        (*train, *test),
        lambda: _read_tables(_read_parquet(train), _read_parquet(test), str(folder)),
        decodes=True,
    )


def _require_all_shards(paths: list[Path]) -> None:
    if (match := _SHARD.search(paths[0].stem)) and int(match[2]) != len(paths):
        raise InputError(
            f"{paths[0].parent} holds {len(paths)} shards like {paths[0].name}, but they are "
            f"{int(match[2])}: copy or download the others"
        )


def _read_parquet(paths: list[Path]) -> pyarrow.Table:
    import pyarrow
    from pyarrow import parquet

    tables = []
    for path in paths:
        with reading(path):
            file = parquet.ParquetFile(path)
            columns = list(_columns(file.schema_arrow.names, str(path)))
            tables.append(file.read(columns=columns))
    with reading(paths[0].parent):
        return pyarrow.concat_tables(tables)


def _columns(names: list[str], where: str) -> tuple[str, str]:
    """Which columns hold the image and the label."""
    image = next((name for name in _IMAGE_COLUMNS if name in names), None)
    label = next((name for name in _LABEL_COLUMNS if name in names), None)
    if image is None or label is None:
        wanted = _IMAGE_COLUMNS if image is None else _LABEL_COLUMNS
        raise InputError(
            f"{where} has the columns {', '.join(names)}: it needs one named {' or '.join(wanted)}"
        )
    return image, label


def _read_tables(train: pyarrow.Table, test: pyarrow.Table, where: str) -> RawSet:
    """Decodes two Arrow tables of the hub's layout; ``where`` they are from, for errors."""
    return _decode_set(
        from_table(train, f"{where}: train"),
        from_table(test, f"{where}: test"),
        names_in_metadata(train),
    )


def from_table(table: pyarrow.Table, where: str) -> Encoded:
    import pyarrow
    from pyarrow import compute

    image_name, label_name = _columns(table.column_names, where)
    cells, labels = table[image_name], table[label_name]
    paths = None
    if pyarrow.types.is_struct(cells.type):
        if "path" in [field.name for field in cells.type]:
            paths = compute.struct_field(cells, "path")
        cells = compute.struct_field(cells, "bytes")
    if not (pyarrow.types.is_binary(cells.type) or pyarrow.types.is_large_binary(cells.type)):
        raise InputError(f"{where}: column {image_name} is {cells.type}: it needs encoded images")
    if not pyarrow.types.is_integer(labels.type) or labels.null_count:
        raise InputError(f"{where}: column {label_name} needs an integer in every row")

    def name(i: int) -> str:
        path = paths[i].as_py() if paths is not None else None
        return f"{where} row {i}" + (f" ({path})" if path else "")

    return Encoded(
        table.num_rows,
        lambda start, stop: cells[start:stop].to_pylist(),
        name,
        labels.to_numpy(),
    )


def names_in_metadata(table: pyarrow.Table) -> tuple[str, ...]:
    """The class names that the hub keeps in a table's metadata; none where it has none."""
    _, label = _columns(table.column_names, "")
    try:
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


# Folders of image files.


def from_files(paths: list[Path], labels: list[int]) -> Encoded:
    def fetch(start: int, stop: int) -> list[bytes | None]:
        return [path.read_bytes() for path in paths[start:stop]]

    return Encoded(len(paths), fetch, lambda i: str(paths[i]), np.array(labels, dtype=np.int64))


def images_below(folder: Path) -> list[Path]:
    """Every image file in a folder and the folders in it, sorted; hidden ones left out."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in _SUFFIXES
        ]
    return sorted(found)


def _class_images(folder: Path) -> list[Path]:
    images = images_below(folder)
    if not images:
        raise InputError(
            f"class folder {folder} holds no image ({', '.join(sorted(_SUFFIXES))}): remove it, or "
            "fill it"
        )
    return images


def tiny_imagenet_layout(folder: Path) -> Layout | None:
    """The official folder: labels in the sorted order of wnids.txt, names from words.txt."""
    wnids_file, words_file = folder / "wnids.txt", folder / "words.txt"
    annotations = folder / "val" / "val_annotations.txt"
    test_folder = folder / "val" / "images"
    if not (wnids_file.is_file() and annotations.is_file() and test_folder.is_dir()):
        return None
    with reading(wnids_file):
        wnids = sorted(wnids_file.read_text().split())
    label_of = {wnid: label for label, wnid in enumerate(wnids)}

    train_paths: list[Path] = []
    train_labels: list[int] = []
    for wnid, label in label_of.items():
        images = _class_images(folder / "train" / wnid)
        train_paths += images
        train_labels += [label] * len(images)

    test_paths: list[Path] = []
    test_labels: list[int] = []
    with reading(annotations):
        for line in annotations.read_text().splitlines():
            name, wnid = line.split("\t")[:2]
            if wnid not in label_of:
                raise InputError(f"{annotations}: {name} is of class {wnid}, not in wnids.txt")
            test_paths.append(test_folder / name)
            test_labels.append(label_of[wnid])
    if sorted(test_paths) != (there := images_below(test_folder)):
        raise InputError(
            f"{annotations} lists {len(test_paths)} images, {test_folder} holds {len(there)}, and "
            "they are not the same: copy or download the set again"
        )

    def read() -> RawSet:
        return _decode_set(
            from_files(train_paths, train_labels),
            from_files(test_paths, test_labels),
            _words(words_file, wnids),
        )

    texts = (wnids_file, annotations, *([words_file] if words_file.is_file() else []))
    files = (*train_paths, *test_paths, *texts)
    return Layout("tiny-imagenet", folder, files, read, decodes=True)


def _words(path: Path, wnids: list[str]) -> tuple[str, ...]:
    """What words.txt calls each class, up to the first comma; the wnid where it says nothing."""
    words: dict[str, str] = {}
    if path.is_file():
        with reading(path):
            for line in path.read_text().splitlines():
                wnid, _, names = line.partition("\t")
                words[wnid] = names.split(",")[0].strip()
    return tuple(words.get(wnid) or wnid for wnid in wnids)


def tree_layout(folder: Path) -> Layout | None:
    """``train/<class>/*`` and ``test/<class>/*`` (or val, ...); labels by sorted class name.

    The images of a class may lie in folders below its own.
    """
    train_classes = class_folders(folder / "train")
    if not train_classes:
        return None
    test_folders = [folder / split for split in _TEST_SPLITS]
    test_classes = next(filter(None, map(class_folders, test_folders)), None)
    if test_classes is None:
        raise InputError(
            f"{folder} holds train/ but no {', '.join(_TEST_SPLITS[:-1])} or {_TEST_SPLITS[-1]} "
            "folder of the same classes: add one"
        )
    names = [path.name for path in train_classes]
    for path in test_classes:
        if path.name not in names:
            raise InputError(f"{path} is a class that {folder / 'train'} does not have: remove it")

    splits: list[tuple[list[Path], list[int]]] = []
    for classes in (train_classes, test_classes):
        paths: list[Path] = []
        labels: list[int] = []
        for path in classes:
            images = _class_images(path)
            paths += images
            labels += [names.index(path.name)] * len(images)
        splits.append((paths, labels))

    return Layout(
        "tree",
        folder,
        (*splits[0][0], *splits[1][0]),
        lambda: _decode_set(from_files(*splits[0]), from_files(*splits[1]), tuple(names)),
        decodes=True,
    )


def class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def hub_layout(repository: str) -> Layout:
    """A set of the Hugging Face hub, fetched and kept by the package ``datasets``.

    ``repository`` is owner/name, or owner/name:configuration for one of several.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"hf:{repository} needs the package datasets: pip install datasets"
        ) from error
    path, _, configuration = repository.partition(":")
    try:
        splits = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # of the network, the hub, the set, the package: no common class
        raise InputError(
            f"hf:{repository} could not be fetched ({reason(error)}): check name and network"
        ) from error
    test_name = next((split for split in _TEST_SPLITS if split in splits), None)
    if "train" not in splits or test_name is None:
        raise InputError(
            f"hf:{repository} has the splits {', '.join(splits)}: it needs train and test"
        )
    train, test = splits["train"], splits[test_name]

    def table(split: Any) -> pyarrow.Table:
        image, _ = _columns(split.column_names, f"hf:{repository}")
        undecoded = split.cast_column(image, datasets.Image(decode=False))
        return undecoded.with_format("arrow")[:]

    files = tuple(Path(file["filename"]) for split in (train, test) for file in split.cache_files)
    return Layout(
        "hub",
        files[0].parent if files else Path(),
        files,
        lambda: _read_tables(table(train), table(test), f"hf:{repository}"),
        decodes=bool(files),  # without files there is nothing to key a cache by
    )

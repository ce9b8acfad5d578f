# SPDX-License-Identifier: MIT
"""Which sets are known by name, and where a set of that name, or at a path, is found."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._images import (
    class_folders,
    hub_layout,
    images_below,
    parquet_layout,
    tiny_imagenet_layout,
    tree_layout,
)
from ._readers import (
    Layout,
    cifar10_layout,
    cifar100_layout,
    idx_layout,
    npz_layout,
    reason,
    svhn_layout,
)
from .errors import InputError


@dataclass(frozen=True)
class KnownSet:
    """What a set known by name must look like, and where it comes from.

    ``folders``: usual names of its folder, the first of which is suggested; letter case and
    punctuation do not count. ``layout``: the one of its own site. ``mean`` and ``std``: as the
    field publishes and uses them, which is not always what the images measure. ``hub``: its place
    on the Hugging Face hub. ``torchvision``: the class that downloads it.
    """

    folders: tuple[str, ...]
    layout: str
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hub: str
    torchvision: str | None = None
    class_names: tuple[str, ...] = ()


_DIGITS = tuple("0123456789")
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_THINGS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)

KNOWN = {
    "mnist": KnownSet(
        ("mnist",),
        "idx",
        (28, 28, 1),
        10,
        (0.1307,),
        (0.3081,),
        "ylecun/mnist",
        "MNIST",
        _DIGITS,
    ),
    "fashion-mnist": KnownSet(
        ("fashion-mnist", "dataset-fashion-mnist"),
        "idx",
        (28, 28, 1),
        10,
        (0.2861,),
        (0.3530,),
        "zalando-datasets/fashion_mnist",
        "FashionMNIST",
        _CLOTHES,
    ),
    "svhn": KnownSet(
        ("svhn", "cropped_digits"),
        "svhn",
        (32, 32, 3),
        10,
        (0.4377, 0.4438, 0.4728),
        (0.1980, 0.2010, 0.1970),
        "ufldl-stanford/svhn:cropped_digits",
        "SVHN",
        _DIGITS,
    ),
    "cifar10": KnownSet(
        ("cifar-10-batches-py", "cifar10", "cifar-10-python"),
        "cifar10",
        (32, 32, 3),
        10,
        (0.4914, 0.4822, 0.4465),
        (0.2023, 0.1994, 0.2010),
        "uoft-cs/cifar10",
        "CIFAR10",
        _THINGS,
    ),
    "cifar100": KnownSet(
        ("cifar-100-python", "cifar100"),
        "cifar100",
        (32, 32, 3),
        100,
        (0.5071, 0.4866, 0.4409),
        (0.2673, 0.2564, 0.2762),
        "uoft-cs/cifar100",
        "CIFAR100",
    ),
    "tiny-imagenet": KnownSet(
        ("tiny-imagenet-200", "tiny-imagenet"),
        "tiny-imagenet",
        (64, 64, 3),
        200,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        "zh-plus/tiny-imagenet",
    ),
}
NAMES = ("digits", *KNOWN)

_RECOGNISERS = {
    "cifar10": cifar10_layout,
    "cifar100": cifar100_layout,
    "idx": idx_layout,
    "svhn": svhn_layout,
    "parquet": parquet_layout,
    "tiny-imagenet": tiny_imagenet_layout,
    "tree": tree_layout,
}
_GENERIC = frozenset({"parquet", "tree"})  # layouts that any set may be in
_LAYOUT_WORDS = (
    "idx files, CIFAR's pickles, SVHN's .mat files, parquet shards, TinyImageNet's folder, or "
    "train/<class>/ and test/<class>/ folders of images"
)
# Folders in which torchvision and the hub keep files, within the folder of a set.
_INNER_FOLDERS = frozenset({"raw", "data", "plaintext"})


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_FOLDER_NAMES = {name: frozenset(map(_plain, known.folders)) for name, known in KNOWN.items()}


def names_of_another(name: str, class_names: tuple[str, ...]) -> str | None:
    """The known set, other than ``name``, that most of these class names are of.

    Numbers in the place of names are of any set.
    """
    words = {_plain(word) for word in class_names if not word.isdecimal()}

    def shared(known: KnownSet) -> int:
        return len(words & set(map(_plain, known.class_names)))

    best = max(KNOWN, key=lambda known: shared(KNOWN[known]))
    mine, most = shared(KNOWN[name]), shared(KNOWN[best])
    return best if most > mine and 2 * most > len(class_names) else None


def canonical_name(name: str) -> str:
    """The name of a known set as this package spells it, from any usual spelling ("CIFAR10").

    A hub name (``hf:owner/name``) comes back unchanged, the path of something that is there
    absolute; for a folder whose name is that of a known set, write ``./cifar10``. Anything else
    raises :class:`InputError`.
    """
    if re.fullmatch(r"[A-Za-z0-9 _-]+", name):
        for known in NAMES:
            if _plain(known) == _plain(name):
                return known
    if re.fullmatch(r"hf:[^/:\s]+/[^/:\s]+(:[^/:\s]+)?", name):
        return name
    if name and os.path.exists(path := os.path.expanduser(name)):
        return os.path.abspath(path)
    raise InputError(
        f"{name!r} is neither a known data set ({', '.join(NAMES)}), nor hf:owner/name, nor the "
        "path of a folder or .npz file that exists"
    )


def locate(name: str, root: str | Path | None, download: bool) -> Layout:
    """Where a known set is, under ``root`` or the default places; fetched if allowed and needed."""
    known = KNOWN[name]
    if root is not None:
        roots = [Path(os.path.expanduser(root))]
        places = str(roots[0])
        if not (roots[0].exists() or download):
            raise InputError(
                f"data root {places} does not exist: give the folder that holds {name}"
            )
    else:
        variable = os.environ.get("DMFAST_DATA")
        roots = [Path("data"), *([Path(os.path.expanduser(variable))] if variable else [])]
        places = f"./data or $DMFAST_DATA ({variable or 'not set'})"

    names = _FOLDER_NAMES[name]
    problem = None
    for folder in roots:
        for place in _places(folder, names | _INNER_FOLDERS):
            try:
                if layout := _recognise(place, _GENERIC | {known.layout}):
                    if (other := _named_after(place, folder)) not in (None, name):
                        raise InputError(
                            f"{layout.folder} is, by its name, {other} and not {name}: give "
                            f"--dataset {other}, the folder of {name}, or the path for the name"
                        )
                    return layout
                if _plain(place.stem) in names:
                    problem = problem or _unrecognised(place)
            except InputError as error:  # a part is missing; a whole set may be elsewhere
                problem = problem or error
    if download:
        return _download(name, known, roots[0])
    raise problem or InputError(
        f"{name} was not found in {places}: put its folder ({known.folders[0]}, or its parquet "
        f"files in a folder {name}) there, name the folder that holds it with --data-root or "
        "$DMFAST_DATA, or fetch it with --download"
    )


def _named_after(place: Path, root: Path) -> str | None:
    """The known set whose usual name the place bears, or the folder that it is inside of."""
    place, root = place.absolute(), root.absolute()
    for folder in (place, *place.parents):
        plain = _plain(folder.stem)
        if found := next((name for name, usual in _FOLDER_NAMES.items() if plain in usual), None):
            return found
        # What ``data`` is in may be a user's project, whatever its name.
        if plain not in _INNER_FOLDERS or (folder == root and plain == "data"):
            return None
    return None


def locate_path(name: str) -> Layout:
    """The set that a folder or ``.npz`` file is, or else that a folder in it is (``raw``, ...)."""
    path = Path(os.path.expanduser(name))
    for place in reversed(list(_places(path, _INNER_FOLDERS))):
        if layout := _recognise(place, _RECOGNISERS):
            return layout
    raise _unrecognised(path)


def _places(folder: Path, names: frozenset[str], depth: int = 3) -> Iterator[Path]:
    """Folders and .npz files of such names in a folder, inner ones first; then the folder."""
    if folder.is_dir() and depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and _plain(child.name) in names:
                yield from _places(child, names, depth - 1)
            elif child.suffix == ".npz" and _plain(child.stem) in names:
                yield child
    if folder.exists():
        yield folder


def _recognise(path: Path, kinds: Container[str]) -> Layout | None:
    if not path.is_dir():
        return npz_layout(path) if path.suffix == ".npz" else None
    for kind, recognise in _RECOGNISERS.items():
        if kind in kinds and (layout := recognise(path)):
            return layout
    return None


def _unrecognised(path: Path) -> InputError:
    if not path.is_dir():
        return InputError(f"{path} is not an .npz file: give the folder that holds the set")
    what = "is of no known layout" if any(path.iterdir()) else "is empty"
    classes = [folder.name for folder in class_folders(path) if images_below(folder)]
    hint = (
        f"; where {', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''} are its classes, "
        "move them to train/<class>/, and some images of each to test/<class>/"
        if classes
        else "; an .npz file is named itself"
    )
    return InputError(f"{path} {what}: it should hold {_LAYOUT_WORDS}{hint}")


def _download(name: str, known: KnownSet, folder: Path) -> Layout:
    """Fetches a set by torchvision into the folder, or else by ``datasets`` into its cache."""
    if known.torchvision is not None:
        try:
            from torchvision import datasets as torchvision_datasets
        except (ImportError, OSError, RuntimeError):  # the last two: it is for another torch
            pass
        else:
            _download_torchvision(torchvision_datasets, name, known.torchvision, folder)
            return locate(name, folder, download=False)
    return hub_layout(known.hub)


def _download_torchvision(module: Any, name: str, class_name: str, folder: Path) -> None:
    fetch = getattr(module, class_name)
    try:
        if class_name == "SVHN":  # fetches one split at a time, into no folder of its own
            for split in ("train", "test"):
                fetch(str(folder / name), split=split, download=True)
        else:
            fetch(str(folder), download=True)
    except Exception as error:  # of the network, the site, the disk: no common class
        raise InputError(
            f"{name} could not be downloaded ({reason(error)}): check the network, or put the set "
            f"in {folder} by hand"
        ) from error

# SPDX-License-Identifier: MIT
"""Decoded image sets, kept as uint8 in the user's cache folder and keyed by content."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from ._readers import Layout, RawSet, Split
from .files import atomic_path

_FORMAT = 1  # to be raised when what a reader makes of the same files changes


def read(layout: Layout) -> RawSet:
    """What ``layout.read()`` returns, from the cache where it is there, else put there.

    The cache only ever saves time: where it is damaged or cannot be written, the set is decoded.
    """
    folder = _folder()
    if folder is None:
        return layout.read()
    path = folder / f"{_key(layout)}.npz"
    cached = _load(path)
    if cached is None:
        cached = layout.read()
        with suppress(OSError):
            _save(path, cached)
    return cached


def _folder() -> Path | None:
    """$XDG_CACHE_HOME/dmfast or ~/.cache/dmfast; None for a user without a home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the specification ignores any other
        return base / "dmfast"
    with suppress(RuntimeError):
        return Path.home() / ".cache" / "dmfast"
    return None


def _key(layout: Layout) -> str:
    """Changes with any byte, name or number of the set's files, not with where or when."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, layout.files)
        key = hashlib.sha256(f"{_FORMAT} {layout.kind}".encode())
        for path, digest in zip(layout.files, digests, strict=True):
            name = os.fsencode(os.path.relpath(path, layout.folder))
            key.update(hashlib.sha256(name).digest() + digest)
    return key.hexdigest()


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()


def _load(path: Path) -> RawSet | None:
    """The set in a cache file; None where there is none or its checksums (zip has them) fail."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return RawSet(
                Split(file["train_images"], file["train_labels"]),
                Split(file["test_images"], file["test_labels"]),
                tuple(file["class_names"].tolist()),
            )
    except Exception:  # a damaged file raises nearly anything, and all of it means the same
        return None


def _save(path: Path, content: RawSet) -> None:
    """Writes a cache file that is there whole or not at all. OSError: the disk will not have it."""
    with atomic_path(path) as temporary:
        np.savez(
            temporary,
            train_images=content.train.images,
            train_labels=content.train.labels,
            test_images=content.test.images,
            test_labels=content.test.labels,
            class_names=np.array(content.class_names, dtype=str),
        )

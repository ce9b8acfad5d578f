# SPDX-License-Identifier: MIT
"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dmfast.files import atomic_path, write_bytes


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past ``size`` bytes fails as on a full disk (with EFBIG in place of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_makes_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_suffix_is_kept(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "x.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path
        temporary.touch()
    assert (tmp_path / "x.png").exists()


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_bytes(path, b"old")
    with largest_file(1000), pytest.raises(OSError, match="File too large") as raised:
        write_bytes(path, bytes(100_000))
    assert raised.value.errno == errno.EFBIG
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def write_folder(path: Path, failure: BaseException | None = None) -> None:
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "one").touch()
        if failure:
            raise failure


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "folder", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_errors_of_other_files_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised, atomic_path(tmp_path / "x.bin"):
        (tmp_path / "missing").read_bytes()
    assert raised.value.filename == str(tmp_path / "missing")


def test_folder_takes_an_empty_place_only(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_folder(folder)
    with pytest.raises(OSError, match="folder") as raised:
        write_folder(folder)
    assert raised.value.errno == errno.ENOTEMPTY
    assert raised.value.filename == str(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_bytes(tmp_path / "file" / "x.bin", b"")

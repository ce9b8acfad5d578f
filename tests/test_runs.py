# SPDX-License-Identifier: MIT
"""The folder of a run: whose it is, who may write to it, and disks that fail."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from test_condense import ARGUMENTS, assert_same_run, command, errors_of, small, start

from dmfast import files, runs
from dmfast.errors import InputError
from dmfast.runs import RunFolder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_folder_that_holds_a_run_is_left_alone(out: Path, capsys) -> None:
    small(out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert command(*ARGUMENTS, "--out", out) == 2
    line = errors_of(capsys)
    assert "--resume" in line
    assert "--overwrite" in line
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_left_alone(out: Path, capsys) -> None:
    out.write_text("mine")
    assert command(*ARGUMENTS, "--out", out) == 2
    assert "is not a folder" in errors_of(capsys)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "checkpoint.safetensors", "evaluation.json"])
@pytest.mark.parametrize("option", ["", "--resume", "--overwrite"])
def test_files_of_something_else_are_left_alone(out: Path, capsys, name, option) -> None:
    out.mkdir()
    (out / name).write_text('{"model": "mine"}')
    assert command(*ARGUMENTS, "--out", out, *option.split()) == 2
    assert f"holds {name} of something else than a run; choose another" in errors_of(capsys)
    assert (out / name).read_text() == '{"model": "mine"}'
    assert len(list(out.iterdir())) == 1


def test_overwriting_leaves_nothing_of_the_other_run(out: Path, tmp_path: Path) -> None:
    small(out, iterations=20)
    (out / "evaluation.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    small(out, seed=9, overwrite=True)
    small(tmp_path / "straight", seed=9)
    assert_same_run(tmp_path / "straight", out)
    assert not (out / "evaluation.json").exists()
    assert (out / "notes.txt").exists()


def test_a_folder_in_use_is_left_alone(out: Path) -> None:
    process = start("--iterations", 1_000_000, "--out", out)
    try:
        while not (out / "checkpoint.safetensors").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        for change in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=rf"{out} is in use by another process.*--out"):
                small(out, **change)
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    assert (out / ".lock").exists()
    small(out, overwrite=True)
    assert not (out / ".lock").exists()


def test_without_locks_a_run_is_made_all_the_same(out: Path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "fcntl", None)
    small(out)
    assert not (out / ".lock").exists()


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "choose a folder that can be written to"),
        (errno.EFBIG, "free some space"),
        (errno.EIO, "check the disk"),
    ],
)
def test_a_disk_that_fails_leaves_the_last_checkpoint(
    out: Path, monkeypatch, capsys, code: int, remedy: str
) -> None:
    original, count = os.fsync, []

    def failing(descriptor: int) -> None:
        count.append(descriptor)
        if len(count) > failing.after:
            raise OSError(code, os.strerror(code))
        original(descriptor)

    monkeypatch.setattr(files.os, "fsync", failing)
    failing.after = 2 * 3 + 2  # a file and its folder: config, metrics, checkpoints 0 and 4
    assert command(*ARGUMENTS, "--iterations", 12, "--out", out) == 2
    line = errors_of(capsys)
    assert os.strerror(code) in line
    assert "checkpoint of iteration 4 is kept" in line
    assert remedy in line
    assert RunFolder(out).read_checkpoint().iteration == 4
    monkeypatch.undo()
    small(out, resume=True)
    small(out.parent / "straight")
    assert_same_run(out.parent / "straight", out)


def test_a_disk_that_fails_at_the_start_leaves_nothing(out: Path, monkeypatch) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(InputError, match=r"config\.json could not be written: No space left"):
        small(out)
    assert not out.exists()

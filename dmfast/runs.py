# SPDX-License-Identifier: MIT
"""A run's folder: what is kept in it, and in which order, so that a run can end at any moment.

============================ =====================================================================
config.json                  all options as resolved, versions and machine
metrics.jsonl                an object a report: iteration, loss, seconds, images_per_second,
                             peak_memory_bytes; and an object an evaluation: iteration,
                             accuracy_mean, accuracy_std, accuracies
checkpoint.safetensors       iteration, images, momentum: all there is to continue from
synthetic.safetensors        the condensed set (:class:`dmfast.synthetic.SyntheticSet`)
grid.png, loss.png           the same to look at
============================ =====================================================================

While a process works in the folder it holds ``.lock`` in it, which keeps others out; a process that
is killed leaves the file but not the lock.

Every file but ``metrics.jsonl`` is replaced in one step. That one is only appended to, before the
checkpoint is written, and what it says beyond the checkpoint is cut off on resuming.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cli import disk_words
from .devices import machine, versions
from .errors import InputError
from .files import write_bytes

try:
    import fcntl
except ImportError:  # not everywhere
    fcntl = None  # type: ignore[assignment]

_FORMAT = "dmfast-checkpoint-1"
_CONFIG_KEYS = {"options", "versions", "machine"}


@dataclass(frozen=True)
class Checkpoint:
    """A run after ``iteration`` updates.

    Attributes:
        images, momentum: float32 [N, C, H, W], on the CPU when read.
        seconds: what the run has taken so far.
        options: those that the run's numbers depend on.
        data: checksum of the real images.
    """

    iteration: int
    images: Tensor
    momentum: Tensor
    seconds: float
    options: dict[str, Any]
    data: str


class RunFolder:
    """The files of one run.

    Where the disk is full or may not be written, every method raises :class:`InputError`, and the
    last checkpoint is still there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.synthetic = self.path / "synthetic.safetensors"
        self.grid = self.path / "grid.png"
        self.loss = self.path / "loss.png"
        self.kept = "nothing was written"

    def holds_run(self) -> bool:
        """Whether there is a run here, or what is left of one.

        Raises:
            InputError: the path is taken by something that is no folder, or the names of a run's
                files by files of something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder; choose another --out")
        there = [path.name for path in self._files() if path.exists()]
        if there and not self._is_run():
            raise InputError(
                f"{self.path} holds {', '.join(there)} of something else than a run; choose "
                "another --out"
            )
        return bool(there)

    def _is_run(self) -> bool:
        if not self.config.exists():
            with suppress(InputError):
                return self.read_checkpoint() is not None
            return False
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and content.keys() >= _CONFIG_KEYS

    def clear(self) -> None:
        """Removes the files of a run.

        The checkpoint goes first: without it, what is left can only be started over. What tells
        that the others are of a run goes last.
        """
        with self.writing():
            for path in (*self._leftovers(), *self._files()):
                path.unlink(missing_ok=True)

    def start(self, options: dict[str, Any], checkpoint: Checkpoint) -> None:
        """Begins a run at ``checkpoint`` in a folder that holds none, or leaves nothing in it."""
        try:
            self.write_config(options)
            self.write_metrics([])
            self.write_checkpoint(checkpoint)
        except BaseException:
            with suppress(InputError):
                self.clear()
            raise

    def resume(self, options: dict[str, Any], checkpoint: Checkpoint) -> list[dict[str, Any]]:
        """Puts the folder in the state that it had at ``checkpoint``; gives its metrics."""
        self.kept = _says(checkpoint)
        with self.writing():
            for path in self._leftovers():
                path.unlink(missing_ok=True)
        self.write_config(options)
        records = [r for r in self.read_metrics() if r["iteration"] <= checkpoint.iteration]
        self.write_metrics(records)
        return records

    def write_config(self, options: dict[str, Any]) -> None:
        device = torch.device(options["device"])
        content = {"options": options, "versions": versions(), "machine": machine(device)}
        with self.writing():
            write_bytes(self.config, (json.dumps(content, indent=2) + "\n").encode())

    def append_metrics(self, record: dict[str, Any]) -> None:
        with self.writing(), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        with self.writing():
            write_bytes(self.metrics, "".join(json.dumps(r) + "\n" for r in records).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records, up to the first line that was not written to its end."""
        records: list[dict[str, Any]] = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                records.append(record)
        return records

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        from safetensors.torch import save

        tensors = {"images": checkpoint.images, "momentum": checkpoint.momentum}
        metadata = {
            "format": _FORMAT,
            "iteration": str(checkpoint.iteration),
            "seconds": repr(checkpoint.seconds),
            "options": json.dumps(checkpoint.options),
            "data": checkpoint.data,
        }
        with self.writing():
            content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            write_bytes(self.checkpoint, save(content, metadata))
        self.kept = _says(checkpoint)

    def read_checkpoint(self) -> Checkpoint | None:
        """The checkpoint, or None where none was written yet.

        Raises:
            InputError: the file is not a checkpoint, or damaged.
        """
        if not self.checkpoint.exists():
            return None
        with self._opened_checkpoint() as (file, metadata):
            return Checkpoint(
                iteration=int(metadata["iteration"]),
                images=file.get_tensor("images"),
                momentum=file.get_tensor("momentum"),
                seconds=float(metadata["seconds"]),
                options=json.loads(metadata["options"]),
                data=metadata["data"],
            )

    def read_progress(self) -> tuple[int, float]:
        """How many iterations the checkpoint has, and their seconds; (0, 0.0) where there is none.

        Raises:
            InputError: see :meth:`read_checkpoint`.
        """
        if not self.checkpoint.exists():
            return 0, 0.0
        with self._opened_checkpoint() as (_, metadata):
            return int(metadata["iteration"]), float(metadata["seconds"])

    @contextmanager
    def _opened_checkpoint(self) -> Iterator[tuple[Any, dict[str, str]]]:
        """The file and its metadata; what is wrong with them becomes an InputError."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.checkpoint, "pt") as file:
                metadata = file.metadata()
                if metadata["format"] != _FORMAT:
                    raise ValueError(metadata["format"])
                yield file, metadata
        except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.checkpoint} is not a checkpoint that can be read ({error}); start the run "
                "anew with --overwrite"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns a disk that fails into an :class:`InputError` that says what is kept."""
        try:
            yield
        except OSError as error:
            reason, remedy = disk_words(error)
            raise InputError(
                f"{error.filename or self.path} could not be written: {reason}; {self.kept}: "
                f"{remedy}"
            ) from error

    def _files(self) -> list[Path]:
        """In the order in which they are removed."""
        evaluations = (self.path / f"evaluation{part}.json" for part in ("", ".partial"))
        return [
            *(self.checkpoint, self.metrics, self.synthetic, self.grid, self.loss, *evaluations),
            self.config,
        ]

    def _leftovers(self) -> list[Path]:
        """What a killed process was writing to."""
        return list(self.path.glob(".*.partial.*"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made, and removed again if left empty.

    Where a lock cannot be had (no ``fcntl``, a disk without locks or that may not be written)
    there is none.

    Raises:
        InputError: another process is in the folder.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / ".lock"
    descriptor = _lock(lock)
    try:
        yield
    finally:
        with suppress(OSError):
            if descriptor is not None:
                lock.unlink(missing_ok=True)
                os.close(descriptor)
            for path in missing:
                path.rmdir()


def _lock(path: Path) -> int | None:
    """An open file that holds the lock; None where there is none to be had."""
    if fcntl is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The one who held it may have removed the file between the two calls.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
    except BlockingIOError as error:
        raise InputError(
            f"{path.parent} is in use by another process: wait for its end, or choose another --out"
        ) from error
    except OSError:
        return None


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Lets Ctrl-C take effect only when the block has ended, so that it is done or not begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[Any, ...]] = []
    handler = signal.signal(signal.SIGINT, lambda *event: received.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received and callable(handler):
        handler(*received[0])


def _says(checkpoint: Checkpoint) -> str:
    return f"the checkpoint of iteration {checkpoint.iteration} is kept for --resume"

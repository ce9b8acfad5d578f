# SPDX-License-Identifier: MIT
"""Real batches for a device that cannot hold the whole set: gathered on the host, sent ahead.

The thread that gathers is one of Python: all that it does at length (the draw, ``index_select``,
copies) is torch's, which lets the interpreter go on meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch
from torch import Tensor

from .errors import InputError

_AHEAD = 2  # batches


class Prefetcher:
    """Has the batch of an iteration on the device, while the next two are on their way.

    A thread gathers them, from the first :meth:`load` on to :meth:`close`. On a GPU it gathers into
    pinned memory and sends from there on a stream of its own; nothing waits but this thread.

    Attributes:
        batch: the images of the iteration last loaded, always in the same memory.
    """

    def __init__(
        self, images: Tensor, draw: Callable[..., Tensor], rows: int, device: torch.device
    ) -> None:
        """Allocates all that there is to be, and starts nothing yet.

        Args:
            images: the set, [M, ...], on the host.
            draw: gives the indices of an iteration's images, [rows] int64, for its ``step=``.
        """
        self._images, self._draw = images, draw
        shape = rows, *images.shape[1:]
        self.batch = torch.empty(shape, dtype=images.dtype, device=device)
        self._slots = [_Slot(self.batch) for _ in range(_AHEAD)]
        self._loaded: int | None = None
        self._next: int | None = None  # what the thread gives next
        self._thread: threading.Thread | None = None
        self._free: SimpleQueue[_Slot | None] = SimpleQueue()
        self._ready: SimpleQueue[_Slot | Exception] = SimpleQueue()

    def load(self, step: int) -> None:
        """Has the batch of iteration ``step`` in :attr:`batch`, for what the stream does next.

        Consecutive iterations are ready; any other starts the thread anew.

        Raises:
            InputError: the batch could not be gathered.
        """
        if step == self._loaded:
            return
        if step != self._next:
            self._start(step)
        self._loaded = self._next = None  # until this is done
        slot = self._ready.get()
        if isinstance(slot, Exception):
            reason = str(slot).partition("\n")[0]
            raise InputError(
                f"the real images of iteration {step} could not be gathered: {reason}"
            ) from slot
        slot.read_into(self.batch)
        self._free.put(slot)
        self._loaded, self._next = step, step + 1

    def close(self) -> None:
        """Ends the thread; :meth:`load` would start another."""
        if self._thread is not None:
            self._free.put(None)
            self._thread.join()
        self._thread = self._next = None
        for slot in self._slots:
            slot.wait()

    def _start(self, step: int) -> None:
        self.close()
        self._free, self._ready = SimpleQueue(), SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)
        self._thread = threading.Thread(
            target=self._gather,
            args=(step, self._free, self._ready),
            name="dmfast-prefetch",
            daemon=True,
        )
        self._thread.start()

    def _gather(
        self, step: int, free: SimpleQueue[_Slot | None], ready: SimpleQueue[_Slot | Exception]
    ) -> None:
        try:
            while (slot := free.get()) is not None:
                slot.fill(self._images, self._draw(step=step))
                ready.put(slot)
                step += 1
        except Exception as error:
            ready.put(error)


class _Slot:
    """Room for a batch on its way."""

    def __init__(self, batch: Tensor) -> None:
        self._host = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=batch.is_cuda)
        self._sent = torch.empty_like(batch) if batch.is_cuda else self._host
        self._stream: torch.cuda.Stream | None = None
        if batch.is_cuda:
            self._stream = torch.cuda.Stream(batch.device)  # type: ignore[no-untyped-call]
            # blocking: the thread sleeps while it waits.
            self._is_sent = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._is_read = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # What had this memory before may still be in use on the stream it is allocated on.
            self._is_read.record(torch.cuda.current_stream(batch.device))

    def fill(self, images: Tensor, index: Tensor) -> None:
        """Gathers a batch and sends it; called by the thread."""
        self.wait()
        torch.index_select(images, 0, index, out=self._host)
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._is_read)
                self._sent.copy_(self._host, non_blocking=True)
                self._is_sent.record(self._stream)

    def read_into(self, batch: Tensor) -> None:
        """Copies the batch on the current stream, once it has arrived."""
        if self._stream is None:
            batch.copy_(self._sent)
            return
        stream = torch.cuda.current_stream(batch.device)
        stream.wait_event(self._is_sent)
        batch.copy_(self._sent, non_blocking=True)
        self._is_read.record(stream)

    def wait(self) -> None:
        """Until nothing that was sent is under way."""
        if self._stream is not None:
            self._is_sent.synchronize()

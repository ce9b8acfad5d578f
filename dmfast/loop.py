# SPDX-License-Identifier: MIT
"""The loop over iterations: each made eagerly, or one recorded and then replayed.

A replay asks nothing of the host: the number of the iteration is a tensor that the iteration itself
advances, and the losses stay in a ring on the device until they are read, all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .devices import free_memory, is_out_of_memory
from .errors import InputError
from .graphs import Recorder, first_said
from .matching import Matching
from .runs import interrupts_deferred

_MOST_UNREAD = 1024


class Reading(NamedTuple):
    """The losses of iterations ``first`` and on, and whether the images are finite after them."""

    first: int
    losses: list[float]
    images_are_finite: bool


class Loop:
    """The iterations of a run, from some number on; a context in which they are made.

    With a recorder the first iterations are made eagerly, which warms it up, and the next is
    recorded. Where that fails, they go on being made eagerly. Where memory runs out, the same
    iteration is made again with half as many classes at once. Either is said by ``note``. Nothing
    is lost: until its end an iteration changes nothing that lasts.

    Attributes:
        iteration: how many are made: the number of the next.
    """

    def __init__(
        self,
        matcher: Matching,
        iteration: int = 0,
        *,
        recorder: Recorder | None = None,
        required: bool = False,
        most_unread: int = _MOST_UNREAD,
        note: Callable[[str], object] = lambda words: None,
    ) -> None:
        """Goes on from what ``matcher`` holds after ``iteration`` iterations.

        Args:
            required: a recording that fails is an error.
            most_unread: losses that are kept on the device before they are read.
        """
        device = matcher.images.device
        self.iteration = iteration
        self._matcher, self._device, self._note = matcher, device, note
        self._step = torch.tensor([iteration], device=device)
        self._slot = torch.empty_like(self._step)
        self._ring = torch.zeros(most_unread, dtype=torch.float32, device=device)
        self._read = iteration  # the losses of the iterations before are on the host
        self._losses: list[float] = []
        self._recorder, self._required = recorder, required
        self._replay: Callable[[], None] | None = None
        self._warm_up = recorder.warm_up if recorder else 0
        self._active: AbstractContextManager[object] = nullcontext()

    def __enter__(self) -> Loop:
        if self._recorder is not None:
            self._active = self._recorder.active()
        self._active.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._active.__exit__(*error)  # type: ignore[arg-type]
        finally:
            self._matcher.close()

    def prepare(self) -> Callable[[], None]:
        """Begins the next iteration. What it gives ends it, and must not be interrupted.

        Raises:
            InputError: memory does not suffice for one class at a time, the iteration cannot be
                recorded but has to be, or the real images cannot be gathered.
        """
        self._matcher.load(self.iteration)
        if self._recorder is not None and self._replay is None and self._warm_up == 0:
            self._record(self._recorder)
        if self._replay is not None:
            return partial(self._end, self._replay)
        loss, gradient = self._gradient()
        self._warm_up = max(0, self._warm_up - 1)
        return partial(self._end, partial(self._update, loss, gradient))

    def advance(self) -> None:
        """Makes the next iteration."""
        end = self.prepare()
        with interrupts_deferred():
            end()

    @property
    def replays(self) -> bool:
        """Whether iterations are replayed now: then the device is busy while the host is, too."""
        return self._replay is not None

    def read(self) -> Callable[[], Reading]:
        """Begins to read what the iterations have come to since the last call.

        What it gives waits for that, but not for iterations that are made in between.
        """
        count = self.iteration - self._read
        first, self._read = self._read, self.iteration
        earlier, self._losses = self._losses, []
        finite = self._matcher.images.isfinite().all().reshape(1)
        values = torch.cat([self._ring, finite]).to("cpu", non_blocking=True)
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))

        def wait() -> Reading:
            if event is not None:
                event.synchronize()
            *ring, is_finite = values.tolist()
            losses = [ring[i % len(ring)] for i in range(first, first + count)]
            return Reading(first - len(earlier), earlier + losses, bool(is_finite))

        return wait

    def _iterate(self) -> None:
        self._update(*self._matcher.gradient(self._step))

    def _update(self, loss: Tensor, gradient: Tensor) -> None:
        # Nothing is allocated from here on, so that an iteration is made whole or not at all.
        torch.remainder(self._step, len(self._ring), out=self._slot)
        self._ring.index_copy_(0, self._slot, loss.reshape(1))
        self._matcher.update(gradient)
        self._step += 1

    def _end(self, end: Callable[[], None]) -> None:
        end()
        self.iteration += 1
        if self.iteration - self._read == len(self._ring):
            self._losses = self.read()().losses

    def _gradient(self) -> tuple[Tensor, Tensor]:
        while True:
            try:
                return self._matcher.gradient(self._step)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Not in the handler: the error holds on to what the iteration had allocated.
            if not self._divide():
                resident = self._device.type == "cuda" and not self._matcher.streams
                raise InputError(
                    f"{self._device} has no memory for {self._at_once()}"
                    f"{free_memory(self._device)}: lower --batch-real or --ipc, or choose "
                    "--precision bfloat16 or a smaller --model"
                    + (", or --memory-budget 0, which keeps the real images off it" * resident)
                )

    def _at_once(self) -> str:
        classes = self._matcher.classes_per_step
        return f"{classes} classes at once" if classes > 1 else "one class at a time"

    def _divide(self) -> bool:
        """Goes on with fewer classes at once, if that can be."""
        before, free = self._at_once(), free_memory(self._device)
        if not self._matcher.halve():
            return False
        self._note(
            f"{self._device} has no memory for {before}{free}: going on with {self._at_once()}, "
            f"as --classes-per-step {self._matcher.classes_per_step} does from the start"
        )
        self._warm_up = self._recorder.warm_up if self._recorder else 0
        return True

    def _record(self, recorder: Recorder) -> None:
        try:
            with interrupts_deferred():
                self._replay = recorder.record(self._iterate)
            return
        except RuntimeError as error:
            # No more of it: an error holds on to what the iteration had allocated.
            reason, short = first_said(error)
        if short and self._divide():
            return
        if self._required:
            raise InputError(
                f"--graph required: an iteration could not be captured in a CUDA graph ({reason}); "
                "leave the option out to go on without"
            )
        self._note(f"no CUDA graph, as an iteration could not be captured ({reason}): slower")
        self._recorder = None

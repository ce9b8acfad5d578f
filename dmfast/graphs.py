# SPDX-License-Identifier: MIT
"""What is asked of a device, recorded once and replayed: a CUDA graph, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from .devices import is_out_of_memory
from .errors import InputError, choose

GRAPHS = ("auto", "required", "off")


class Recorder(Protocol):
    """Makes what a function asks of a device repeatable, without the function.

    Attributes:
        warm_up: how many times the function is to have run before.
    """

    warm_up: int

    def active(self) -> AbstractContextManager[object]:
        """The context in which functions run, are recorded and are replayed."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records ``function``, which takes no effect by that; gives what replays it.

        Raises:
            RuntimeError: the function does something that cannot be recorded, or memory runs out.
        """


class CudaGraphs:
    """A :class:`Recorder` of CUDA graphs, on a stream of its own."""

    warm_up = 3

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._failed: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outer.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # thread_local: another thread may be sending real images meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                function()
        except BaseException:
            self._abandon(graph, pool)
            raise
        return graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Has the allocator forget a capture that failed.

        Where a capture is invalid, torch ends it by an error and leaves its pool as one that is
        still being captured into, after which memory cannot be given back.
        """
        index = self._stream.device_index
        try:
            torch._C._cuda_endAllocateToPool(index, pool)
        except RuntimeError:
            return  # it had ended: the graph gives its pool back itself
        torch._C._cuda_releasePool(index, pool)
        self._failed.append(graph)  # torch may still ask it which allocations are its own


def first_said(error: BaseException) -> tuple[str, bool]:
    """The reason why a recording failed, and whether that is a lack of memory.

    Ending a recording that has failed fails, too: the first error tells.
    """
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0], is_out_of_memory(error)


def recorder_of(graph: str, device: torch.device) -> Recorder | None:
    """What records iterations on that device; None where they are to be made eagerly.

    Args:
        graph: one of :data:`GRAPHS`.

    Raises:
        InputError: ``required`` where there is none.
    """
    choose("--graph", graph, GRAPHS)
    if graph == "off":
        return None
    if device.type == "cuda":
        return CudaGraphs(device)
    if graph == "required":
        raise InputError(
            "--graph required: there are CUDA graphs on a GPU only; use --device cuda, or leave "
            "the option out"
        )
    return None

# SPDX-License-Identifier: MIT
"""The stages of an iteration by name, for whoever watches: a clock, a trace, NVTX.

Nobody does, usually, and then a stage costs one look at a variable. In a CUDA graph that is
replayed no Python runs, so nothing is said of its stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

#: The stages, in the order in which an iteration begins them. A chunked iteration has some of them
#: once a chunk.
STAGES = (
    "weights",
    "draw",
    "real pass",
    "synthetic forward",
    "discrepancy",
    "backward",
    "update",
)

Watch = Callable[[str], AbstractContextManager[object]]

_NOBODY: AbstractContextManager[None] = nullcontext()
_watch: Watch | None = None


def stage(name: str) -> AbstractContextManager[object]:
    """The context of one of :data:`STAGES`."""
    return _NOBODY if _watch is None else _watch(name)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within it each stage runs in the context that ``watch`` gives for its name."""
    global _watch
    before, _watch = _watch, watch
    try:
        yield
    finally:
        _watch = before

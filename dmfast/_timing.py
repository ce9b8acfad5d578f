# SPDX-License-Identifier: MIT
"""Times of contenders that take turns, and of the stages of an iteration."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import _ranges, ceilings
from .devices import peak_memory, synchronise
from .matching import Matcher

OURS, EAGER, PUBLISHED, TIDIED = "dmfast", "eager", "published", "tidied"
SECONDS = 10.0
LEAST_ROUNDS = 3
_STAGE_ROUNDS = 10
_TURN = 0.05  # seconds that a contender's turn takes at least
_WARM_UP = {"cpu": 1, "cuda": 5}  # calls; a loop's recording is among them
#: How far the first losses may lie apart, the tidied one's and dmfast's.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}

Run = Callable[[], Tensor | None]  # of an iteration: its loss


def time_by_turns(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int | None = None,
    seconds: float = 0.0,
    calls: Mapping[str, int] | None = None,
    units: int = 1,
) -> dict[str, dict[str, float]]:
    """Times contenders by turns, in seconds a unit: median, least and most over the rounds.

    Args:
        runs: what each does in a call, of ``units`` units. They have been called before: compiling
            and warming up are done.
        rounds: how many; None: at least three, and until ``seconds`` are over.
        calls: how many a turn each makes in a row, before the device is waited for; else one.

    Returns:
        Of each contender ``median``, ``min``, ``max``, ``rounds``, ``units`` (in all), ``total``
        (the sum of its times), and ``host``: the median of the time until the calls had returned,
        on a GPU less than that until they were done.
    """
    calls = calls or {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    host: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for done in itertools.count():
        enough = done >= (LEAST_ROUNDS if rounds is None else rounds)
        if enough and (rounds is not None or time.perf_counter() - begin >= seconds):
            break
        for name, run in runs.items():
            count = calls.get(name, 1)
            synchronise(device)
            start = time.perf_counter()
            for _ in range(count):
                run()
            returned = time.perf_counter()
            synchronise(device)
            times[name].append((time.perf_counter() - start) / count / units)
            host[name].append((returned - start) / count / units)
    return {
        name: {
            "median": statistics.median(t),
            "min": min(t),
            "max": max(t),
            "rounds": len(t),
            "units": len(t) * calls.get(name, 1) * units,
            "total": sum(t) * calls.get(name, 1) * units,
            "host": statistics.median(host[name]),
        }
        for name, t in times.items()
    }


def timed(
    contenders: Mapping[str, Callable[[], Run]],
    device: torch.device,
    *,
    precision: str,
    rounds: int | None,
    seconds: float,
    ours: int = 1,
    units: int = 1,
) -> tuple[dict[str, Any], dict[str, Run]]:
    """Makes each contender, times them by turns, and gives the result and what ran.

    Args:
        precision: of dmfast and of the tidied baseline: how far their first losses may lie apart.
        rounds: as of :func:`time_by_turns`, as are ``seconds`` and ``units``.
        ours: least calls a turn of dmfast; else as many as take :data:`_TURN`, like the others.
    """
    runs: dict[str, Run] = {}
    calls: dict[str, int] = {}
    losses: dict[str, float | None] = {}
    peaks: dict[str, int] = {}
    for name, make in contenders.items():
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        runs[name] = run = make()
        loss = run()
        losses[name] = None if loss is None else loss.item()
        for _ in range(_WARM_UP[device.type]):
            run()
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        calls[name] = max(1, math.ceil(_TURN / (time.perf_counter() - start)))
        if device.type == "cuda":
            peaks[name] = peak_memory(device) - held
    calls[OURS] = max(calls[OURS], ours)
    times = time_by_turns(runs, device, rounds=rounds, seconds=seconds, calls=calls, units=units)
    result: dict[str, Any] = {"seconds": times, "peak_memory_bytes": peaks}
    if len(times) > 1:
        result["ratios"] = {
            name: times[name]["median"] / times[OURS]["median"] for name in times if name != OURS
        }
    ours_lost, others = losses[OURS], losses.get(TIDIED)
    if ours_lost is not None:
        result["first_loss"] = losses
    if ours_lost is not None and others is not None:
        tolerance = _TOLERANCE[precision]
        result["losses_agree"] = math.isclose(ours_lost, others, rel_tol=tolerance)
    return result, runs


class Clock:
    """The seconds of the stages of an iteration, by the device's own clock.

    On a GPU the events of a stage lie between its kernels, whenever these run. NVTX ranges go with
    it where the package ``nvtx`` is installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self._nvtx = _nvtx()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with ExitStack() as ranges:
            if self._nvtx is not None:
                ranges.enter_context(self._nvtx.annotate(name, domain="dmfast"))
            begin = self._mark()
            yield
            self._marks.append((name, begin, self._mark()))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = ceilings.cuda_event()
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """By name, the sums since the last reading."""
        synchronise(self._device)
        sums: dict[str, float] = {}
        for name, begin, end in self._marks:
            on_cpu = self._device.type != "cuda"
            took = end - begin if on_cpu else begin.elapsed_time(end) / 1e3
            sums[name] = sums.get(name, 0.0) + took
        self._marks.clear()
        return sums


def _nvtx() -> Any:
    try:
        return import_module("nvtx")
    except ImportError:
        return None


def stage_times(matcher: Matcher, device: torch.device) -> dict[str, dict[str, float]]:
    """The median, least and most seconds of each stage of an eager iteration, and of all of it."""
    clock = Clock(device)
    found: list[dict[str, float]] = []
    start = time.perf_counter()
    with _ranges.watched(clock):
        for step in range(_STAGE_ROUNDS + 1):
            with clock("all"):
                _, gradient = matcher.gradient(step)
                matcher.update(gradient)
            sums = clock.read()
            if step:  # the first one warms up
                found.append(sums)
            if step >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS / 2:
                break
    return {
        name: {
            key: of([sums[name] for sums in found])
            for key, of in (("median", statistics.median), ("min", min), ("max", max))
        }
        for name in (*_ranges.STAGES, "all")
        if name in found[0]
    }

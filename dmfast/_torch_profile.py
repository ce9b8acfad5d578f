# SPDX-License-Identifier: MIT
"""What torch's profiler tells of an iteration: its kernels by their times, and a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import _ranges
from ._timing import Run
from .devices import synchronise
from .files import atomic_path
from .matching import Matcher

TRACED = 3  # iterations


def _profiler(device: torch.device) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def kernels_by_name(run: Run, device: torch.device) -> list[dict[str, Any]]:
    """The kernels (of a CPU: the operators) of an iteration, the longest first.

    Of each ``name``, ``calls`` and ``seconds`` an iteration, of a CPU without what it calls.
    """
    run()
    synchronise(device)
    with _profiler(device) as profiler:
        for _ in range(TRACED):
            run()
        synchronise(device)
    kind = torch._C._autograd.DeviceType.CUDA if device.type == "cuda" else None
    rows = []
    for event in profiler.key_averages():
        if kind is None:
            microseconds = event.self_cpu_time_total
        elif event.device_type == kind:
            microseconds = event.self_device_time_total
        else:
            continue
        rows.append(
            {
                "name": event.key,
                "calls": event.count / TRACED,
                "seconds": microseconds / 1e6 / TRACED,
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"])


def write_trace(path: Path, matcher: Matcher, device: torch.device, replay: Run | None) -> None:
    """A trace of eager iterations with their stages, as Perfetto and chrome://tracing read it.

    Args:
        replay: makes an iteration without the host, so without stages; it follows in the trace.
    """

    def iteration(step: int) -> None:
        _, gradient = matcher.gradient(step)
        matcher.update(gradient)

    iteration(0)
    synchronise(device)
    with _profiler(device) as profiler, _ranges.watched(torch.profiler.record_function):
        for step in range(1, 1 + TRACED):
            with torch.profiler.record_function("iteration"):
                iteration(step)
        if replay is not None:
            for _ in range(TRACED):
                with torch.profiler.record_function("replayed iteration"):
                    replay()
        synchronise(device)
    with atomic_path(path) as temporary:
        profiler.export_chrome_trace(str(temporary))

# SPDX-License-Identifier: MIT
"""What a machine can do at most: arithmetic a second, and bytes copied."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

PRECISIONS = ("float32", "bfloat16")
_SECONDS = 0.1  # of one measurement: long enough for the clock to settle
_CPU = torch.device("cpu")
_SIDE = 8192  # of the matrices that a GPU multiplies


def arithmetic_rate(precision: str, device: torch.device = _CPU) -> float | None:
    """Floating-point operations a second; the best of five.

    Of a CPU: multiply-adds between registers, on as many threads as torch uses, by its best
    instructions; None where it has none for products in ``precision`` (for bfloat16: AVX-512's;
    matrix units like AMX, whose ceiling lies higher, are not measured). Of a GPU: a large matrix
    product, in float32 by TF32 where torch lets convolutions use that.
    """
    if device.type == "cuda":
        return _product_rate(precision, device)
    from ._operators import operators  # here: all else works without the extension

    loop: Callable[[int, bool], int] = operators._multiply_adds
    bfloat16 = precision == "bfloat16"
    if not loop(1, bfloat16):
        return None
    rounds, best = 1 << 20, 0.0
    for _ in range(5):
        start = time.perf_counter()
        operations = loop(rounds, bfloat16)
        elapsed = time.perf_counter() - start
        best = max(best, operations / elapsed)
        rounds = max(1, int(rounds * _SECONDS / elapsed))
    return best


def bandwidth(device: torch.device = _CPU) -> float:
    """Bytes a second that a copy far larger than the caches reads and writes; the best of five."""
    count = 1 << (30 if device.type == "cuda" else 27)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # The first one maps the target's pages.
    return 2 * source.numel() / min(_seconds(lambda: target.copy_(source), device)[1:])


def cuda_event() -> torch.cuda.Event:
    """One that takes the time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _product_rate(precision: str, device: torch.device) -> float:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    left, right = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.backends.cudnn.allow_tf32 else "highest")
    try:
        seconds = _seconds(lambda: torch.mm(left, right, out=out), device)
    finally:
        torch.set_float32_matmul_precision(before)
    return float(2 * _SIDE**3 / min(seconds[1:]))


def _seconds(call: Callable[[], object], device: torch.device) -> list[float]:
    """The seconds of a call, six times; on a GPU each time of ten in a row."""
    found = []
    for _ in range(6):
        if device.type == "cuda":
            begin, end = cuda_event(), cuda_event()
            begin.record()
            for _ in range(10):
                call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e4)
        else:
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return found

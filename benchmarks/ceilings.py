# SPDX-License-Identifier: MIT
"""What this CPU can do at most: multiply-adds between registers, and bytes copied."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

PRECISIONS = ("float32", "bfloat16")
_SECONDS = 0.1  # of one measurement: long enough for the clock to settle


@cache
def _library() -> ctypes.CDLL:
    """The loops of fma.c, compiled for this very CPU."""
    source = Path(__file__).with_name("fma.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma.so"
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", "-o", library, source]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


def arithmetic_rate(precision: str) -> float | None:
    """Floating-point operations a second, on as many threads as torch uses.

    The best of five. None where the CPU has no instruction for products in ``precision`` (for
    bfloat16: AVX-512's; matrix units like AMX, whose ceiling lies higher, are not measured).
    """
    loop = getattr(_library(), f"fma_{precision}")
    loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_long
    per_round = loop(0)
    if not per_round:
        return None
    threads = torch.get_num_threads()
    rounds, best = 1 << 20, 0.0
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter's lock
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(loop, [rounds] * threads))
            elapsed = time.perf_counter() - start
            best = max(best, threads * rounds * per_round / elapsed)
            rounds = max(1, int(rounds * _SECONDS / elapsed))
    return best


def bandwidth() -> float:
    """Bytes a second that a copy far larger than the caches reads and writes; the best of five."""
    source = torch.ones(1 << 27, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(6):  # the first one maps the target's pages
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.numel() / (time.perf_counter() - start))
    return best

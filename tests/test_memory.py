# SPDX-License-Identifier: MIT
"""Freed memory stays in the process."""

import ctypes
import platform
import subprocess
import sys

import pytest

from dmfast import memory

# Counts the page faults of the last of many equal allocations: after the first few, every block
# should come from memory that the process already has.
FAULTS = """
import resource, torch
from dmfast import memory
assert memory.keep_freed_pages() is True
faults = []
for _ in range(24):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(32 << 20, dtype=torch.uint8).fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[-10:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_repeated_large_allocations_stop_faulting():
    # In a process of its own: the settings last until the process ends.
    result = subprocess.run(
        [sys.executable, "-c", FAULTS],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(result.stdout) < 100  # of 8,192 pages of 4 KiB


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_pages() is False

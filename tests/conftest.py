# SPDX-License-Identifier: MIT
"""Fixtures that several test files use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from golden import SHARED

from dmfast import _load

# A shell without job control starts what runs in the background with Ctrl-C ignored, and so would
# the commands be that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def missing_for_cuda() -> str | None:
    """What keeps tests marked `cuda` from running here."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return (
        None
        if _load.has_cuda_operators()
        else "dmfast was built without CUDA operators (DMFAST_CUDA=1)"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    if reason := missing_for_cuda():
        if os.environ.get("DMFAST_REQUIRE_CUDA") == "1":
            pytest.fail(f"DMFAST_REQUIRE_CUDA=1, but {reason}")
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real image sets and published values; where it is not, the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data: {SHARED} is not there (set DMFAST_SHARED)")
    return SHARED

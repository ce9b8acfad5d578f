# SPDX-License-Identifier: MIT
"""Fixtures that several test files use."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import SHARED


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real image sets and published values; where it is not, the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data: {SHARED} is not there (set DMFAST_SHARED)")
    return SHARED

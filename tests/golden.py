# SPDX-License-Identifier: MIT
"""Where real image sets and the outputs of the published code are."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: The folder with real image sets and the whole of the test vectors, of which a part stands under
#: tests/data.
SHARED = Path(os.environ.get("DMFAST_SHARED") or HERE.parent.parent / "shared")


def golden_file(name: str) -> Path:
    """The whole file where it is there, else the part of it that is kept with the tests."""
    whole = SHARED / "golden" / name
    return whole if whole.exists() else HERE / "data" / name

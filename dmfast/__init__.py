# SPDX-License-Identifier: MIT
"""Dataset condensation with distribution matching, at the speed of the hardware.

:mod:`dmfast.ops` holds the fused operators, :mod:`dmfast.condense`, :mod:`dmfast.coreset` and
:mod:`dmfast.evaluate` the commands (``python -m dmfast.condense``) and functions of the same jobs,
and :mod:`dmfast.reproduce` the paper's tables and figures made by these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import InputError

if TYPE_CHECKING:
    from . import ops

__all__ = ["InputError", "__version__", "ops"]


def __getattr__(name: str) -> Any:
    """``ops`` on first use: torch takes seconds to import, in which a command can be stopped."""
    if name == "ops":
        from importlib import import_module

        return import_module("dmfast.ops")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

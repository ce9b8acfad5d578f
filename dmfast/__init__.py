# SPDX-License-Identifier: MIT
"""Dataset condensation with distribution matching, at the speed of the hardware.

:mod:`dmfast.ops` holds the fused operators, :mod:`dmfast.condense` and :mod:`dmfast.evaluate` the
commands (``python -m dmfast.condense``) and functions of the same jobs.
"""

from . import ops
from ._version import __version__
from .errors import InputError

__all__ = ["InputError", "__version__", "ops"]
